"""Kinds of oracle: what the loop and the service ask of each, and how one's own is added."""

from pathlib import Path

import pytest

import rayalign
from rayalign.errors import ConfigError
from rayalign.loop.preparation import _named_oracle, prepare
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import ORACLES, OracleKind, import_attribute, oracle_kind
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Verdict


class Coin:
    """Thinks that every duel is a tie."""

    id = "coin:0.5"

    def judge(self, duels):
        return [Verdict(duel_id=duel.id, probability=0.5) for duel in duels]


def make_coin(config, world):
    return Coin()


COIN = OracleKind(make=make_coin, defaults={"oracle.labels": "deterministic"})


@pytest.mark.parametrize("name", ORACLES)
def test_every_kind_can_be_imported_and_its_defaults_are_settings(name):
    kind = oracle_kind(name)
    plan = prepare("passive", "rayalign/Tabular-v0", None, "run", None, dict(kind.defaults))
    assert plan.config.oracle.kind == "world"
    assert import_attribute(kind.deployment, "deployment")
    config = kind.complete(OracleConfig(kind=name), Path("/somewhere"))
    assert config.kind == name and isinstance(kind.notice(config), str)


def test_a_kind_of_ones_own_is_an_import_path_or_an_entry(monkeypatch):
    assert oracle_kind(f"{__name__}:COIN").make is make_coin
    monkeypatch.setitem(ORACLES, "coin", COIN)
    assert oracle_factory(OracleConfig(kind="coin"))().id == "coin:0.5"
    plan = prepare("passive", "rayalign/Tabular-v0", None, "run", "coin", {})
    assert (plan.config.oracle.kind, plan.config.oracle.labels, plan.oracle) == ("coin", "deterministic", None)
    plan = prepare("passive", "rayalign/Tabular-v0", None, "run", "coin", {"oracle.labels": "bernoulli"})
    assert plan.config.oracle.labels == "bernoulli", "what the user says comes last"


def test_what_is_no_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"oracle\.kind='math:pi' is a float, not a .*OracleKind"):
        oracle_kind("math:pi")
    with pytest.raises(ConfigError, match=r"oracle='humans' is neither a kind.* Did you mean 'human'"):
        rayalign.run("passive", "rayalign/Tabular-v0", oracle="humans")
    with pytest.raises(ConfigError, match=r"says oracle\.kind=human, but oracle\.kind=judge is set"):
        _named_oracle({"oracle.kind": "judge"}, "human")


def test_an_import_path_given_as_the_oracle_is_a_function_by_name():
    given, oracle = _named_oracle({"loop.seed": 1}, "math:dist")
    assert given == {"loop.seed": 1, "oracle.kind": "function", "oracle.target": "math:dist"} and oracle is None


def test_a_kind_that_is_wrong_is_refused_before_the_run_has_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"oracle\.kind='reward_model' needs oracle\.target"):
        rayalign.run("passive", "rayalign/Tabular-v0", run_dir=tmp_path / "run", oracle="reward_model")
    assert not (tmp_path / "run").exists()
