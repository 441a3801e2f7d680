"""The way from the endpoint to the run: its collector, a Ray actor under the name of the oracle's Serve application.

    ask(question) --+
    ask(question) --+--> waiting --> one call: all that wait --> collector: answer --> each its own
                                     (what arrives meanwhile is the next call)

A collector that is being restarted, or has not started yet, is asked again until the caller's time is over: nothing of
what it was told before is lost, as it tells nobody before its book is on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rayalign.errors import RayalignError, RolloutError, WaitError
from rayalign.rollout.config import RolloutConfig
from rayalign.serve.kinds import COLLECTORS
from rayalign.serve.users.book import Told
from rayalign.serve.users.questions import UserAnswer, UserQuestion

RETRY_S = 0.25


class Desk:
    """Asks the collector named `name`. The async methods belong to one event loop, `choices` to any thread.

    Args:
        max_batch: most questions in one call.
        timeout_s: longest wait of a caller; `WaitError` after it.
    """

    def __init__(self, name: str, *, max_batch: int, timeout_s: float) -> None:
        self.name, self.max_batch, self.timeout_s = name, max_batch, timeout_s
        self._waiting: list[tuple[UserQuestion, asyncio.Future[UserAnswer]]] = []
        self._asking: asyncio.Task[None] | None = None

    # -- in the event loop ----------------------------------------------------------------------------------------
    async def ask(self, question: UserQuestion) -> UserAnswer:
        """What the run answers. Raises `WaitError` where it takes too long, and what the run says is wrong."""
        answer: asyncio.Future[UserAnswer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all())
        try:
            return await asyncio.wait_for(answer, self.timeout_s)
        except TimeoutError:
            raise self._late() from None

    async def describe(self) -> tuple[str, RolloutConfig]:
        """See `Online.describe`."""
        return await self._call("describe")

    async def choose(self, name: str, choice: str, owner: str) -> Told:
        """See `Online.choose`; safe to repeat, so it is, until the collector has answered."""
        return await self._call("choose", name, choice, owner)

    # -- in a thread ----------------------------------------------------------------------------------------------
    def choices(self, names: Sequence[str]) -> list[str | None]:
        """See `Online.choices`."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                return ray.get(self._actor().choices.remote(list(names)), timeout=self.timeout_s)
            except GetTimeoutError:
                raise self._late() from None
            except (ValueError, RayActorError):
                if time.monotonic() > deadline:
                    raise self._late() from None
                time.sleep(RETRY_S)

    # -- inside ---------------------------------------------------------------------------------------------------
    async def _ask_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self.max_batch], self._waiting[self.max_batch :]
            batch = [(question, answer) for question, answer in batch if not answer.done()]  # the others gave up
            if not batch:
                continue
            answers: Sequence[UserAnswer | BaseException]
            try:
                answers = await self._call("answer", [question for question, _ in batch])
            except Exception as error:
                known = isinstance(error, RayalignError)
                answers = [error if known else RolloutError("the run can't answer.")] * len(batch)
            for (_, waiting), found in zip(batch, answers, strict=True):
                if waiting.done():
                    continue
                if isinstance(found, BaseException):
                    waiting.set_exception(found)
                else:
                    waiting.set_result(found)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call the collector; while it is not there, or says None, again."""
        deadline = time.monotonic() + self.timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                actor = await asyncio.to_thread(self._actor)
                reply = getattr(actor, method).remote(*arguments)
                found = await asyncio.wait_for(asyncio.wrap_future(reply.future()), left)
                if found is not None:
                    return found
            except TimeoutError as error:
                if isinstance(error, WaitError):
                    raise
                break
            except (ValueError, RayActorError):  # Ray knows no such actor (yet), or is restarting it
                pass
            await asyncio.sleep(RETRY_S)
        raise self._late()

    def _actor(self) -> Any:
        return ray.get_actor(self.name, namespace=COLLECTORS)

    def _late(self) -> WaitError:
        return WaitError(f"the policy did not answer within {self.timeout_s:g} s; it may be overloaded. Try again.")
