"""TinyWorld: the reward against hand sums and brute force, the prompts against their promises, the shipped models."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from rayalign.env.tinyworld import TinyWorld
from rayalign.env.tinyworld.build import ASSETS, backbone_dir, build_backbone, build_policy, policy_dir
from rayalign.env.tinyworld.language import ITEMS, MAX_WORDS, parse_prompt, render_prompt, words
from rayalign.env.tinyworld.reward import hidden_weights, score
from rayalign.env.tinyworld.tokenizer import make_tokenizer
from rayalign.env.tinyworld.world import is_heldout
from rayalign.errors import ConfigError, DataError
from rayalign.types import Prompt

TEXT = "Report: rusty hinge, wet rope, loose bolt, bent axle. Summary:"


def prompt_of(text: str) -> Prompt:
    return Prompt(id="p", text=text, token_ids=())


def table(**weights: float) -> np.ndarray:
    made = np.zeros((48, 6))
    for item, weight in weights.items():
        made[ITEMS.index(item)] = weight
    return made


W = table(hinge=1.0, rope=-0.5, bolt=0.7, axle=0.02)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("", 0.0),
        ("hinge bolt", 1.0 + 0.7 - 2 * 0.05),
        ("bolt hinge", 1.0 + 0.7 - 2 * 0.05 - 0.2),  # out of order, once
        ("hinge hinge", 1.0 - 0.5 - 2 * 0.05),  # the second is a repeat and earns nothing
        ("hinge pump", 1.0 - 0.8 - 2 * 0.05),  # no pump in the report
        ("please hinge thanks", 1.0 - 2 * 0.5 - 3 * 0.05),
        ("Hinge, bolt.", 1.7 - 2 * 0.5 - 4 * 0.05),  # punctuation is stray, capitals are not
        ("hinge rope bolt axle", 1.0 - 0.5 + 0.7 + 0.02 - 4 * 0.05),
        ("axle bolt rope hinge", 1.0 - 0.5 + 0.7 + 0.02 - 4 * 0.05 - 3 * 0.2),
        ("rusty", -0.55),  # an attribute is no item
        ("<|eos|>", -5 * 0.55),
        ("请检查 \x00 \u202e", -2 * 0.55 - 0.55),
        (" ".join(["the"] * 13), -13 * 0.55),
        (" ".join(["the"] * 14), -14 * 0.55 - 1.0),  # as long as a response that was cut off
        (" ".join(["the"] * 20), -20 * 0.55 - 1.0),
    ],
)
def test_reward_is_the_hand_sum(response: str, reward: float) -> None:
    assert score(W, parse_prompt(TEXT), words(response)) == pytest.approx(reward)


def test_best_response_beats_every_other_of_up_to_all_items_and_one_slip() -> None:
    """Brute force: all ordered selections from the report's items, an invented one, and a stray word."""
    for seed in range(3):
        world = TinyWorld(seed)
        short = [p for p in map(world.prompt, range(60)) if len(parse_prompt(p.text)) <= 5][:6]
        for prompt in short:
            own = [ITEMS[item] for item, _ in parse_prompt(prompt.text)]
            alphabet = [*own, next(word for word in ITEMS if word not in own), "please"]
            everything = itertools.chain.from_iterable(itertools.permutations(alphabet, n) for n in range(6))
            brute = max(world.reward(prompt, " ".join(response)) for response in everything)
            assert world.best_reward(prompt) == pytest.approx(brute)


def test_best_response_reaches_the_best_reward_and_no_random_edit_improves_it() -> None:
    rng, world = np.random.default_rng(0), TinyWorld(1)
    for index in range(200):
        prompt = world.prompt(index)
        best = world.best_response(prompt)
        assert world.reward(prompt, best) == pytest.approx(world.best_reward(prompt))
        edited = best.split()
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(edited) + 1))
            own = [ITEMS[item] for item, _ in parse_prompt(prompt.text)]
            edited[place : place + int(rng.integers(2))] = [own[int(rng.integers(len(own)))]]
        assert world.reward(prompt, " ".join(edited)) <= world.best_reward(prompt) + 1e-12


def test_prompts_are_a_function_of_seed_and_index_alone() -> None:
    there = pickle.loads(pickle.dumps(TinyWorld(3)))
    assert [there.prompt(i) for i in (7, 0, 7)] == [TinyWorld(3).prompt(i) for i in (7, 0, 7)]
    assert TinyWorld(3).prompt(0).text != TinyWorld(4).prompt(0).text
    assert TinyWorld(3).heldout(20) == TinyWorld(3).heldout(50)[:20]


def test_prompts_list_four_to_eight_different_items_and_parse_back() -> None:
    sizes = set()
    for index in range(300):
        text = TinyWorld(0).prompt(index).text
        listing = parse_prompt(text)
        assert render_prompt(listing) == text and len({item for item, _ in listing}) == len(listing)
        sizes.add(len(listing))
    assert sizes == {4, 5, 6, 7, 8}


def test_heldout_prompts_are_never_training_prompts_of_any_world() -> None:
    heldout = TinyWorld(0).heldout(300)
    assert len({prompt.text for prompt in heldout}) == 300
    assert all(is_heldout(prompt.text) for prompt in heldout)
    assert not any(is_heldout(TinyWorld(seed).prompt(i).text) for seed in range(3) for i in range(300))


def test_references_are_good_but_leave_room() -> None:
    world = TinyWorld(2)
    heldout = world.heldout(300)
    reached = np.mean([world.reward(prompt, prompt.reference) for prompt in heldout])
    best = np.mean([world.best_reward(prompt) for prompt in heldout])
    assert 0.1 * best < reached < 0.7 * best
    assert all(len(words(prompt.reference)) < MAX_WORDS for prompt in heldout)


def test_worlds_differ_in_their_weights_and_the_weights_stay_in_their_range() -> None:
    first, second = hidden_weights(0), hidden_weights(1)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.5
    assert np.abs(first).max() <= 1.5 and 0.4 < (first > 0.05).mean() < 0.7


def test_a_foreign_prompt_is_a_clear_error() -> None:
    for text in ("", "Write a haiku.", "Report: rusty dragon. Summary:", "Report: rusty hinge, wet hinge. Summary:"):
        with pytest.raises(DataError, match="not a TinyWorld prompt"):
            TinyWorld(0).reward(prompt_of(text), "hinge")


@pytest.mark.parametrize("seed", [-1, 10_000, 1.5, True, "0"])
def test_a_seed_that_is_no_world_is_a_clear_error(seed: object) -> None:
    with pytest.raises(ConfigError, match="not a TinyWorld"):
        TinyWorld(seed)


def test_text_survives_encoding_and_decoding() -> None:
    tokenizer, world = make_tokenizer(), TinyWorld(0)
    for prompt in world.heldout(100):
        for text in (prompt.text, prompt.reference, f"{prompt.text} {world.best_response(prompt)}".rstrip()):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
        assert len(tokenizer(prompt.text)["input_ids"]) == 2 * len(parse_prompt(prompt.text)) + 2


def test_shipped_policy_loads_by_the_usual_names_and_has_learned_the_task() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = TinyWorld(0)
    folder = world.default_policy()
    assert folder.startswith(str(ASSETS))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.padding_side == "left" and tokenizer.eos_token_id == model.config.eos_token_id
    heldout = world.heldout(100)
    batch = tokenizer([p.text for p in heldout], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        out = model.generate(**batch, do_sample=False, max_new_tokens=MAX_WORDS)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    valid = [
        {word for word in words(text)} <= set(words(prompt.text)) for prompt, text in zip(heldout, texts, strict=True)
    ]
    assert np.mean(valid) > 0.6  # the rest is polite, or invents
    mine = np.array([world.reward(prompt, text) for prompt, text in zip(heldout, texts, strict=True)])
    theirs = np.array([world.reward(prompt, prompt.reference) for prompt in heldout])
    assert 0.2 < ((mine > theirs) + 0.5 * (mine == theirs)).mean() < 0.6
    assert mine.mean() > 0


def test_builds_are_reproducible_and_leave_nothing_but_the_model(tmp_path) -> None:
    from safetensors.torch import load_file

    for name in ("a", "b"):
        build_policy(5, tmp_path / f"policy-{name}", steps=(2, 2))
        build_backbone(tmp_path / f"backbone-{name}", steps=3)
    for kind in ("policy", "backbone"):
        first, second = (load_file(tmp_path / f"{kind}-{name}" / "model.safetensors") for name in "ab")
        assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    build_policy(6, tmp_path / "policy-a", steps=(1, 1))  # replaces what is there
    assert not load_file(tmp_path / "policy-a" / "model.safetensors")["lm_head.weight"].equal(
        load_file(tmp_path / "policy-b" / "model.safetensors")["lm_head.weight"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone-a", "backbone-b", "policy-a", "policy-b"]


def test_a_world_that_is_not_shipped_is_built_once_into_the_cache(tmp_path, monkeypatch, capsys) -> None:
    from rayalign.env.tinyworld import pretraining

    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(pretraining, "POLICY_STEPS", (1, 1))
    first, said = policy_dir(77), capsys.readouterr().err
    assert tmp_path in first.parents and "rayalign: building TinyWorld's policy_77" in said
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert policy_dir(77) == first and (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert "building" not in capsys.readouterr().err


def test_what_is_shipped_is_small() -> None:
    assert backbone_dir().parent == ASSETS
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 6e6


def test_any_report_is_found_and_nothing_else_is() -> None:
    world = TinyWorld(seed=1)
    found = world.find(world.prompt(3).text)
    assert found is not None and found.text == world.prompt(3).text
    assert world.best_reward(found) == world.best_reward(world.prompt(3))
    assert world.find(found.text) == found
    assert world.find("Report: rusty hinge. Summary:").id != found.id
    assert world.find("What is the capital of France?") is None
