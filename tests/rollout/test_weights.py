"""Weights that travel and rest: packing, checksums, and the copy on disk."""

import dataclasses
import pickle

import pytest
import torch

from rayalign.errors import DataError, WeightSyncError
from rayalign.rollout.weights import checksum, copy_into, load_weights, pack, save_weights


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
    }


def test_packing_and_unpacking_changes_nothing_bfloat16_included():
    weights = pickle.loads(pickle.dumps(pack(3, state())))
    for name, tensor in weights.tensors():
        assert tensor.dtype == state()[name].dtype and torch.equal(tensor, state()[name])
    assert weights.nbytes == 3 * 4 * 4 + 5 * 2 + 4
    assert checksum(dict(weights.tensors())) == weights.checksum


def test_the_checksum_sees_names_types_shapes_and_every_value_but_not_the_order():
    base = checksum(state())
    assert checksum(dict(reversed(state().items()))) == base
    changed = state()
    changed["a"][2, 3] = torch.nextafter(changed["a"][2, 3], torch.tensor(10.0))
    others = [
        changed,
        state() | {"a": state()["a"].reshape(4, 3)},
        state() | {"b": state()["b"].float()},
        {name.upper(): tensor for name, tensor in state().items()},
        {name: tensor for name, tensor in state().items() if name != "scalar"},
    ]
    assert len({base, *map(checksum, others)}) == 6


def test_weights_packed_once_do_not_follow_the_model():
    live = state()
    weights = pack(1, live)
    live["a"].zero_()
    assert torch.equal(dict(weights.tensors())["a"], state()["a"])


def test_what_is_saved_is_what_is_loaded_and_replaces_what_was_there(tmp_path):
    for version in (1, 2):
        weights = pack(version, state(version), adapter={"r": 4, "target_modules": {"q", "k"}})
        save_weights(weights, tmp_path / "pinned")
    found = load_weights(tmp_path / "pinned")
    assert (found.version, found.checksum) == (2, weights.checksum)
    assert found.adapter == {"r": 4, "target_modules": ["k", "q"]}
    assert [p.name for p in tmp_path.iterdir()] == ["pinned"]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="does not hold saved weights"):
        load_weights(tmp_path / "pinned")
    save_weights(dataclasses.replace(pack(1, state()), checksum="another"), tmp_path / "pinned")
    with pytest.raises(DataError, match="checksum is not the one they were saved with"):
        load_weights(tmp_path / "pinned")


def test_tied_tensors_need_one_name_and_a_forgotten_one_is_an_error():
    shared = torch.zeros(2)
    live = {"embed": shared, "head": shared, "other": torch.zeros(2)}
    copy_into(pack(1, {"embed": torch.ones(2), "other": torch.ones(2)}), live)
    assert live["head"].tolist() == [1, 1]
    with pytest.raises(WeightSyncError, match="1 tensors are missing: other"):
        copy_into(pack(1, {"head": torch.ones(2)}), live)
