"""EleutherAI's `lm-eval` harness over an aligned policy, where it is installed: a command in its own process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayalign.after.aligned import Aligned
from rayalign.errors import ConfigError, DataError, RayalignError
from rayalign.rollout.encode import load_tokenizer


def harness_command(
    aligned: Aligned,
    tasks: str,
    out: str | Path,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """What is run: `lm-eval run --model hf` over the policy's directory, through its chat template where it has one.

    Args:
        aligned: the policy.
        tasks: comma-separated names of the harness's tasks.
        out: directory of its results.
        include_path: directory of tasks of your own, as its YAML files.
        limit: examples per task; None takes all.
        extra: more of its options, as they are (`["--num_fewshot", "5"]`).
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--harness needs names of tasks, e.g. --harness ifeval; `lm-eval ls tasks` lists them.")
    rollout = aligned.rollout
    model: dict[str, Any] = {"pretrained": aligned.policy, "dtype": rollout.dtype}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps(model)]
    command += ["--tasks", *names, "--output_path", str(out)]
    command += ["--device", "cuda" if rollout.gpus_per_replica > 0 else "cpu"]
    if getattr(load_tokenizer(aligned.policy), "chat_template", None) and rollout.chat != "never":
        command.append("--apply_chat_template")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise DataError(f"include_path={str(include_path)!r} is no directory; name the one with your tasks' files.")
        command += ["--include_path", str(include_path)]
    if limit is not None:
        command += ["--limit", str(limit)]
    return [*command, *extra]


def run_harness(
    what: str | Path,
    tasks: str,
    out: str | Path,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    extra: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """Run the harness and wait for it; returns the directory of its results, `out`.

    Raises `ConfigError` if it is not installed, and `RayalignError` if it fails; what it says goes to the terminal.
    """
    aligned = Aligned.find(what, changes)
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise DataError(f"out={str(out)!r} is there already; name a new or an empty directory.")
    command = harness_command(aligned, tasks, out, include_path=include_path, limit=limit, extra=extra)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs lm-eval, which is not installed. Run: pip install 'rayalign[harness]'")
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RayalignError(f"lm-eval ended with exit code {done.returncode}; it says why above.")
    return Path(out)
