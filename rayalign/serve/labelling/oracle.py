"""People as an oracle: duels go into the queue, and verdicts come back when people have voted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rayalign.env.labels import judge_late
from rayalign.errors import ConfigError
from rayalign.serve.config import OracleConfig
from rayalign.serve.labelling.aggregate import AGGREGATES
from rayalign.serve.labelling.app import DEFAULT_GUIDELINES
from rayalign.serve.labelling.config import tokens_path
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.labelling.tokens import Tokens
from rayalign.types import Duel, Verdict


class HumanOracle:
    """The queue in `config.human.folder`, and the people who may answer: a `LateOracle`. One process at a time.

    `judge` waits for people, at most `oracle.request_timeout_s`. What they answer after that is kept: asking again
    with the same ids returns it.
    """

    def __init__(self, config: OracleConfig) -> None:
        human = config.human
        self.timeout_s, self.folder = config.request_timeout_s, Path(human.folder)
        self.tokens = Tokens.read(human.tokens_file) if human.tokens_file else Tokens.read_or_make(tokens_path(human))
        if human.annotators_per_duel > len(self.tokens.names):
            raise ConfigError(
                f"oracle.human.annotators_per_duel={human.annotators_per_duel}, but oracle.human.tokens_file="
                f"{human.tokens_file!r} names {len(self.tokens.names)} annotators. Add some, or ask for fewer votes."
            )
        self.guidelines = _guidelines(human.guidelines_file)
        self.queue = DuelQueue(
            self.folder / "queue.arrow",
            self.tokens.names,
            annotators_per_duel=human.annotators_per_duel,
            lease_s=human.lease_s,
            undo_s=human.undo_s,
            aggregate=AGGREGATES[human.aggregate],
        )
        self.id = f"human:{human.annotators_per_duel}:{human.aggregate}"

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """What people say of each duel, taken together; a failure where everybody skipped it."""
        return judge_late(self, duels, self.timeout_s)

    def poll(self, duels: Sequence[Duel]) -> list[Verdict]:
        """Line up the duels that are new; the verdicts on those of `duels` that people are through with."""
        verdicts = list(self.queue.put(duels).values())
        if verdicts:
            self._write_summary()
        return verdicts

    def _write_summary(self) -> None:
        """Who did how much, and how far people agree, for whoever runs this: `summary.json` beside the queue."""
        pairs, alpha = self.queue.agreement()
        summary = {
            "annotators": {name: asdict(self.queue.progress(name)) for name in self.tokens.names},
            "agreement": [asdict(pair) for pair in pairs],
            "krippendorff_alpha": alpha,
        }
        new = self.folder / "summary.json.new"
        new.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.folder / "summary.json")


def _guidelines(path: str) -> str:
    if not path:
        return DEFAULT_GUIDELINES
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"oracle.human.guidelines_file={path!r} can't be read: {type(error).__name__}.") from error
