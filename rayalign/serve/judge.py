"""A language model as a judge: an oracle that asks an OpenAI-compatible endpoint, or a model of its own, which response
is better.

    duel -> questions (one or both orders) -> already in the call book? -> its answer
                                              | no: reserve the price, ask, read
                                              v
                    again, with backoff, after a rate limit, a server error, a timeout or an unreadable verdict
                                              v
            mean over the orders -> Verdict(probability)        no answer, or an abstention -> Verdict(failure)

A verdict that can't be read is never a tie and never a coin flip. What is wrong with every call (key, model, quota,
spending cap) stops the run at once, as an `OracleError`; the answers up to there are in the call book and free.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import OracleError, StorageError
from rayalign.serve.call_book import Answer, BucketCallBook, CallBook, Question
from rayalign.serve.config import OracleConfig
from rayalign.serve.endpoint import Endpoint, Reply, Trouble
from rayalign.serve.judge_config import LOCAL, JudgeConfig
from rayalign.serve.judge_prompts import ANSWERS, TEMPLATES, Reading, question, read_logprobs, read_text
from rayalign.serve.kinds import OracleKind, check_target
from rayalign.types import Duel, Verdict

if TYPE_CHECKING:
    from rayalign.serve.local_judge import LocalJudge


class Failure(NamedTuple):
    """Why a question has no answer."""

    why: str
    refused: bool = False
    """The endpoint did not accept the message."""


class JudgeOracle:
    """`P(first wins)` as the model `config.target` behind `config.judge.base_url`, or in this process, sees it.

    Raises `ConfigError` without a key and `OracleError` if nothing answers at the address or the key is wrong: before
    anything is bought.
    """

    def __init__(self, config: OracleConfig) -> None:
        self.config = config.judge
        self.endpoint = _endpoint(config)
        self.model = self.endpoint.model
        self.endpoint.check()
        self.book = CallBook(None, self.config.max_spend)
        self.id = f"judge:{self.model}@{self.endpoint.host}#{_checksum(self.config)}"
        """`judge:`, the model, the endpoint's host and port, and a checksum of what is asked and how it is read.

        What an answer is kept under: in the call book, in the ledger beside the label, and in the names that a service
        gives to duels. Nothing compares it with an earlier one. So a run that resumes with another id keeps its labels,
        its answers and what they cost, and asks the open duels anew, and pays for them. That is right where another
        judge would answer, and wrong where the same one would: settings of how fast, how often and how long are not in
        it.
        """
        self._pace = _Pace(self.config.calls_per_minute)

    def keep_in(self, folder: str | Path) -> None:
        """Keep the call book in `folder`, and go on with the one that is there."""
        self.book = CallBook(folder, self.config.max_spend)

    def keep_in_bucket(self, uri: str) -> None:
        """The same in a bucket. The replicas before this one make no calls any more."""
        self.book = BucketCallBook(uri, self.config.max_spend)

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel. Raises `OracleError` for what would be wrong with every call."""
        if not duels:
            return []
        self.book.refresh()
        asked = [(duel, q) for duel in duels for q in self._questions(duel)]
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.config.concurrency, len(asked)), thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._settled, duel, q, stop) for duel, q in asked]
        self.book.flush()
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise next((e for e in errors if isinstance(e, OracleError)), errors[0])
        outcomes = {q: future.result() for (_, q), future in zip(asked, futures, strict=True)}
        self._raise_if_nothing_is_accepted(list(outcomes.values()))
        return [self._verdict(duel, [outcomes[q] for q in self._questions(duel)]) for duel in duels]

    # -- what is asked ------------------------------------------------------------------------------------------
    def _questions(self, duel: Duel) -> list[Question]:
        """Those that count first; then, for some duels, the first of them again."""
        swapped = [False, True] if self.config.order == "both" else [self._draw("order", duel) < 0.5]
        questions = [Question(self.id, duel.id, side, 0) for side in swapped]
        if self._draw("recheck", duel) < self.config.recheck:
            questions.append(questions[0]._replace(repeat=1))
        return questions

    def _draw(self, what: str, duel: Duel) -> float:
        """Uniform in [0, 1), by seed and duel alone, so that asking again asks the same."""
        digest = hashlib.blake2b(f"{what}:{self.config.seed}:{duel.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    def _message(self, duel: Duel, swapped: bool) -> str:
        first, second = (duel.second, duel.first) if swapped else (duel.first, duel.second)
        return question(self.config.template, self.config.verdict, duel.prompt, first.text, second.text)

    # -- asking, in several threads -----------------------------------------------------------------------------
    def _settled(self, duel: Duel, q: Question, stop: threading.Event) -> Answer | Failure:
        """The answer to a question, from the book or from the endpoint, or why there is none."""
        known = self.book.lookup(q)
        if known is not None:
            return known
        message, why = self._message(duel, q.swapped), ""
        for attempt in range(self.config.retries + 1):
            self._pace.wait(stop)
            if stop.is_set():
                return Failure("another call of the same go stopped it")
            try:
                return self._call(q, message)
            except (OracleError, StorageError):
                stop.set()  # nobody begins another call; those in flight are waited for, since they are paid
                raise
            except Trouble as trouble:
                why = trouble.why
                if trouble.kind == "refused":
                    return Failure(why, refused=True)
                pause = max(trouble.pause_s, min(self.config.backoff_s * 2**attempt, self.config.longest_pause_s))
                if pause > self.config.longest_pause_s:
                    return Failure(f"{why} (it asks to wait {pause:.0f} s)")
                if attempt < self.config.retries:
                    stop.wait(pause * random.uniform(1.0, 1.25))  # callers that failed together come back apart
        return Failure(f"{why} ({self.config.retries + 1} attempts)")

    def _call(self, q: Question, message: str) -> Answer:
        """One call, booked before and after. Raises `Trouble` if there is no answer, `OracleError` if never."""
        call = self.book.reserve(q.duel, self.config.price)
        try:
            answer = self._read(self.endpoint.ask(message))
        except Trouble as trouble:
            (self.book.waste if trouble.billed else self.book.free)(call, trouble.why)
            if trouble.kind == "fatal":
                raise OracleError(trouble.why) from None
            raise
        self.book.answer(call, q, answer)
        return answer

    def _read(self, reply: Reply) -> Answer:
        if reply.refusal:
            return Answer(None)
        if self.config.verdict == "text":
            # What was cut off has no last line, only a last word.
            reading = Reading() if reply.finish_reason == "length" else read_text(reply.text)
        elif reply.first_token is not None:
            reading = read_logprobs(*reply.first_token)
        elif reply.text and not self.book.answers:
            raise Trouble(
                f"the judge {self.model} at {self.endpoint.host} returns no log-probabilities. Set "
                "oracle.judge.verdict=text, or ask a model that has them.",
                "fatal",
                billed=True,
            )
        else:
            reading = Reading()
        if reading.probability is None and not reading.abstained:
            raise Trouble(f"unreadable verdict {self.endpoint.clean(reply.text)!r}", "again", billed=True)
        return Answer(reading.probability)

    # -- what comes of it ---------------------------------------------------------------------------------------
    def _raise_if_nothing_is_accepted(self, outcomes: Sequence[Answer | Failure]) -> None:
        """An endpoint that refuses everything from the start does not like our requests, rather than the texts."""
        refused = [outcome for outcome in outcomes if isinstance(outcome, Failure) and outcome.refused]
        if len(refused) == len(outcomes) and not self.book.answers:
            raise OracleError(
                f"the judge {self.model} at {self.endpoint.host} refuses every request: {refused[0].why}. Nothing was "
                "charged; look at oracle.judge.request (null leaves a field out), max_tokens and top_logprobs."
            )

    def _verdict(self, duel: Duel, outcomes: Sequence[Answer | Failure]) -> Verdict:
        """The mean over the orders; without an answer from each of them, a failure."""
        shown = [q.swapped for q in self._questions(duel) if q.repeat == 0]
        counted = outcomes[: len(shown)]
        for outcome in counted:
            if isinstance(outcome, Failure):
                return Verdict(duel_id=duel.id, failure=f"no verdict: {outcome.why}")
        values = [outcome.probability for outcome in counted if isinstance(outcome, Answer)]
        if None in values:
            return Verdict(duel_id=duel.id, failure="the judge abstained")
        wins = [1 - p if swapped else p for p, swapped in zip(values, shown, strict=True) if p is not None]
        return Verdict(duel_id=duel.id, probability=sum(wins) / len(wins), price=self.book.spent_on(duel.id))


def _endpoint(config: OracleConfig) -> Endpoint | LocalJudge:
    if config.judge.base_url != LOCAL:
        return Endpoint(config.judge, config.target)
    from rayalign.serve.local_judge import LocalJudge  # imports torch

    return LocalJudge(config)


def _checksum(config: JudgeConfig) -> str:
    """Of the settings that decide what a verdict says.

    Not of `max_tokens`: an answer that ended by itself is the same under a longer limit, and one that was cut off is no
    answer.
    """
    template = TEMPLATES.get(config.template, config.template)
    looked_at = config.top_logprobs if config.verdict == "logprobs" else None
    asked = (template, ANSWERS[config.verdict], config.temperature, sorted(config.request.items()), looked_at)
    return hashlib.blake2b(repr(asked).encode(), digest_size=4).hexdigest()


class _Pace:
    """Lets calls begin at even distances; `per_minute=0` does not hold back."""

    def __init__(self, per_minute: float) -> None:
        self._distance = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._mutex = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        if not self._distance:
            return
        with self._mutex:
            now = time.monotonic()
            self._next = max(now, self._next + self._distance)
            pause = self._next - now
        stop.wait(pause)


def _make(config: OracleConfig, world: World | None) -> Oracle:
    return JudgeOracle(config)


JUDGE = OracleKind(make=_make, check=check_target)
