"""One replica of the oracle in this process, without a cluster."""

import asyncio
import threading

import pytest

from rayalign.errors import ConfigError, OracleError
from rayalign.serve.config import OracleConfig
from rayalign.serve.deployment import OracleDeployment, checked
from rayalign.serve.oracles import FunctionOracle
from rayalign.serve.wire import DuelColumns
from rayalign.types import Candidate, Duel, Prompt, Verdict


class Held:
    """Judges when it is let; remembers the ids of each go."""

    id = "held"

    def __init__(self):
        self.goes, self.gate = [], threading.Semaphore(0)

    def judge(self, duels):
        self.goes.append([duel.id for duel in duels])
        assert self.gate.acquire(timeout=20)
        return [Verdict(duel_id=duel.id, probability=0.5) for duel in duels]


def call(*names):
    text = Candidate(text="x", token_ids=(), logprobs=(), policy_version=0)
    return DuelColumns.pack(
        [
            Duel(id=name, batch=0, prompt=Prompt(id=name, text=name, token_ids=()), first=text, second=text)
            for name in names
        ]
    )


def test_a_caller_that_gives_up_while_it_is_judged_for_others_too_takes_nobody_along(tmp_path):
    """`b` gets the lock and has `b` and `c` judged; then `b` leaves. `c` has its answer, and both are paid once."""
    oracle = Held()

    async def until(goes):
        while len(oracle.goes) < goes:
            await asyncio.sleep(0.01)

    async def go():
        config = OracleConfig(kind="function", batch_wait_s=0)
        replica = OracleDeployment(config, lambda: oracle, str(tmp_path))
        a = asyncio.ensure_future(replica.judge(call("a")))
        await until(1)
        b, c = (asyncio.ensure_future(replica.judge(call(name))) for name in "bc")
        await asyncio.sleep(0.05)
        oracle.gate.release()
        await until(2)
        b.cancel()
        await asyncio.sleep(0.05)
        oracle.gate.release()
        answers = await asyncio.wait_for(asyncio.gather(a, c), timeout=10)
        assert b.cancelled() and [answer.ids for answer in answers] == [["a"], ["c"]]
        return await asyncio.wait_for(replica.judge(call("b")), timeout=10)

    assert asyncio.run(go()).ids == ["b"]
    assert oracle.goes == [["a"], ["b", "c"]], "b was paid, though nobody waited for it"


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_what_has_no_price_is_refused_before_it_is_journalled(price):
    duels = call("a").unpack()
    with pytest.raises(OracleError, match="for duel a, which is not a price"):
        checked("o", duels, [Verdict(duel_id="a", probability=0.5, price=price)])
    sound = [Verdict(duel_id="a", probability=0.5, price=0.25)]
    assert checked("o", duels, sound) == sound


def test_what_a_function_answered_before_it_broke_is_not_asked_again(tmp_path):
    asked, broken = [], True

    def probability(prompt, first, second):
        asked.append(prompt)
        if prompt == "c" and broken:
            raise RuntimeError("the endpoint is gone")
        return 0.25

    oracle = FunctionOracle(probability, returns="probability")
    config = OracleConfig(kind="function", returns="probability", batch_wait_s=0)

    async def judged():
        return await OracleDeployment(config, lambda: oracle, str(tmp_path)).judge(call("a", "b", "c", "d"))

    with pytest.raises(OracleError, match="RuntimeError on duel c: the endpoint is gone"):
        asyncio.run(judged())
    assert asked == ["a", "b", "c"]
    broken = False
    assert asyncio.run(judged()).probabilities == [0.25] * 4
    assert asked == ["a", "b", "c", "c", "d"], "a and b were paid"


class Late(Held):
    def poll(self, duels):
        return []


def test_an_oracle_that_answers_late_has_one_replica_unless_all_ask_in_one_place(tmp_path):
    two = OracleConfig(kind="function", num_replicas=2)
    with pytest.raises(ConfigError, match=r"oracle\.num_replicas=2 .* held answers late"):
        OracleDeployment(two, Late, str(tmp_path))
    shared = Late()
    shared.shared = True
    assert OracleDeployment(two, lambda: shared, str(tmp_path)).oracle is shared
