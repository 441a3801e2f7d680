"""From questions that arrive one by one to batches of an engine, and back.

    answer(question) --+
    answer(question) --+--> waiting --> one thread: all that wait, by their sampling settings --> engine.generate
    answer(question) --+                                                    best of n: the agent picks
                                       (what arrives meanwhile is the next batch)

An engine that is busy is asked again when it is through: questions that come meanwhile wait for each other rather than
for their turn. This is not continuous batching; under heavy traffic export the policy and serve it with vLLM itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from rayalign.agents.agent import Chooser
from rayalign.errors import RayalignError, RolloutError, WaitError
from rayalign.rollout.engine import Engine, Sampling
from rayalign.types import Candidate, Prompt

CHOICES_APART = 1 << 16
"""So that a choice of one seed is not the first choice of the next seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and how it is to be answered."""

    prompt: Prompt
    """Encoded."""
    sampling: Sampling
    """`n` are the answers that are wanted."""
    seed: int
    """Of this prompt's samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a question."""

    choices: list[Candidate]
    """As many as were wanted."""
    sampled_tokens: int
    """Tokens of all samples, those that were not picked included."""


class Answerer(Protocol):
    """Whoever answers questions: an engine in this process, or the pool of a run that goes on."""

    async def answer(self, question: Question) -> Answer:
        """Raises `WaitError` where it takes too long, and another `RayalignError` where it can't be done."""

    def check_health(self) -> None:
        """Raises if this will not answer any more."""


@dataclass(eq=False)
class _Waiting:
    question: Question
    future: Future[Answer] = field(default_factory=Future)


class EngineAnswerer:
    """An engine behind a queue. Thread-safe; the engine and the chooser are used by one thread of its own alone."""

    def __init__(
        self,
        engine: Engine,
        *,
        best_of: int = 0,
        chooser: Chooser | None = None,
        max_batch: int = 256,
        timeout_s: float = 300.0,
    ) -> None:
        self.engine, self.chooser = engine, chooser
        self.samples = max(1, best_of) if chooser is not None else 1
        self.max_batch, self.timeout_s = max_batch, timeout_s
        self._waiting: list[_Waiting] = []
        self._news = threading.Condition()
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    async def answer(self, question: Question) -> Answer:
        """See `Answerer.answer`."""
        waiting = _Waiting(question)
        with self._news:
            if self._closed or self._broken is not None:
                raise RolloutError("the policy does not answer any more; this replica is about to be replaced.")
            self._waiting.append(waiting)
            self._news.notify()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(waiting.future), self.timeout_s)
        except TimeoutError:
            raise WaitError(
                f"the policy did not answer within {self.timeout_s:g} s; it may be overloaded. Try again."
            ) from None

    def check_health(self) -> None:
        """Raises `RolloutError` once the engine has failed: Serve then replaces the replica."""
        if self._broken is not None:
            raise RolloutError(f"the engine failed: {type(self._broken).__name__}: {self._broken}")

    def close(self) -> None:
        """Stop the thread; who still waits is told."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(timeout=10.0)

    # -- in the thread ------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    left, self._waiting = self._waiting, []
                    batch: list[_Waiting] = []
                else:
                    batch, left = self._next_batch(), []
            for waiting in left:
                if waiting.future.set_running_or_notify_cancel():
                    waiting.future.set_exception(RolloutError("the policy's server is being stopped."))
            if self._closed:
                return
            # Whoever gave up in the meantime is not worked for.
            batch = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[_Waiting]:
        """The one that has waited longest, and who can be answered together with it."""
        first = self._waiting[0].question.sampling
        batch: list[_Waiting] = []
        room = self.max_batch
        for waiting in list(self._waiting):
            size = waiting.question.sampling.n * self.samples
            if replace(waiting.question.sampling, n=first.n) == first and (not batch or size <= room):
                batch.append(waiting)
                self._waiting.remove(waiting)
                room -= size
        return batch

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            answers = self._sample([waiting.question for waiting in batch])
        except Exception as error:
            if not isinstance(error, RayalignError):
                self._broken = error
            for waiting in batch:
                waiting.future.set_exception(
                    error if isinstance(error, RayalignError) else RolloutError("the policy's engine failed.")
                )
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)

    def _sample(self, questions: Sequence[Question]) -> list[Answer]:
        """Each choice is a prompt of its own for the engine, so that one call serves any `n`."""
        one = replace(questions[0].sampling, n=self.samples if questions[0].sampling.temperature > 0 else 1)
        rows = [(question, choice) for question in questions for choice in range(question.sampling.n)]
        groups = self.engine.generate(
            [question.prompt for question, _ in rows],
            one,
            seed=0,
            positions=[question.seed * CHOICES_APART + choice for question, choice in rows],
        )
        picked = [self._pick(question.prompt, group) for (question, _), group in zip(rows, groups, strict=True)]
        answers = []
        start = 0
        for question in questions:
            stop = start + question.sampling.n
            tokens = sum(len(candidate.token_ids) for group in groups[start:stop] for candidate in group)
            answers.append(Answer(choices=picked[start:stop], sampled_tokens=tokens))
            start = stop
        return answers

    def _pick(self, prompt: Prompt, group: Sequence[Candidate]) -> Candidate:
        if self.chooser is None or len(group) == 1:
            return group[0]
        return group[self.chooser.best_of(prompt, group) or 0]
