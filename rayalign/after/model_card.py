"""The model card of an exported policy: what was aligned, on how many labels, how well, and how to do it again.

Facts come from the run directory (`RunRecord`) and its ledger; nothing in a card is typed by hand. It is passed on, so
it names no path of the machine that it was made on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rayalign import config as settings
from rayalign import storage
from rayalign.agents import agent_class
from rayalign.config import read_yaml
from rayalign.errors import ConfigError
from rayalign.evaluation.evaluate import Estimate
from rayalign.runs.config import RunConfig
from rayalign.runs.record import CONFIG, REPLAY, RunRecord
from rayalign.runs.stored import StoredRun
from rayalign.system.code_version import code_version

TAGS = ("rayalign", "preference-learning")
READING = (
    "Held-out prompts are never among the training prompts. The interval is over prompts (Wilson) of this one run; "
    "other seeds may differ by more."
)
OF_THE_MACHINE = ("run_dir", "logging.", "policy", "env_kwargs.", "agent_name", "env", "loop.budget", "loop.seed")
"""Settings that the command says in other words, or that change nothing about what comes out."""


def write_card(
    folder: Path,
    record: RunRecord,
    stored: StoredRun,
    *,
    base_model: str | None,
    adapter: bool,
    price: float | None,
    rows: int,
    conversational: bool,
) -> None:
    """Write `folder/README.md`.

    Args:
        base_model: the hub's id of the initial policy, where it has one.
        adapter: whether `folder` has adapters rather than whole weights.
        price: what the labels cost, in the run's currency; None where that is not known.
        rows: preferences beside the card.
        conversational: whether these are chat messages.
    """
    from huggingface_hub import ModelCard

    base = f"`{base_model}`" if base_model else f"The initial policy of `{record.env}`"
    lesson = (
        f"a replay of {record.labels_replayed:,} preference labels of another run"
        if record.is_replay
        else f"{record.labels_spent:,} preference labels"
    )
    command, remarks = how_to_reproduce(stored, base_model)
    card = ModelCard.from_template(
        _card_data(record, base_model, adapter, price),
        template_str=files("rayalign.after").joinpath("model_card.md.j2").read_text(encoding="utf-8"),
        title=f"{(base_model or record.env).rpartition('/')[-1]}, aligned by {record.agent}",
        base=base,
        lesson=lesson,
        agent=record.agent,
        adapter=adapter,
        facts=facts(record, price),
        reading=READING,
        format="conversational" if conversational else "standard",
        rows=f"{rows:,}",
        version=version(record),
        command=command,
        remarks=remarks,
        settings=[(name, _text(value).replace("|", "\\|")) for name, value in record.settings.items()],
    )
    card.save(folder / "README.md")


def facts(record: RunRecord, price: float | None) -> list[tuple[str, str]]:
    """What was done and what came out, as rows of a table."""
    last = record.evaluations[-1] if record.evaluations else {}
    rows = [("agent", record.agent), ("environment", record.env), ("seed", str(record.seed))]
    if record.is_replay:
        rows.append(("labels replayed", f"{record.labels_replayed:,}, bought by another run"))
    else:
        rows.append(("labels spent", f"{record.labels_spent:,}"))
    if price:
        rows.append(("price of the labels", f"{price:g}"))
    rows.append(("labels for evaluation", f"{record.result.get('labels_spent_on_evaluation', 0):,}, counted apart"))
    for name, rate in (("before", record.before()), ("after", record.after())):
        if rate is not None:
            opponent = {"reference": "the data's references", "initial": "the initial policy"}[str(last["against"])]
            rows.append((f"held-out win rate {name}", f"{_estimate(rate)} against {opponent}"))
    if not record.evaluations:
        rows.append(("held-out win rate", "not evaluated"))
    if last.get("num_prompts"):
        rows.append(("held-out prompts", str(last["num_prompts"])))
    rows.append(("rayalign", version(record)))
    return rows


def version(record: RunRecord) -> str:
    """The code that made the run."""
    return record.code[-1] if record.code else code_version()


def _card_data(record: RunRecord, base_model: str | None, adapter: bool, price: float | None) -> Any:
    """The front matter: what the hub reads, and the run's facts under a key of our own."""
    from huggingface_hub import EvalResult, ModelCardData

    after = record.after()
    own: dict[str, Any] = {
        "version": version(record),
        "agent": str(record.settings.get("agent_name", "")),
        "environment": str(record.settings.get("env", "")),
        "seed": record.seed,
        "labels_spent": record.labels_spent,
        "labels_replayed": record.labels_replayed,
        "labels_spent_on_evaluation": int(record.result.get("labels_spent_on_evaluation", 0)),
        "price": price,
    }
    results = None
    if after is not None:
        own |= {"win_rate": after.value, "win_rate_95": [after.low, after.high]}
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=str(record.settings.get("env") or "prompts"),
                dataset_name=f"held-out prompts of {record.env}",
                metric_type="win_rate",
                metric_name="win rate",
                metric_value=round(after.value, 6),
            )
        ]
    path = str(record.settings.get("env_kwargs.path") or "")
    on_hub = path.count("/") == 1 and not os.path.exists(path) and not path.startswith((".", "/", "~"))
    return ModelCardData(
        base_model=base_model,
        datasets=[path] if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *TAGS,
            *(str(record.settings[name]) for name in ("agent.loss", "agent_name") if record.settings.get(name)),
        ],
        model_name=f"{(base_model or record.env).rpartition('/')[-1]}-{record.settings.get('agent_name', '')}",
        eval_results=results,
        rayalign={name: value for name, value in own.items() if value is not None},
    )


# -- the command ------------------------------------------------------------------------------------------------------
def how_to_reproduce(stored: StoredRun, base_model: str | None) -> tuple[str, list[str]]:
    """The command that makes a run over again, and what it can't say."""
    config = stored.config
    if stored.is_replay:
        return _how_to_replay(stored, base_model)
    command = ["rayalign", "run", config.agent_name, "--env", config.env]
    if base_model:
        command += ["--policy", base_model]
    elif (world := stored.world_if_there()) is None or Path(config.policy) != Path(world.default_policy() or "."):
        command += ["--policy", "POLICY"]
    command += ["--budget", str(config.loop.budget), "--seed", str(config.loop.seed)]
    for name, value in {**_env(config.env_kwargs), **changed(stored)}.items():
        command += ["--set", f"{name}={_text(value)}"]
    remarks = [
        f"The {what} was given as an object, which no command can name."
        for what in ("world", "agent", "oracle")
        if stored.custom.get(what) is not None
    ]
    if "POLICY" in command:
        remarks.append("POLICY is the directory of the initial policy.")
    if config.loop.max_staleness:
        remarks.append(
            f"Generation ran up to {config.loop.max_staleness} batches ahead of learning, so the same seed need not "
            "make the same run."
        )
    return _joined(command), remarks


def _how_to_replay(stored: StoredRun, base_model: str | None) -> tuple[str, list[str]]:
    """The same of a replay, whose settings are those of the run that it replays, but for the agent's."""
    config, used = stored.config, read_yaml((stored.path / REPLAY).read_text())
    source = storage.fetched_ledger(used["ledger"], run=True).parent
    replayed = StoredRun.read(source).config if (source / CONFIG).exists() else None
    command = ["rayalign", "replay", "RUN_DIR", "--agent", config.agent_name]
    if config.env and (replayed is None or replayed.env != config.env):
        command += ["--env", config.env]
    if replayed is None or replayed.policy != config.policy:
        command += ["--policy", base_model or "POLICY"]
    command += ["--seed", str(config.loop.seed), "--epochs", str(config.loop.epochs)]
    command += ["--batch-size", str(used["batch_size"])] if used["batch_size"] else []
    command += [] if used["synthetic"] else ["--no-synthetic"]
    mine = changed(stored)
    if replayed is not None:
        another = replayed.agent_name != config.agent_name  # whose settings are its own, and not the run's
        ours, theirs = (settings.flatten(settings.to_plain(one)) for one in (config, replayed))
        own = {name: value for name, value in mine.items() if another and name.startswith("agent.")}
        mine = own | {
            name: value
            for name, value in ours.items()
            if theirs.get(name) != value and not (another and name.startswith("agent."))
        }
    told = ("oracle.", "loop.", *OF_THE_MACHINE)  # of the loop a replay has what the options say
    for name, value in mine.items():
        if not name.startswith(told):
            command += ["--set", f"{name}={_text(value)}"]
    return _joined(command), ["RUN_DIR is the run whose labels these were."]


def changed(stored: StoredRun) -> dict[str, Any]:
    """The settings that are not what `rayalign run` takes by itself, in that environment and with that agent."""
    from rayalign.serve.kinds import oracle_kind

    config = stored.config
    try:
        usual = RunConfig(agent=agent_class(config.agent_name).Config())
    except ConfigError:  # an agent that was given as an object
        usual = RunConfig(agent=type(config.agent)())
    known = {setting.name for setting in settings.describe(usual)}
    world = stored.world_if_there()
    usual = settings.apply(usual, {k: v for k, v in (world.defaults() if world else {}).items() if k in known})
    usual = settings.apply(usual, oracle_kind(config.oracle.kind).defaults)
    mine, theirs = settings.flatten(settings.to_plain(config)), settings.flatten(settings.to_plain(usual))
    return {
        name: value
        for name, value in mine.items()
        if not name.startswith(OF_THE_MACHINE) and (name not in theirs or theirs[name] != value)
    }


def _env(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {f"env.{name}": value for name, value in kwargs.items()}


def _joined(command: Sequence[str]) -> str:
    """One option a line, where they are many."""
    words = [shlex.quote(word) for word in command]
    text, line = [], ""
    for word in words:
        if line and (len(line) + len(word) > 100 or word == "--set"):
            text.append(line)
            line = "   "
        line = f"{line} {word}" if line else word
    return " \\\n".join([*text, line])


def _text(value: Any) -> str:
    """As one would write it after `--set`; of a path its last two names."""
    if isinstance(value, str) and value.startswith(os.sep):
        return str(Path("…", *Path(value).parts[-2:]))
    if isinstance(value, str):
        return value.replace("\n", " ")
    return yaml.safe_dump(settings.to_plain(value), default_flow_style=True, width=10**6).partition("\n")[0]


def _estimate(rate: Estimate) -> str:
    return f"{rate.value:.3f} (95%: {rate.low:.3f} to {rate.high:.3f})"
