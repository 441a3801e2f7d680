"""Files of runs that nobody ran, with numbers that tests know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rayalign.runs.logs import RunLog

HOSTILE = "</pre><script>alert('x')</script>\"'&amp; {{ 7*7 }}"
"""What a model could answer to break out of a page."""


def write_run(
    folder: Path, agent: str = "sea", seed: int = 0, last: float = 0.7, finished: bool = True, **agent_settings: Any
) -> Path:
    """A run of 10 batches of 10 labels whose win rate goes linearly from 0.4 to `last`."""
    log = RunLog(folder)
    settings = {
        "agent_name": agent,
        "env": "rayalign/TinyWorld-v0",
        "env_kwargs": {"seed": 10 + seed},
        "policy": f"world-{10 + seed}",
        "run_dir": str(folder),
        "agent": {"beta": 0.1, **agent_settings},
        "loop": {"budget": 100, "seed": seed, "max_staleness": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for batch in range(10):
        version = max(0, batch - 1)
        log.metrics(
            {
                "batch": batch,
                "labels": 10 * (batch + 1),
                "time": 100.0 + 2 * batch,
                "version": version,
                "staleness": batch - version,
                "regret_reward": 2.0 - 0.1 * batch,
                "regret_preference": 0.9 - 0.05 * batch,
                "seconds/generate": 0.5,
                "seconds/label": 0.25,
            }
        )
        log.metrics({"batch": batch, "learner/loss": 0.7 - 0.01 * batch, "learner/accuracy": 0.5})
        log.timeline("collector", "generate", batch, batch, batch + 0.8)
        log.timeline("learner", "step", batch, batch + 1, batch + 1.5)
    for version, labels in enumerate((0, 50, 100)):
        rate = 0.4 + (last - 0.4) * labels / 100
        log.evaluation(
            {
                "labels": labels,
                "version": version,
                "batch": version,
                "win_rate": rate,
                "stderr": 0.05,
                "num_prompts": 100,
                "regret_mean": 2 - labels / 100,
                "against": "reference",
            }
        )
        with (folder / "samples.jsonl").open("a") as file:
            row = {"labels": labels, "prompt": HOSTILE, "response": f"answer {labels} {HOSTILE}", "reference": "theirs"}
            file.write(json.dumps(row) + "\n")
    if finished:
        (folder / "result.json").write_text(json.dumps({"labels_spent": 100, "labels_spent_on_evaluation": 300}))
    log.close()
    return folder
