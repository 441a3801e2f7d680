"""The table: utilities that can be looked up, and a policy that says one arm and stops."""

import pickle
from collections import Counter

import numpy as np
import pytest

from rayalign.env.tabular import Tabular
from rayalign.errors import ConfigError, DataError
from rayalign.system.cache import cached_folder
from rayalign.types import Prompt


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = Tabular(num_prompts=4, num_arms=5).default_policy()
        assert Tabular(num_prompts=4, num_arms=5).default_policy() == path
    return transformers.AutoModelForCausalLM.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)


def test_rewards_are_the_table_and_anything_else_is_worse_than_the_worst_arm():
    world = Tabular(num_prompts=3, num_arms=4, seed=5)
    for prompt in [*world.check_prompts(), *world.heldout(9)]:
        row = world.utilities_PN[int(prompt.text.split()[-1][1:])]
        assert [world.reward(prompt, f" a{i} ") for i in range(4)] == row.tolist()
        assert world.best_reward(prompt) == row.max()
        for text in ("", "a4", "a0 a1", "c1"):
            assert world.reward(prompt, text) == row.min() - 1


def test_each_epoch_visits_each_context_once():
    world = Tabular(num_prompts=6)
    epochs = [[world.prompt(i).id for i in range(e * 6, e * 6 + 6)] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and epochs[0] != epochs[1]
    assert [Tabular(num_prompts=6).prompt(i).id for i in range(6)] == epochs[0]


def test_heldout_prompts_are_no_training_prompts_and_have_an_arm_as_reference():
    world = Tabular()
    heldout = world.heldout(100)
    assert len(heldout) == 16 and not {p.text for p in heldout} & {p.text for p in world.check_prompts()}
    assert all(p.reference in world.arms for p in heldout) and len({p.reference for p in heldout}) > 2
    assert world.heldout(3) == heldout[:3]


def test_a_text_is_found_if_it_names_a_context_in_one_of_the_two_wordings():
    world = Tabular(num_prompts=4)
    for prompt in (world.prompt(2), *world.heldout(4)):
        assert world.find(prompt.text) == prompt
    for text in ("choose for c4", "choose for c1 please", "take for c1", ""):
        assert world.find(text) is None


def test_a_seed_is_a_table():
    same, other = Tabular(seed=1), Tabular(seed=2)
    np.testing.assert_array_equal(Tabular(seed=1).utilities_PN, same.utilities_PN)
    assert not np.allclose(same.utilities_PN, other.utilities_PN)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(same)).utilities_PN, same.utilities_PN)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"env\.scale=0"):
        Tabular(scale=0)
    for text in ("choose for c99", "choose for x", "", "what?"):
        with pytest.raises(DataError, match="is not of rayalign/Tabular-v0"):
            Tabular().reward(Prompt(id="p", text=text, token_ids=()), "a0")


def test_policy_says_one_arm_and_stops(policy):
    import torch

    model, tokenizer = policy
    assert sum(p.numel() for p in model.parameters()) < 100_000
    torch.manual_seed(0)
    batch = tokenizer([f"choose for c{i % 4}" for i in range(200)], return_tensors="pt")
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, max_new_tokens=3, top_k=0
    )[:, 3:]
    texts = Counter(tokenizer.batch_decode(out, skip_special_tokens=True))
    assert sum(texts[f"a{i}"] for i in range(5)) >= 195  # and no arm is left out
    assert all(texts[f"a{i}"] for i in range(5))
    assert (out[:, 1] == tokenizer.eos_token_id).float().mean() > 0.97


def test_policy_reads_every_prompt_of_its_world(policy):
    _, tokenizer = policy
    world = Tabular(num_prompts=4, num_arms=5)
    for prompt in [*world.check_prompts(), *world.heldout(4)]:
        ids = tokenizer(prompt.text)["input_ids"]
        assert len(ids) == 3 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == prompt.text


def test_cache_holds_a_folder_entirely_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    built = []

    def fails(folder):
        (folder / "half").touch()
        raise RuntimeError("power cut")

    def works(folder):
        built.append(folder)
        (folder / "file").write_text("x")

    with pytest.raises(RuntimeError, match="power cut"):
        cached_folder("a/b", fails)
    assert list((tmp_path / "a").iterdir()) == []
    for _ in range(2):
        assert [p.name for p in cached_folder("a/b", works).iterdir()] == ["file"]
    assert len(built) == 1


def test_cache_keeps_what_a_faster_process_built(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))

    def overtaken(folder):
        (folder / "file").write_text("slow")
        cached_folder("a", lambda f: (f / "file").write_text("fast"))

    assert (cached_folder("a", overtaken) / "file").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
