"""An estimate in words: what, how much, and how it is known."""

from __future__ import annotations

import math
from collections import Counter

from rayalign.estimate.estimate import SAMPLED_PROMPTS, Estimate
from rayalign.estimate.gpus import FullestGpu
from rayalign.estimate.labelling import LabelTime
from rayalign.estimate.role import GIB, total
from rayalign.estimate.shape import ModelShape
from rayalign.runs.config import RunConfig
from rayalign.system.memory import gpu_memory


def rows_of(found: Estimate, config: RunConfig) -> list[tuple[str, str, str]]:
    """What, how much, and how it is known."""
    bought, tokens = found.purchases, found.tokens
    length = "measured here" if tokens.measured else "the longest allowed; --calibrate measures"
    rows = [
        ("labels", f"{bought.labels:,}", "loop.budget, never exceeded"),
        ("labels for evaluation", f"at most {bought.evaluation_labels:,}", f"{bought.evaluations} evaluations"),
        *([("judge calls", f"{bought.calls:,.0f}", "questions asked again come on top")] if bought.calls else []),
        ("money", f"{bought.money:,.2f}" if bought.money else "nothing", "by the prices in the settings"),
        *((f"of it {judge.section}", f"{judge.money:,.2f}", judge.verdict()) for judge in bought.judges),
        ("batches", f"{tokens.batches:,}", _batches(found, config)),
        ("prompt tokens", f"{tokens.prompt_mean:.0f}", f"mean of {SAMPLED_PROMPTS}; longest {tokens.prompt_longest}"),
        ("response tokens", f"{tokens.response_mean:.1f}", length),
        ("tokens generated", _short(tokens.generated), ""),
        ("tokens trained on", _short(tokens.trained), "prompts and responses, forward and backward"),
        *([("tokens through the reference", _short(tokens.referred), "forward only")] if tokens.referred else []),
        ("parameters", _short(found.shape.parameters), _trained(found.shape, config)),
    ]
    rows += _memory_rows(found)
    rows += _time_rows(found)
    return rows


def _memory_rows(found: Estimate) -> list[tuple[str, str, str]]:
    rows = []
    for role in found.memory:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in role.parts.items())
        kept = "".join(f"; on the CPU: {name} {_gib(size)}" for name, size in role.host.items())
        spread = f" on each of {role.spread} GPUs" if role.spread > 1 else ""
        what = f"memory, {role.processes} x {role.role}" if role.processes > 1 else f"memory, {role.role}"
        rows.append((what, f"{_gib(role.total)} ({role.device})", parts + spread + kept))
    rows += [(f"memory, {role.role}", "not known", role.why) for role in found.uncounted]
    if found.fullest is not None:
        rows.append(_fullest_row(found.fullest))
    missing = f", nor {' and '.join(role.role for role in found.uncounted)}" if found.uncounted else ""
    for device in ("gpu", "cpu"):
        if size := total(found.memory, device):
            without = f"without libraries, which take 0.5 GiB a process{missing}"
            rows.append((f"memory, all on {device}s", _gib(size), without))
    return rows


def _fullest_row(gpu: FullestGpu) -> tuple[str, str, str]:
    """Who is on it; what vLLM takes; how large a GPU has to be; what this machine's has."""
    count = Counter(role.role for role in gpu.roles)
    size = {role.role: _gib(role.total) for role in gpu.roles}
    each = [f"{f'{number} x ' if number > 1 else ''}{name} {size[name]}" for name, number in count.items()]
    said = [f"of {gpu.gpus}: {' + '.join(each)}"]
    if gpu.claimed:
        enough = (
            f"so it takes one of {_gib(round(gpu.smallest))} or more"
            if math.isfinite(gpu.smallest)
            else "which leaves nothing to the others: lower rollout.vllm.gpu_memory_utilization"
        )
        said.append(f"vLLM takes {gpu.claimed:.0%} of it whatever it needs (gpu_memory_utilization), {enough}")
    if gpu.sleeping:
        said.append(f"{_gib(gpu.while_learning)} while engines sleep and the learner works")
    if (here := gpu_memory()) is not None:
        said.append(f"this machine's has {_gib(here[1])}")
    return ("memory, the fullest GPU", _gib(gpu.bytes), "; ".join(said))


def _batches(found: Estimate, config: RunConfig) -> str:
    duels = config.loop.batch_size if found.calibration is None else found.calibration.duels
    if duels >= config.loop.batch_size:
        return "expected of this agent"
    return f"expected of this agent, which found {duels:.1f} pairs in a batch of {config.loop.batch_size}"


def _trained(shape: ModelShape, config: RunConfig) -> str:
    rank = config.learner.lora.rank
    return f"of which {_short(shape.adapters(rank))} more are adapters, and trained" if rank else "all trained"


def _time_rows(found: Estimate) -> list[tuple[str, str, str]]:
    rows = [(f"time of labelling, {oracle.section}", _label_time(oracle), oracle.how) for oracle in found.labelling]
    if found.calibration is None or found.seconds is None:
        return [*rows, ("time", "not known", "--calibrate runs a few batches here, and buys nothing")]
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in found.calibration.seconds.items())
    missing = [oracle.section for oracle in found.labelling if oracle.training is None]
    least = any(oracle.at_least for oracle in found.labelling)
    without = f", without the labelling of {' and '.join(missing)}" if missing else ""
    return [
        ("seconds by stage", stages, "one batch and one evaluation, by one process"),
        *rows,
        ("time", ("at least " if least else "") + _duration(found.seconds), f"on machines like this{without}"),
    ]


def _label_time(oracle: LabelTime) -> str:
    if oracle.training is None or oracle.evaluation is None:
        return "not counted"
    return ("at least " if oracle.at_least else "") + _duration(oracle.training + oracle.evaluation)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _short(number: float) -> str:
    """Three digits and a unit.

    >>> _short(1234), _short(2_500_000), _short(12)
    ('1.23k', '2.50M', '12')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number / size >= 100 else f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
