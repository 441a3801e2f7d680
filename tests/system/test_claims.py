"""Claims of several real processes on the same names."""

import subprocess
import sys
import time

import pytest

from rayalign.system.claims import Claims

NAMES = [f"duel-{i}" for i in range(200)]
HOLDER = """
import sys
from rayalign.system.claims import Claims
claims = Claims(sys.argv[1])
for line in sys.stdin:
    verb, *names = line.split()
    print(*(claims.claim(names) if verb == "claim" else claims.release(names) or ["released"]), flush=True)
"""
RACER = """
import sys, time
from rayalign.system.claims import Claims
claims, done = Claims(sys.argv[1]), set()
names = [f"duel-{i}" for i in range(200)]
print("ready", flush=True)
sys.stdin.readline()
while len(done) < len(names):
    mine = claims.claim([name for name in names if name not in done][:7])
    for name in mine:  # what a claim protects: looking, and then writing
        with open(f"{sys.argv[1]}/{name}", "a+") as file:
            file.seek(0)
            seen = file.read()
            time.sleep(0.0005)
            if not seen:
                file.write(sys.argv[2])
        done.add(name)
    claims.release(mine)
"""


class Process:
    def __init__(self, code, *arguments):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, *words):
        self.popen.stdin.write(" ".join(words) + "\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().split()


@pytest.fixture
def start():
    processes = []

    def one(code, *arguments):
        processes.append(Process(code, *arguments))
        return processes[-1]

    yield one
    for process in processes:
        process.popen.kill()
        process.popen.communicate()


def test_what_another_process_holds_is_not_claimed_until_it_is_released(tmp_path, start):
    other, mine = start(HOLDER, tmp_path), Claims(tmp_path)
    assert other.say("claim", "a", "b", "c") == ["a", "b", "c"]
    assert mine.claim(["b", "d", "d"]) == ["d"]
    assert other.say("claim", "c", "d", "e") == ["e"], "what one holds oneself is not claimed again"
    assert other.say("release", "b") == ["released"]
    assert mine.claim(["a", "b", "c"]) == ["b"]
    mine.release(["b", "d", "never held"])
    assert other.say("claim", "b", "d") == ["b", "d"]


def test_claims_of_a_killed_process_are_free_at_once(tmp_path, start):
    other, mine = start(HOLDER, tmp_path), Claims(tmp_path)
    assert other.say("claim", *NAMES) == NAMES
    assert mine.claim(NAMES) == []
    other.popen.kill()
    other.popen.wait()
    assert mine.claim(NAMES) == NAMES


def test_closing_gives_everything_back(tmp_path, start):
    other, mine = start(HOLDER, tmp_path), Claims(tmp_path)
    assert mine.claim(NAMES) == NAMES
    mine.close()
    assert other.say("claim", *NAMES) == NAMES


def test_of_three_racing_processes_exactly_one_does_each_thing(tmp_path, start):
    racers = [start(RACER, tmp_path, letter) for letter in "xyz"]
    for racer in racers:
        assert racer.popen.stdout.readline() == "ready\n"
    for racer in racers:
        racer.popen.stdin.write("go\n")
        racer.popen.stdin.flush()
    deadline = time.monotonic() + 60
    for racer in racers:
        assert racer.popen.wait(deadline - time.monotonic()) == 0
    wrote = [(tmp_path / name).read_text() for name in NAMES]
    assert all(len(text) == 1 for text in wrote), "nobody wrote where somebody had written"
    assert (tmp_path / "claims").stat().st_size == 0
