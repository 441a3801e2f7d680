"""Evaluation inside a run: greedy answers to held-out prompts, of one pinned version, against a fixed opponent.

Labels bought here are counted apart, in a ledger of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import Chooser
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.evaluation.evaluate import EvaluationConfig, win_rate
from rayalign.evaluation.metrics import Answered, find_metric, is_null
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.purchase import Purchaser
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.engine import Sampling
from rayalign.rollout.pool import RolloutPool
from rayalign.runs.logs import SAMPLES, read_evaluations
from rayalign.types import Candidate, Duel, Prompt


class HeldOut:
    """The held-out prompts of a run, their opponents and the schedule of evaluations."""

    def __init__(
        self,
        config: EvaluationConfig,
        world: World,
        encoder: PromptEncoder,
        oracle: Oracle,
        run_dir: Path,
        *,
        sampling: Sampling,
        identity: str,
        seed: int,
        ledger: Ledger | None = None,
    ) -> None:
        self.config, self.world, self.sampling, self.identity, self.seed = config, world, sampling, identity, seed
        self.run_dir = run_dir
        self.prompts: list[Prompt] = [encoder.encode(prompt) for prompt in world.heldout(config.num_prompts)]
        self.against = against(config, self.prompts)
        self._initial = run_dir / "initial_answers.json"
        self.ledger = Ledger(run_dir / "evaluation.arrow") if ledger is None else ledger
        self.purchaser = Purchaser(self.ledger, oracle, mode="deterministic", seed=seed, budget=None)
        done = read_evaluations(run_dir)
        self._last: int | None = int(done[-1]["labels"]) if done else None
        self.num_done = len(done)

    def prepare(self, pool: RolloutPool) -> None:
        """Take the initial policy's answers, while the pool still runs it, where they are the opponent."""
        if self.against == "initial" and not self._initial.exists():
            assert pool.version == 0, f"the initial answers are missing and the pool runs version {pool.version}"
            answers = [answer.text for answer in self._answers(pool)]
            partial = self._initial.with_suffix(".partial")
            partial.write_text(json.dumps(answers))
            partial.rename(self._initial)

    def due(self, labels: int) -> bool:
        """Whether the schedule asks for an evaluation after `labels` labels."""
        if self._last is None:
            return self.config.at_start or labels >= self.config.every > 0
        return self.config.every > 0 and labels // self.config.every > self._last // self.config.every

    def evaluate(self, pool: RolloutPool, chooser: Chooser, version: int, labels: int) -> dict[str, Any]:
        """Evaluate the weights that the pool runs; the same version twice costs nothing the second time."""
        answers = self._answers(pool)
        opponents = self._opponents()
        scores = self._scores(version, answers, opponents)
        record: dict[str, Any] = {
            "labels": labels,
            "version": version,
            "batch": version,
            **dict(zip(("win_rate", "stderr"), win_rate(scores), strict=True)),
            "num_prompts": len(scores),
            "mean_length": float(np.mean([len(answer.token_ids) for answer in answers])),
            "against": self.against,
            **self._measured(pool, answers),
        }
        if self.world.has_truth:
            rewards = [self.world.reward(p, a.text) for p, a in zip(self.prompts, answers, strict=True)]
            best = [self.world.best_reward(p) for p in self.prompts]
            record["reward_mean"] = float(np.mean(rewards))
            record["regret_mean"] = float(np.mean(np.subtract(best, rewards)))
        if self.config.best_of_n > 1:
            chosen = self._best_of_n(pool, chooser, version, answers)
            picked, error = win_rate(self._scores(version, chosen, opponents))
            record.update(best_of_n_win_rate=picked, best_of_n_stderr=error)
        record["labels_spent_on_evaluation"] = self.ledger.spent
        self._last = labels
        self.num_done += 1
        self._write_samples(labels, answers, opponents)
        return record

    # -- pieces ---------------------------------------------------------------------------------------------------
    def _answers(
        self, pool: RolloutPool, prompts: Sequence[Prompt] | None = None, min_tokens: int = 0
    ) -> list[Candidate]:
        sampling = replace(self.sampling, n=1, temperature=self.config.temperature, min_tokens=min_tokens)
        prompts = self.prompts if prompts is None else prompts
        return [group[0] for group in pool.generate(prompts, sampling, seed=self.seed)]

    def _measured(self, pool: RolloutPool, answers: Sequence[Candidate]) -> dict[str, float]:
        """The numbers of `evaluation.metrics`, as `metric/<name>`."""
        metrics = [find_metric(name) for name in self.config.metrics]
        spoken = list(answers)
        empty = [i for i, answer in enumerate(answers) if is_null(answer)]
        if empty and any(metric.spoken for metric in metrics):
            said = self._answers(pool, [self.prompts[i] for i in empty], min_tokens=1)
            for i, answer in zip(empty, said, strict=True):
                spoken[i] = answer
        answered = [
            Answered(prompt=prompt, answer=answer, spoken=out_loud)
            for prompt, answer, out_loud in zip(self.prompts, answers, spoken, strict=True)
        ]
        found = [metric.measure(answered) for metric in metrics]
        return {f"metric/{name}": float(value) for numbers in found for name, value in numbers.items()}

    def _best_of_n(
        self, pool: RolloutPool, chooser: Chooser, version: int, greedy: Sequence[Candidate]
    ) -> list[Candidate]:
        sampling = replace(self.sampling, n=self.config.best_of_n)
        groups = pool.generate(self.prompts, sampling, seed=self.seed + version)
        picks = [chooser.best_of(prompt, group) for prompt, group in zip(self.prompts, groups, strict=True)]
        return [a if pick is None else group[pick] for a, group, pick in zip(greedy, groups, picks, strict=True)]

    def _opponents(self) -> list[Candidate]:
        if self.against == "reference":
            return [given(prompt.reference or "") for prompt in self.prompts]
        return [given(text) for text in json.loads(self._initial.read_text())]

    def _scores(self, version: int, answers: Sequence[Candidate], opponents: Sequence[Candidate]) -> np.ndarray:
        """Per prompt: 1 a win, 0.5 a tie or an identical text (not asked), 0 a loss. Failed verdicts are left out."""
        duels = {
            i: Duel(
                id=Duel.make_id(f"{self.identity}/evaluation", version, i, prompt, ours, theirs),
                batch=version,
                prompt=prompt,
                first=ours,
                second=theirs,
            )
            for i, (prompt, ours, theirs) in enumerate(zip(self.prompts, answers, opponents, strict=True))
            if ours.text != theirs.text
        }
        self.purchaser.commit(None, list(duels.values()), [])
        labels = dict(zip(duels, self.purchaser.label(list(duels.values())), strict=True))
        failed = {i for i, preference in labels.items() if preference is None}
        known = {i: preference.label for i, preference in labels.items() if preference is not None}
        return np.array([known.get(i, 0.5) for i in range(len(answers)) if i not in failed], dtype=float)

    def _write_samples(self, labels: int, answers: Sequence[Candidate], opponents: Sequence[Candidate]) -> None:
        with (self.run_dir / SAMPLES).open("a") as file:
            for prompt, answer, opponent in list(zip(self.prompts, answers, opponents, strict=True))[:20]:
                row = {"labels": labels, "prompt": prompt.text, "response": answer.text, "reference": opponent.text}
                file.write(json.dumps(row) + "\n")


def against(config: EvaluationConfig, prompts: Sequence[Prompt]) -> str:
    """`reference` or `initial`. Raises `ConfigError` if references are asked for and a prompt has none."""
    missing = [prompt.id for prompt in prompts if prompt.reference is None]
    if config.against == "reference" and missing:
        raise ConfigError(
            f"evaluation.against='reference', but held-out prompt {missing[0]} has no reference response "
            f"({len(missing)} of {len(prompts)} lack one). Add them, or set evaluation.against='initial'."
        )
    return "initial" if config.against == "initial" or missing else "reference"


def given(text: str) -> Candidate:
    """A response that nobody sampled here."""
    return Candidate(text=text, token_ids=(), logprobs=(), policy_version=-1, source="data")
