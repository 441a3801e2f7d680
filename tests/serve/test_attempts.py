"""Wrong tokens: how many an address may show, and whom that does not concern."""

import pytest

from rayalign.serve import attempts
from rayalign.serve.attempts import Attempts, address_of


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_an_address_has_a_few_tries_and_then_one_at_a_time(clock):
    counted = Attempts(burst=3, every_s=6.0, clock=clock)
    waits = []
    for _ in range(3):
        waits.append(counted.wait_s("a", "x"))
        counted.wrong("a")
    assert waits == [0, 0, 0] and counted.wait_s("a", "x") == 6
    clock.now += 5.5
    assert counted.wait_s("a", "x") == 1
    clock.now += 0.5
    assert counted.wait_s("a", "x") == 0
    counted.wrong("a")
    assert counted.wait_s("a", "x") == 6, "one try came back, and it is used"
    clock.now += 3 * 6.0
    assert counted.wait_s("a", "x") == 0
    counted.wrong("a")
    assert counted.wait_s("a", "x") == 0, "who was quiet for long has all tries again"


def test_other_addresses_and_tokens_that_were_right_do_not_wait(clock):
    counted = Attempts(burst=1, clock=clock)
    counted.right("a", "of ann")
    counted.wrong("a")
    assert counted.wait_s("a", "x") > 0 and counted.wait_s("b", "x") == 0
    assert counted.wait_s("a", "of ann") == 0 and counted.wait_s("a", "of bob") > 0


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(clock, monkeypatch):
    monkeypatch.setattr(attempts, "REMEMBERED", 2)
    counted = Attempts(burst=1, clock=clock)
    for address in "abac":
        counted.wrong(address)
        counted.right(address, "t")
    assert [counted.wait_s(address, "x") > 0 for address in "abc"] == [True, False, True]
    assert len(counted._right) == 2


@pytest.mark.parametrize(
    ("client", "forwarded", "address"),
    [
        (("203.0.113.5", 1), [], "203.0.113.5"),
        (("203.0.113.5", 1), [b"198.51.100.1"], "203.0.113.5"),  # anybody can write that
        (("127.0.0.1", 1), [], "127.0.0.1"),
        (("127.0.0.1", 1), [b"invented, 198.51.100.1"], "198.51.100.1"),
        (("::1", 1), [b"invented", b"198.51.100.1"], "198.51.100.1"),
        (("127.0.0.1", 1), [b"a, "], "127.0.0.1"),
        (("127.0.0.1", 1), [b"x" * 1000], "x" * 64),
        (None, [b"198.51.100.1"], "unknown"),
    ],
)
def test_the_address_is_the_other_end_or_whom_a_proxy_of_this_machine_names(client, forwarded, address):
    assert address_of({"client": client, "headers": [(b"X-Forwarded-For", value) for value in forwarded]}) == address
