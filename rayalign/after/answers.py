"""Answers of an aligned policy in the files that other people's judges read.

    alpaca_eval   in: JSON list (or JSON lines) with `instruction`, as tatsu-lab/alpaca_eval's alpaca_eval.json
                  out: JSON list of instruction, output, generator, and dataset where it was there
                  `alpaca_eval --model_outputs FILE`
    mt_bench      in: JSON lines with question_id, category, turns, as FastChat's data/mt_bench/question.jsonl
                  out: JSON lines of question_id, answer_id, model_id, choices, tstamp
                  FastChat's gen_judgment.py, with the file as data/mt_bench/model_answer/NAME.jsonl

Judging costs money and is theirs; this costs none.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign import storage
from rayalign.after.aligned import Aligned, load_chooser
from rayalign.agents.agent import Agent
from rayalign.env.prompt_data import readable_messages
from rayalign.errors import ConfigError, DataError, did_you_mean
from rayalign.loop.loop import cluster
from rayalign.rollout.encode import PromptEncoder, check_fits, context_length
from rayalign.rollout.engine import Sampling
from rayalign.rollout.pool import RolloutPool
from rayalign.types import Candidate, Prompt

FORMATS = ("alpaca_eval", "mt_bench")
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of MT-Bench, by category (FastChat, `llm_judge/common.py`)."""
OTHER_TEMPERATURE = 0.7
"""Of a category that MT-Bench does not have."""

Row = dict[str, Any]
Messages = list[dict[str, str]]


def write_answers(
    what: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    format: str,
    best_of: int = 0,
    temperature: float | None = None,
    name: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Answer every prompt of a file and write the answers to `out`, which must not be there; returns it.

    Args:
        what: directory of a finished run (a folder, or a URI in a bucket), or a model.
        prompts: file of questions; see the head of this module.
        out: file of answers.
        format: `alpaca_eval` or `mt_bench`.
        best_of: samples among which the run's agent picks each answer; 0 or 1 takes the answer as it comes.
        temperature: of all answers. Default: with best_of the run's own; else greedy for alpaca_eval, and by category
            for mt_bench, as its authors do.
        name: of the model in the file; default: the last name of `what`.
        seed: of the samples.
        **changes: settings `rollout.*`; `**{"rollout.max_tokens": 1024}` is what MT-Bench's authors take.

    Raises:
        ConfigError, DataError: before anything is started; of the prompts the line and the field are named.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is unknown. {did_you_mean(format, FORMATS)}")
    storage.local_only(out, "out")
    target = Path(out)
    if target.exists():
        raise DataError(f"out={str(out)!r} is there already; name another file: nothing is overwritten.")
    if not target.parent.is_dir():
        raise DataError(f"out={str(out)!r}: there is no directory {str(target.parent)!r}.")
    aligned = Aligned.find(what, changes)
    aligned.check_best_of(best_of)
    rows = read_rows(prompts, format)
    speaker = _Speaker(aligned, best_of, temperature, seed)
    speaker.check([list(map(str, row["turns"])) if format == "mt_bench" else [_opening(row, format)] for row in rows])
    generator = name or aligned.name
    with ExitStack() as stack:
        if aligned.rollout.num_replicas:
            stack.enter_context(cluster())
        speaker.pool = stack.enter_context(RolloutPool(aligned.rollout, aligned.policy, name="evaluate"))
        if best_of > 1:
            speaker.chooser = load_chooser(aligned.run)
        text = _alpaca(rows, speaker, generator) if format == "alpaca_eval" else _mt_bench(rows, speaker, generator)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(target)
    return target


# -- questions --------------------------------------------------------------------------------------------------------
def read_rows(path: str | Path, format: str) -> list[Row]:
    """The questions of a file, checked. Raises `DataError` that names the row and the field."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={str(path)!r} can't be read: {error}.") from error
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"prompts={str(path)!r} is neither a JSON list nor JSON lines: {error}.") from error
    if not rows:
        raise DataError(f"prompts={str(path)!r} has no questions.")
    for number, row in enumerate(rows, start=1):
        where = f"prompts={str(path)!r}, question {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is a JSON {type(row).__name__}, not an object.")
        if format == "alpaca_eval":
            if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
                raise DataError(f"{where}: field 'instruction' must be a text that is not empty.")
            continue
        turns = row.get("turns")
        texts = isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)
        if not turns or not texts:
            raise DataError(f"{where}: field 'turns' must be a list of texts that are not empty.")
        if "question_id" not in row:
            raise DataError(f"{where}: field 'question_id' is missing.")
    return rows


def _opening(row: Row, format: str) -> str:
    """What is asked first."""
    if format == "mt_bench":
        return str(row["turns"][0])
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)


# -- answers ----------------------------------------------------------------------------------------------------------
@dataclass
class _Speaker:
    """The policy, its sampling and, for best-of-n, who picks."""

    aligned: Aligned
    best_of: int
    temperature: float | None
    seed: int
    pool: RolloutPool | None = None
    chooser: Agent | None = None

    def __post_init__(self) -> None:
        rollout = self.aligned.rollout
        self.encoder = PromptEncoder(self.aligned.policy, rollout.max_prompt_tokens, chat=rollout.chat)
        if self.best_of > 1 and self.temperature is None:
            self.temperature = rollout.temperature
        if self.best_of > 1 and self.temperature == 0:
            raise ConfigError(f"best_of={self.best_of} picks among samples, but temperature=0 makes them all the same.")

    def encode(self, messages: Messages) -> Prompt:
        """As the policy reads it; without a chat template a single message is its text."""
        meta = {"messages": messages} if self.encoder.has_template and self.aligned.rollout.chat != "never" else {}
        if not meta and len(messages) > 1:
            raise DataError("this policy has no chat template, so it can't be asked a second turn.")
        return self.encoder.encode(Prompt(id="question", text=readable_messages(messages), token_ids=(), meta=meta))

    def check(self, conversations: Sequence[Sequence[str]]) -> None:
        """All turns of every conversation fit into the model, whatever the answers in between will be."""
        context = context_length(self.aligned.policy)
        rollout = self.aligned.rollout
        for turns in conversations:
            talk: Messages = [{"role": "user", "content": turns[0]}]
            for turn in turns[1:]:
                talk += [{"role": "assistant", "content": "."}, {"role": "user", "content": turn}]
            prompt = self.encode(talk)
            longest = len(prompt.token_ids) + (len(turns) - 1) * rollout.max_tokens
            if longest > rollout.max_prompt_tokens:
                raise ConfigError(
                    f"rollout.max_prompt_tokens={rollout.max_prompt_tokens}: turn {len(turns)} of {turns[0][:40]!r} "
                    f"can be {longest} tokens long with the answers before it. Set rollout.max_prompt_tokens={longest} "
                    f"or a smaller rollout.max_tokens than {rollout.max_tokens}."
                )
            check_fits(prompt, len(turns) * rollout.max_tokens, context)

    def answers(self, talks: Sequence[Messages], temperatures: Sequence[float], turn: int) -> list[str]:
        """One answer to each conversation, all of a temperature in one request."""
        assert self.pool is not None
        prompts = [self.encode(talk) for talk in talks]
        texts = [""] * len(talks)
        for number, temperature in enumerate(sorted(set(temperatures))):
            places = [i for i, own in enumerate(temperatures) if own == temperature]
            groups = self.pool.generate(
                [prompts[i] for i in places], self._sampling(temperature), seed=self.seed + 1000 * turn + number
            )
            for i, group in zip(places, groups, strict=True):
                texts[i] = self._pick(prompts[i], group).text
        return texts

    def _sampling(self, temperature: float) -> Sampling:
        return self.aligned.rollout.sampling(n=max(1, self.best_of), temperature=temperature)

    def _pick(self, prompt: Prompt, group: Sequence[Candidate]) -> Candidate:
        return group[0] if self.chooser is None else group[self.chooser.best_of(prompt, group) or 0]


def _alpaca(rows: Sequence[Row], speaker: _Speaker, generator: str) -> str:
    talks = [[{"role": "user", "content": _opening(row, "alpaca_eval")}] for row in rows]
    temperature = speaker.temperature or 0.0
    outputs = speaker.answers(talks, [temperature] * len(talks), turn=0)
    kept = ("dataset", "instruction", "input")
    answers = [
        {name: row[name] for name in kept if name in row} | {"output": output, "generator": generator}
        for row, output in zip(rows, outputs, strict=True)
    ]
    return json.dumps(answers, ensure_ascii=False, indent=1) + "\n"


def _mt_bench(rows: Sequence[Row], speaker: _Speaker, generator: str) -> str:
    talks: list[Messages] = [[] for _ in rows]
    turns: list[list[str]] = [[] for _ in rows]
    temperatures = [_temperature(row, speaker.temperature) for row in rows]
    for turn in range(max(len(row["turns"]) for row in rows)):
        asked = [i for i, row in enumerate(rows) if turn < len(row["turns"])]
        for i in asked:
            talks[i].append({"role": "user", "content": rows[i]["turns"][turn]})
        outputs = speaker.answers([talks[i] for i in asked], [temperatures[i] for i in asked], turn)
        for i, output in zip(asked, outputs, strict=True):
            talks[i].append({"role": "assistant", "content": output})
            turns[i].append(output)
    lines = [
        json.dumps(
            {
                "question_id": row["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": generator,
                "choices": [{"index": 0, "turns": own}],
                "tstamp": time.time(),
            },
            ensure_ascii=False,
        )
        for row, own in zip(rows, turns, strict=True)
    ]
    return "\n".join(lines) + "\n"


def _temperature(row: Mapping[str, Any], given: float | None) -> float:
    return TEMPERATURES.get(str(row.get("category")), OTHER_TEMPERATURE) if given is None else given
