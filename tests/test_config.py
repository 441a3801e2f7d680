"""Settings: changed by dotted names, checked by their types, kept as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayalign import config
from rayalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters."""

    rank: int = 0
    """Rank; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Learns."""

    strategy: str = "plain"
    """One of plain, ddp."""
    num_workers: int = 1
    """Workers."""
    rate: float = 1e-3
    """Step size,
    over two lines."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates."""
    offload: bool = False
    """Off the device."""
    lora: Lora = field(default_factory=Lora)
    """Adapters."""

    def __post_init__(self) -> None:
        if self.strategy == "plain" and self.num_workers != 1:
            raise ConfigError("learner.num_workers needs learner.strategy=ddp")


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Base."""

    beta: float = 0.1
    """Strength."""


@dataclass(frozen=True, kw_only=True)
class Sea(Agent):
    """Derived."""

    members: int = 20
    """Ensemble size."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of it."""

    agent: Agent = field(default_factory=Agent)
    """Its class depends on the run."""
    learner: Learner = field(default_factory=Learner)
    """Learner."""
    judge: Learner | None = None
    """Optional section."""
    policy: str | None = None
    """Optional text."""
    name: str = "run"
    """Text."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Free form."""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learner.num_workers", "1", 1),
        ("learner.rate", "5e-7", 5e-7),
        ("learner.rate", "1", 1.0),
        ("learner.offload", "true", True),
        ("learner.offload", "off", False),
        ("learner.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("learner.betas", "0.5, 0.6", (0.5, 0.6)),
        ("learner.betas", "(0.5, 1e-2)", (0.5, 0.01)),
        ("policy", "null", None),
        ("policy", "None", None),
        ("policy", "10", "10"),
        ("policy", "a # b", "a # b"),
        ("policy", "", ""),
        ("name", "null", "null"),
        ("name", "true", "true"),
        ("name", "2020-01-01", "2020-01-01"),
        ("name", "{a: ", "{a: "),
        ("env_kwargs", "{seed: 3}", {"seed": 3}),
        ("env_kwargs.seed", "3", {"seed": 3}),
    ],
)
def test_text_becomes_what_the_type_of_its_field_says(name: str, text: str, value: Any) -> None:
    changed: Any = config.apply(Run(), {name: text})
    for part in name.removesuffix(".seed").split("."):
        changed = getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learner.num_workers", np.int64(1)),
        ("learner.rate", np.float32(0.5)),
        ("name", Path("a/b")),
        ("learner.lora", Lora(rank=2)),
    ],
)
def test_python_objects_are_taken_as_they_are(name: str, value: Any) -> None:
    assert config.apply(Run(), {name: value})


def test_dotted_and_nested_names_mix_and_the_later_one_wins() -> None:
    changed = config.apply(
        Run(), {"learner": {"lora.rank": 4, "rate": 0.5}, "learner.rate": 0.25, "learner.lora": {"rank": 8}}
    )
    assert changed.learner.rate == 0.25
    assert changed.learner.lora.rank == 8
    assert changed.learner.betas == (0.9, 0.95)


def test_an_instance_replaces_its_section_and_later_names_change_the_instance() -> None:
    changed = config.apply(Run(), {"learner.rate": 9.0, "learner": Learner(offload=True), "learner.lora.rank": 3})
    assert changed.learner == Learner(offload=True, lora=Lora(rank=3))


def test_fields_that_are_checked_together_are_changed_together() -> None:
    changed = config.apply(Run(), {"learner.num_workers": 2, "learner.strategy": "ddp"})
    assert (changed.learner.num_workers, changed.learner.strategy) == (2, "ddp")


def test_errors_of_a_section_pass_through() -> None:
    with pytest.raises(ConfigError, match=r"learner\.num_workers needs learner\.strategy=ddp"):
        config.apply(Run(), {"learner.num_workers": 2})


def test_an_optional_section_comes_to_life_when_a_field_of_it_is_named() -> None:
    changed = config.apply(Run(), {"judge.rate": 2})
    assert changed.judge == Learner(rate=2.0)
    assert config.apply(changed, {"judge": "null"}).judge is None


def test_a_section_of_a_derived_class_keeps_its_class_and_its_fields() -> None:
    changed = config.apply(Run(agent=Sea()), {"agent.members": "5"})
    assert changed.agent == Sea(members=5)


def test_nothing_is_changed_in_place() -> None:
    run = Run()
    config.apply(run, {"learner.rate": 0.5, "env_kwargs.seed": 1})
    assert run == Run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner.rat": 1}, r"'learner\.rat' is not a setting\. Did you mean 'learner\.rate'"),
        ({"rank": 1}, r"Did you mean 'learner\.lora\.rank'"),
        ({"lerner.rate": 1}, r"Did you mean 'learner\.rate'"),
        ({"learner": {"lora": {"rnk": 1}}}, r"'learner\.lora\.rnk' is not a setting.*'learner\.lora\.rank'"),
        ({"learner.rate.x": 1}, r"'learner\.rate\.x' is not a setting"),
        ({"zzz": 1}, r"`rayalign settings` lists all names"),
        ({"learner.num_workers": "ten"}, r"learner\.num_workers='ten' must be int: .*valid integer"),
        ({"learner.num_workers": 1.5}, r"learner\.num_workers=1\.5 must be int"),
        ({"learner.num_workers": "true"}, r"learner\.num_workers='true' must be int: true and false are not numbers"),
        ({"learner.betas": "0.9"}, r"learner\.betas='0\.9' must be tuple\[float, float\]"),
        ({"policy": 3}, r"policy=3 must be str \| None"),
        ({"learner": 3}, r"learner=3 is a section: name one of its fields \(learner\.strategy"),
        ({"learner": None}, r"learner=None is a section"),
        ({"agent.members": 3}, r"'agent\.members' is not a setting"),
    ],
)
def test_a_wrong_name_or_value_is_told_with_the_way_out(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.apply(Run(), changes)


def test_describe_lists_every_leaf_with_type_default_and_help() -> None:
    rows = {row.name: row for row in config.describe(Run)}
    assert rows["learner.rate"] == config.Setting("learner.rate", "float", 1e-3, "Step size, over two lines.")
    assert rows["policy"].type == "str | None"
    assert rows["judge.lora.rank"].default == 0
    assert "learner" not in rows
    assert "learner.lora" not in rows


def test_describe_of_an_instance_shows_its_values_and_inherited_docs() -> None:
    rows = {row.name: row for row in config.describe(Run(agent=Sea(members=5)))}
    assert rows["agent.members"].default == 5
    assert rows["agent.beta"].help == "Strength."


def test_yaml_round_trip_keeps_every_value_even_texts_that_look_like_others() -> None:
    run = Run(
        agent=Sea(members=3),
        learner=Learner(strategy="ddp", num_workers=2, rate=5e-7, betas=(0.1, 0.2)),
        judge=Learner(offload=True),
        policy="null",
        name="1e-3",
        env_kwargs={"seed": 3, "a.b": "true", "list": [1, 2]},
    )
    assert config.from_yaml(Run(agent=Sea()), config.to_yaml(run)) == run
    assert config.from_yaml(Run, config.to_yaml(Run())) == Run()


def test_a_value_that_yaml_cannot_hold_is_named() -> None:
    with pytest.raises(ConfigError, match=r"env_kwargs\.f=.*can't be written"):
        config.to_yaml(Run(env_kwargs={"f": print}))


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_settings_that_are_no_mapping_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="settings"):
        config.read_yaml(text)


def test_diff_names_the_fields_that_differ_and_only_those() -> None:
    a = Run()
    b = config.apply(a, {"learner.rate": 0.5, "judge.rate": 1.0})
    lines = config.diff(a, b)
    assert lines[0] == "learner.rate: 0.001 -> 0.5"
    assert "judge: None -> <absent>" in lines
    assert config.diff(b, b) == []
    assert config.diff(Run(agent=Sea()), Run()) == ["agent.members: 20 -> <absent>"]


def test_flatten_of_changes_and_of_an_instance_use_the_same_names() -> None:
    assert config.flatten({"learner": {"lora": {"rank": 2}}, "agent.beta": 1}) == {
        "learner.lora.rank": 2,
        "agent.beta": 1,
    }
    values = config.flatten(Run())
    assert values["learner.lora.rank"] == 0
    assert values["judge"] is None
