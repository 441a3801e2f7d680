"""A calibration that does not fit is refused before anything is loaded; an estimate needs no weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from model_hub import serve_hub
from model_shapes import TINY
from typer.testing import CliRunner

from rayalign.cli import app
from rayalign.estimate.room import in_one_process
from rayalign.learner.config import LearnerConfig
from rayalign.runs.config import RunConfig
from rayalign.system.memory import free_memory


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A policy of 70 billion parameters, of which there are only config and tokenizer."""
    folder = tmp_path / "huge"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "head_dim": 128}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_estimate_needs_no_weights_and_a_calibration_that_does_not_fit_says_how_much(huge: Path) -> None:
    arguments = ["estimate", "passive", "--policy", str(huge)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    # 80 x (2 x 8192^2 + 2 x 8192 x 1024 + 3 x 8192 x 28672 + 2 x 8192), embedding and head, the last norm
    assert "70.55G" in done.stdout
    refused = CliRunner().invoke(app, [*arguments, "--calibrate"])
    assert refused.exit_code == 2, refused.output
    said = " ".join(refused.stderr.split())
    needed = float(said.partition("needs about ")[2].split()[0])
    assert needed > 5 * 4 * 70.5e9 / 2**30  # weights, gradients, two moments, the reference, and the engine's
    assert "GiB free. Leave --calibrate out, calibrate with a smaller policy" in said


GROUPS = [
    (("memory.max", "memory.current"), "inactive_file"),
    (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"), "total_inactive_file"),
]


@pytest.mark.parametrize(("names", "cached"), GROUPS)
def test_what_the_kernel_gives_back_on_demand_is_free(tmp_path: Path, names: tuple[str, str], cached: str) -> None:
    mib = 2**20
    for name, number in zip(names, (16 * mib, 15 * mib), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{number}\n")
    (tmp_path / names[0]).with_name("memory.stat").write_text(f"anon 1\n{cached} {10 * mib}\n")
    assert free_memory(tmp_path) == 11 * mib
    assert free_memory(tmp_path / "nowhere") > 11 * mib


def test_one_process_trains_plainly_whatever_the_run_shards_and_offloads() -> None:
    many = {"strategy": "zero3", "num_workers": 4, "offload": True}
    config = replace(RunConfig(), learner=replace(LearnerConfig(), **many))  # type: ignore[arg-type]
    learner = in_one_process(config).learner
    assert (learner.strategy, learner.num_workers, learner.offload) == ("plain", 1, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_calibration_of_gpu_roles_needs_a_gpu() -> None:
    done = CliRunner().invoke(app, ["estimate", "passive", "--calibrate", "--set", "learner.gpus_per_worker=1"])
    assert done.exit_code == 2, done.output
    assert "--calibrate runs learner" in done.stderr and "this machine has none" in " ".join(done.stderr.split())


def test_memory_that_is_free_is_not_more_than_the_machine_has() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_an_estimate_by_the_policys_id_fetches_no_weights(tmp_path: Path) -> None:
    """Neither those of the policy, nor those of the reward model and the posterior's backbone."""
    settings = ["oracle.kind=reward_model", "oracle.target=tiny/judge", "agent.features.backbone=tiny/backbone"]
    changes = [word for setting in settings for word in ("--set", setting)]
    arguments = ["estimate", "sea", "--policy", "tiny/policy", *changes]
    models = {"tiny/policy": TINY, "tiny/judge": TINY, "tiny/backbone": TINY}
    with serve_hub(models) as (address, fetched):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "rayalign.cli", *arguments],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    for role in ("oracle", "posterior"):
        (line,) = [line for line in done.stdout.splitlines() if f"memory, {role} " in line]
        assert "(cpu)" in line, line
    assert {f"{name}/config.json" for name in models} <= set(fetched)
    assert not [name for name in fetched if name.endswith((".safetensors", ".bin"))]
