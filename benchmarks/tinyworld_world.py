"""What a TinyWorld offers to an aligner: head-room, diversity of samples, and how much labels can tell.

    python benchmarks/tinyworld_world.py --worlds 0 1 2 [--out docs/results/tinyworld_world.json]

Per world, without any alignment: win rate of the initial policy's greedy responses against the references, mean
regret, the best of 20 samples, and which share of the best-of-20 gain a Bradley-Terry fit on 512 labels gets when
it picks, for several features. One core, about a minute a world.

Shapes: P prompts, N candidates, D features.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.optimize import minimize
from scipy.special import expit
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rayalign.env.tinyworld import TinyWorld
from rayalign.env.tinyworld.language import ITEMS, MAX_WORDS, parse_prompt, words
from rayalign.env.tinyworld.reward import word_terms

NUM_CANDIDATES, TEMPERATURE = 20, 0.7


@torch.inference_mode()
def sample(policy: str, texts: list[str], n: int, temperature: float, seed: int) -> list[list[str]]:
    """`n` responses a prompt; temperature 0 is greedy."""
    torch.manual_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    responses: list[list[str]] = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**batch, **how, num_return_sequences=n, max_new_tokens=MAX_WORDS)
        new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        responses += [new[i : i + n] for i in range(0, len(new), n)]
    return responses


@torch.inference_mode()
def summed_hidden_states(folder: str, texts: list[str], responses: list[list[str]]) -> np.ndarray:
    """Sum of the last hidden states over the response's tokens, end-of-sequence included: `P x N x D`."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder, padding_side="right"), AutoModel.from_pretrained(folder)
    rows = []
    for text, group in zip(texts, responses, strict=True):
        ids = [f"{text} {y}".rstrip() + (tokenizer.eos_token if len(words(y)) < MAX_WORDS else "") for y in group]
        batch = tokenizer(ids, padding=True, return_tensors="pt", return_token_type_ids=False)
        mask = batch["attention_mask"].clone()
        mask[:, : len(tokenizer(text)["input_ids"])] = 0
        rows.append((model(**batch).last_hidden_state * mask[..., None]).sum(1))
    return torch.stack(rows).double().numpy()


def bag_of_words(texts: list[str], responses: list[list[str]]) -> np.ndarray:
    """Counts of the response's words that are items, and of all words."""
    vocabulary = {word: i for i, word in enumerate(ITEMS)}
    counts = np.zeros((len(texts), len(responses[0]), len(ITEMS) + 1))
    for p, group in enumerate(responses):
        for n, response in enumerate(group):
            for word in words(response):
                counts[p, n, vocabulary.get(word, -1)] += 1
    return counts


def true_terms(texts: list[str], responses: list[list[str]]) -> np.ndarray:
    """What the reward is linear in, up to its clip: items and attributes that earn, and the known costs."""
    features = np.zeros((len(texts), len(responses[0]), len(ITEMS) + 6 + 1))
    for p, (text, group) in enumerate(zip(texts, responses, strict=True)):
        listing = parse_prompt(text)
        for n, response in enumerate(group):
            for earned, cost in word_terms(listing, words(response)):
                features[p, n, -1] += cost
                if earned is not None:
                    item, attribute = listing[earned]
                    features[p, n, [item, len(ITEMS) + attribute]] += 1
    return features


def bradley_terry(difference_BD: np.ndarray, label_B: np.ndarray, ridge: float) -> np.ndarray:
    """Weights `D` that maximise the likelihood of the labels minus `ridge / 2 * |w|^2`."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        h = difference_BD @ w
        gradient = difference_BD.T @ (expit(h) - label_B) + ridge * w
        return float(np.logaddexp(0, h).sum() - label_B @ h + ridge / 2 * w @ w), gradient

    return np.asarray(minimize(loss, np.zeros(difference_BD.shape[1]), jac=True, method="L-BFGS-B").x)


def share_of_gain(
    train_PND: np.ndarray,
    train_PN: np.ndarray,
    test_PND: np.ndarray,
    test_PN: np.ndarray,
    scale: float,
    ridge: float,
    seed: int,
) -> float:
    """Share of the best-of-N gain that the fit's arg max gets; one label per training prompt, a random pair each."""
    rng = np.random.default_rng(seed)
    deviation_D = train_PND.reshape(-1, train_PND.shape[-1]).std(0) + 1e-6
    rows = np.arange(len(train_PN))
    pairs = np.stack([rng.permutation(train_PN.shape[1])[:2] for _ in rows])
    difference_BD = (train_PND[rows, pairs[:, 0]] - train_PND[rows, pairs[:, 1]]) / deviation_D
    truth_B = train_PN[rows, pairs[:, 0]] - train_PN[rows, pairs[:, 1]]
    label_B = (rng.random(len(rows)) < expit(scale * truth_B)).astype(float)
    picked = (test_PND / deviation_D @ bradley_terry(difference_BD, label_B, ridge)).argmax(1)
    gain = test_PN[np.arange(len(test_PN)), picked].mean() - test_PN.mean()
    return float(gain / (test_PN.max(1).mean() - test_PN.mean()))


def measure(seed: int, policy: str | None, backbone: str | None, labels: int, ridge: float) -> dict[str, float]:
    """All numbers of one world."""
    world = TinyWorld(seed)
    policy, backbone = policy or world.default_policy(), backbone or world.backbone()
    heldout = world.heldout(300)
    texts = [prompt.text for prompt in heldout]
    greedy = [group[0] for group in sample(policy, texts, 1, 0.0, seed)]
    mine = np.array([world.reward(prompt, y) for prompt, y in zip(heldout, greedy, strict=True)])
    theirs = np.array([world.reward(prompt, prompt.reference or "") for prompt in heldout])
    best = np.array([world.best_reward(prompt) for prompt in heldout])

    training = [world.prompt(i) for i in range(labels)]
    samples, rewards = {}, {}
    for name, prompts in (("train", training), ("test", heldout)):
        samples[name] = sample(policy, [prompt.text for prompt in prompts], NUM_CANDIDATES, TEMPERATURE, seed + 1)
        rewards[name] = np.array(
            [[world.reward(prompt, y) for y in group] for prompt, group in zip(prompts, samples[name], strict=True)]
        )
    pair = rewards["train"][:, 0] - rewards["train"][:, 1]
    truth = expit(world.reward_scale * np.abs(pair[pair != 0]))
    result = {
        "win rate vs references": float(((mine > theirs) + 0.5 * (mine == theirs)).mean()),
        "ties": float((mine == theirs).mean()),
        "optimum's win rate": float(((best > theirs) + 0.5 * (best == theirs)).mean()),
        "mean best reward": float(best.mean()),
        "mean reward, greedy": float(mine.mean()),
        "mean reward, reference": float(theirs.mean()),
        "mean regret, greedy": float((best - mine).mean()),
        "mean reward, sampled": float(rewards["test"].mean()),
        "best of 20": float(rewards["test"].max(1).mean()),
        "distinct of 20": float(np.mean([len(set(group)) for group in samples["test"]])),
        "words, greedy": float(np.mean([len(words(y)) for y in greedy])),
        "labels that agree with the truth": float(truth.mean()),
    }
    sets = {
        "backbone": lambda x, y: summed_hidden_states(backbone, x, y),
        "policy": lambda x, y: summed_hidden_states(policy, x, y),
        "bag of words": bag_of_words,
        "true terms": true_terms,
    }
    for name, features in sets.items():
        train, test = (
            features([prompt.text for prompt in prompts], samples[key])
            for key, prompts in (("train", training), ("test", heldout))
        )
        shares = [
            share_of_gain(train, rewards["train"], test, rewards["test"], world.reward_scale, ridge, draw)
            for draw in range(5)
        ]
        result[f"share of best-of-20 gain, {name}"] = float(np.mean(shares))
    return result


def main() -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policy", help="another initial policy than the world's own")
    parser.add_argument("--backbone", help="another backbone than the world's own")
    parser.add_argument("--labels", type=int, default=512)
    parser.add_argument("--ridge", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # a policy loaded for its features says that its head is unused
    transformers.logging.disable_progress_bar()
    table = {seed: measure(seed, given.policy, given.backbone, given.labels, given.ridge) for seed in given.worlds}
    width = max(map(len, next(iter(table.values()))))
    print(f"{'world':{width}}", *(f"{seed:>8}" for seed in table))
    for name in next(iter(table.values())):
        print(f"{name:{width}}", *(f"{row[name]:8.3f}" for row in table.values()))
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
