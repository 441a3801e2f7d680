"""The collector of a run whose prompts come from users: they are answered at once, and some of them choose.

    a question --> answer --> pool, agent: two answers?  gate open, and budget left for all who may still choose
                                |
                       one: the agent's best       two: in the book, then shown --> choose, or never
                                                                                      |
    collect    gate -> sync -> wait for `batch_size` choices <------------------------+
               label   commit them to the ledger, then "ask" the oracle, which knows them
               observe, record: as in every run

Two threads want the models (agent and pool): the one that collects, to observe and to send new weights, and one of the
actor's, which answers all questions that wait, together. Each holds them for as long as it computes; neither while it
waits for users, the learner or the oracle. So no user waits for the learner, and no answer is of two versions.

A comparison becomes a duel of the ledger when its user has chosen. Until then it charges nothing and nobody waits for
it. At most as many may be open as the budget has labels left for beside those that were chosen, so that who chooses in
time is always heard, and the budget is never exceeded. Book and ledger say together where the run stands: a restarted
collector commits first, in their order, the choices that are in the one and not yet in the other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import Agent, Choice, Chooser
from rayalign.env.labels import Oracle
from rayalign.env.truth import regrets
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError, RayalignError, WaitError
from rayalign.loop.collector import Collector
from rayalign.loop.stopwatch import Stopwatch
from rayalign.random_streams import GENERATE, QUESTIONS, SELECT
from rayalign.rollout.config import RolloutConfig
from rayalign.runs.config import RunConfig
from rayalign.serve.kinds import oracle_kind
from rayalign.serve.policy.openai import before
from rayalign.serve.users.book import Book, Shown, Told, is_swapped
from rayalign.serve.users.questions import UserAnswer, UserQuestion
from rayalign.types import Candidate, Duel, Prompt

ALONE = SELECT + 1
"""Random numbers of a question that is sampled as its user wants it."""
FOLDER = "users"
"""Of the book, in the run directory."""
WAIT_S = 0.2
"""Between two looks at whether there are new weights while users choose."""
READY_S = 5.0
"""Longest that a question waits in here for a collector that is still starting."""


@dataclass(frozen=True)
class _OneAtATime:
    """An agent that another thread uses, too."""

    agent: Agent
    lock: AbstractContextManager[Any]

    def best_of(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int | None:
        """As the agent's own."""
        with self.lock:
            return self.agent.best_of(prompt, candidates)


class OnlineCollector(Collector):
    """A `Collector` that users ask, and an `Online` for the endpoint."""

    def __init__(self, config: RunConfig, world: World, agent: Agent, oracle: Oracle, eval_oracle: Oracle) -> None:
        users = config.oracle.users
        self.book = Book(Path(config.run_dir) / FOLDER / "book.arrow", choose_within_s=users.choose_within_s)
        self.models = threading.RLock()
        self._ready = threading.Event()
        self._over = False
        super().__init__(config, world, agent, oracle, eval_oracle)

    # ==== the loop =============================================================================================
    def _run(self) -> None:
        """As in every run. After the last evaluation nobody is answered any more, so that the numbers are final."""
        super()._run()
        with self.models:
            self._over = True

    def collect(self, batch: int) -> None:
        """Wait until users have chosen as many comparisons as a batch has duels; these are batch `batch`."""
        clock = Stopwatch()
        self._begin(batch, clock)
        with clock("wait"):
            self._wait_for_choices(batch)
        duels = self.book.chosen(self._wanted(), batch)
        duels = duels[: self.purchaser.reserve(len(duels))]
        if not duels:  # others have spent a budget that is shared
            return
        synthetic = self.book.synthetic(self.config.loop.batch_size, batch)
        with clock("label"):
            version = self.engines.version
            self._commit(batch, duels, synthetic, version=version, choices=len(duels) + len(synthetic))
            self.book.committed([*(duel.id for duel in duels), *(preference.duel.id for preference in synthetic)])
            info = self._labels(duels)
        shown = [candidate for duel in duels for candidate in (duel.first, duel.second)]
        oldest = min((c.policy_version for c in shown if c.source == "policy"), default=version)
        facts: dict[str, Any] = {"version": version, "staleness": batch - oldest}
        facts |= {f"online/{name}": value for name, value in self.book.numbers().items()}
        self._end(batch, duels, synthetic, info, facts, clock)

    def _wanted(self) -> int:
        """Duels of the next batch: the last one of the budget is a short one."""
        remaining = self.purchaser.remaining
        return self.config.loop.batch_size if remaining is None else min(self.config.loop.batch_size, remaining)

    def _wait_for_choices(self, batch: int) -> None:
        """Until there is a batch of them; new weights go to the engines meanwhile, where the agent wants them."""
        _, newest = self.agent.sampling_window(batch, self.config.loop.max_staleness)
        limit, seen = self.config.oracle.request_timeout_s, self.book.num_chosen
        self._waits, last = True, time.monotonic()
        while not self.book.wait_for(self._wanted(), WAIT_S):
            self.window.wait_for_version(0, timeout_s=0.0)  # raises what stopped the run
            if self._stop.is_set():
                raise self.failure or RayalignError("the run is being stopped.")
            self._sync(newest)
            if self.book.num_chosen > seen:
                seen, last = self.book.num_chosen, time.monotonic()
            if time.monotonic() - last > limit:
                raise WaitError(
                    f"waited {limit:g} s (oracle.request_timeout_s) for a user to choose between two answers. Nothing "
                    "is lost: `rayalign resume` waits on."
                )
        self._waits = False

    def _labels(self, duels: Sequence[Duel]) -> dict[str, Any]:
        """What a step of the environment says of duels, of those that users brought."""
        preferences = self.purchaser.label(duels)
        info: dict[str, Any] = {"preferences": preferences, "labelled": np.array([p is not None for p in preferences])}
        if self.world.has_truth and all(self.world.find(duel.prompt.text) for duel in duels):
            both = [regrets(self.world, duel.prompt, duel.first.text, duel.second.text) for duel in duels]
            info["regret_reward"], info["regret_preference"] = np.array(both).T
        return info

    # ==== the models, which another thread uses, too ===========================================================
    def _recover(self) -> None:
        """As in every run; from then on users are answered."""
        super()._recover()
        self.book.settle(lambda name: name in self.ledger)
        self.chooser: Chooser = _OneAtATime(self.agent, self.models)
        self._ready.set()

    def _observe(self, collected: int | None = None) -> dict[str, float]:
        with self.models:
            return super()._observe(collected)

    def _sync(self, newest: int | None) -> None:
        with self.models:
            super()._sync(newest)

    def _evaluate_newest_if_due(self, clock: Stopwatch) -> None:
        with self.models:  # nobody is answered by weights that the agent does not want in the engines
            super()._evaluate_newest_if_due(clock)

    # ==== what the endpoint asks, from other threads ============================================================
    def describe(self) -> tuple[str, RolloutConfig]:
        """See `serve.users.questions.Online`."""
        return self.config.policy, self.config.rollout

    def choose(self, name: str, choice: str, owner: str) -> Told:
        """See `Book.choose`."""
        return self.book.choose(name, choice, owner)

    def choices(self, names: Sequence[str]) -> list[str | None]:
        """See `Book.choices`."""
        return self.book.choices(names)

    def answer(self, questions: Sequence[UserQuestion]) -> list[UserAnswer | RayalignError] | None:
        """An answer or an error per question; None while the run is not ready. What is shown is in the book by then.

        What stops these questions alone is told; anything else stops the run, which could not go on without answers.
        """
        if not self._ready.wait(READY_S):
            return None
        if self._stop.is_set() or self.failure is not None:
            return [self.failed_with() or RayalignError("the run is over.")] * len(questions)
        try:
            with self.models:
                if self._over:
                    raise WaitError("this run is over, and so is its endpoint.")
                shown, answers = self._answer([replace(q, prompt=self._known(q.prompt)) for q in questions])
                self.book.show(shown)
            return list(answers)
        except (DataError, WaitError) as error:
            return [error] * len(questions)
        except BaseException as error:
            if not self._stop.is_set():  # else the engines are being stopped
                self._fail(error)
            return [self.failed_with() or RayalignError("the run has stopped.")] * len(questions)

    def _answer(self, questions: Sequence[UserQuestion]) -> tuple[list[Shown], list[UserAnswer]]:
        """What each question's user is shown, for the book and for the reply."""
        number = self.book.num_questions
        comparable = [i for i, question in enumerate(questions) if question.comparable]
        shown: dict[int, Shown] = {}
        answers: dict[int, UserAnswer] = {}
        if comparable:
            prompts = [questions[i].prompt for i in comparable]
            candidates = self.engines.propose(prompts, number, QUESTIONS, GENERATE)
            picked = self._pick(prompts, candidates, number)
            for place, i in enumerate(comparable):
                pick, group = picked.get(place), candidates[place]
                tokens = sum(len(candidate.token_ids) for candidate in group)
                shown[i], answers[i] = self._show(questions[i], group, pick, number + i, tokens)
        for i, question in enumerate(questions):
            if i not in answers:
                choices = self._sample(question, number + i)
                tokens = sum(len(candidate.token_ids) for candidate in choices)
                seen = [replace(choice, text=before(choice.text, question.stops)) for choice in choices]
                shown[i] = Shown(regret=self._regret(question.prompt, seen), owner=question.owner)
                answers[i] = UserAnswer(choices=choices, sampled_tokens=tokens)
        order = range(len(questions))
        return [shown[i] for i in order], [answers[i] for i in order]

    def _pick(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], number: int
    ) -> dict[int, Choice]:
        """By place of the prompt, what the agent wants to know of it; nothing where no more may be asked now.

        A comparison that is offered now would be of the batch after those that are collected or chosen: for that one
        the pool's weights have to be fresh enough.
        """
        size, most = self.config.loop.batch_size, self.config.loop.max_staleness
        batch = self.ledger.num_collected + self.book.num_chosen // size
        oldest, _ = self.agent.sampling_window(batch, most)
        claims = self.book.num_claims  # before what remains: a commit in between may count twice, but never not at all
        remaining = self.purchaser.remaining
        room = size if remaining is None else remaining - claims
        if self.engines.version < oldest or room <= 0:
            return {}
        own_room = size - self.book.num_synthetic
        picked: dict[int, Choice] = {}
        for choice in self.agent.select(batch, prompts, candidates, self._rng(number, QUESTIONS, SELECT)):
            if choice.prompt in picked:  # a user is asked one thing at a time
                continue
            if choice.label is None and room > 0:
                picked[choice.prompt], room = choice, room - 1
            elif choice.label is not None and own_room > 0:
                picked[choice.prompt], own_room = choice, own_room - 1
        return picked

    def _show(
        self, question: UserQuestion, group: Sequence[Candidate], pick: Choice | None, number: int, tokens: int
    ) -> tuple[Shown, UserAnswer]:
        """One answer, or two where `pick` says which and does not know itself which is better."""
        prompt, duel = question.prompt, None
        if pick is not None:
            first, second = group[pick.first], group[pick.second]
            batch = self.ledger.num_collected
            name = Duel.make_id(f"{self.config.identity}/online", batch, number, prompt, first, second)
            duel = Duel(id=name, batch=batch, prompt=prompt, first=first, second=second, meta=pick.meta)
        if pick is None or pick.label is not None or duel is None:
            best = [self._best(prompt, group)]
            regret, label = self._regret(prompt, best), None if pick is None else pick.label
            shown = Shown(regret=regret, duel=duel, label=label, owner=question.owner)
            return shown, UserAnswer(choices=best, sampled_tokens=tokens)
        pair = [duel.first, duel.second]
        shown = Shown(regret=self._regret(prompt, pair), duel=duel, owner=question.owner)
        return shown, UserAnswer(
            choices=pair[::-1] if is_swapped(duel.id) else pair,
            sampled_tokens=tokens,
            comparison=duel.id,
            expires=time.time() + self.config.oracle.users.choose_within_s,
        )

    def _best(self, prompt: Prompt, group: Sequence[Candidate]) -> Candidate:
        """What the agent would answer, of what the current policy says."""
        own = [candidate for candidate in group if candidate.source == "policy"] or list(group)
        return own[self.agent.best_of(prompt, own) or 0]

    def _sample(self, question: UserQuestion, number: int) -> list[Candidate]:
        """Answers as the user wants them sampled."""
        seed = int(self._rng(number, QUESTIONS, ALONE).integers(2**62)) if question.seed is None else question.seed
        (choices,) = self.engines.policy.generate([question.prompt], question.sampling, seed)
        return choices

    def _known(self, prompt: Prompt) -> Prompt:
        """A user's prompt under the id, and with the reference, that it has in this world, where it is one of them."""
        found = self.world.find(prompt.text)
        if found is None:
            digest = hashlib.blake2b(repr(prompt.token_ids).encode(), digest_size=8).hexdigest()
            return replace(prompt, id=f"user-{digest}")
        return replace(prompt, id=found.id, reference=found.reference)

    def _regret(self, prompt: Prompt, shown: Sequence[Candidate]) -> float | None:
        """Of the answers that a user sees, on average; None where nobody knows."""
        if not self.world.has_truth or self.world.find(prompt.text) is None:
            return None
        rewards = [self.world.reward(prompt, candidate.text) for candidate in shown]
        return self.world.best_reward(prompt) - float(np.mean(rewards))

    # ==== what the driver asks ==================================================================================
    def status(self) -> dict[str, Any]:
        """Beside what every collector says: where users are, and what they have seen so far."""
        kind, numbers = oracle_kind(self.config.oracle.kind), self.book.numbers()
        address = kind.http(self.config.oracle)
        words = f"{numbers['questions']} questions, {numbers['open']} comparisons open"
        if "cumulative_regret" in numbers:
            words += f", cumulative regret {numbers['cumulative_regret']:.1f}"
        status = super().status() | {"online": numbers, "queue": words + (f", at {address.url}v1" if address else "")}
        if self._waits and status["phase"] == "collecting":
            status["phase"] = f"waiting for {kind.who}"
        return status

    def close(self) -> None:
        """As every collector; the book is on disk already."""
        super().close()
        self.book.close()


def check_online(config: RunConfig, agent: Agent) -> None:
    """Raise `ConfigError` for what users can't be served with."""
    if any(proposal.source == "data" for proposal in agent.proposals()):
        raise ConfigError(
            f"agent {config.agent_name!r} works with pairs that the data has, and users' questions have none. Use an "
            "agent that samples its responses, like passive or sea."
        )
    if config.loop.sleep_engines:
        raise ConfigError(
            "loop.sleep_engines=true has the engines asleep while the learner works, and users are answered at any "
            "time. Set it to false."
        )
    if config.evaluation.oracle is None:
        raise ConfigError(
            "users judge only what they are shown, so that somebody else has to judge held-out answers, and "
            f"{config.env} has no known reward: name an oracle for it, e.g. evaluation.oracle.kind=reward_model."
        )
