"""One replica of the oracle in this process, without a cluster."""

import asyncio
import threading

from rayalign.serve.config import OracleConfig
from rayalign.serve.deployment import OracleDeployment
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


def call(name):
    text = Candidate(text="x", token_ids=(), logprobs=(), policy_version=0)
    prompt = Prompt(id="p", text="p", token_ids=())
    return DuelColumns.pack([Duel(id=name, batch=0, prompt=prompt, first=text, second=text)])


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
