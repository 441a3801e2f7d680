"""A tiny random Llama with a tokenizer, batches of random duels, and a source that outlives its workers."""

import os
import sys

import numpy as np
import pytest
import torch
from ray import cloudpickle

from rayalign.errors import WaitError
from rayalign.learner.stream import EndOfStream, PleasePublish
from rayalign.types import Candidate, Duel, Preference, Prompt, TrainBatch

VOCABULARY, EOS = 2_048, 1
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import this file


def write_policy(folder, tied=False, **overrides):
    """Write a Llama of two layers; big enough that ZeRO-3 shards its embeddings, small enough to train in a blink."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings | overrides)).save_pretrained(folder)
    words = {"<pad>": 0, "</s>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def tied_policy_dir(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("tied"), tied=True)


def random_batch(index, size, label=1.0, seed=0, longest=9):
    """`size` duels of random tokens, prompts and responses of different lengths, all ending in end-of-sequence."""
    rng = np.random.default_rng([seed, index])

    def tokens(most):
        return tuple(int(t) for t in rng.integers(2, VOCABULARY, rng.integers(1, most)))

    def response():
        ids = (*tokens(longest), EOS)
        return Candidate(text=str(ids), token_ids=ids, logprobs=(0.0,) * len(ids), policy_version=0)

    preferences = []
    for i in range(size):
        prompt = Prompt(id=f"p{index}-{i}", text="", token_ids=tokens(longest))
        duel = Duel(id=f"d{index}-{i}", batch=index, prompt=prompt, first=response(), second=response())
        preferences.append(Preference(duel=duel, label=label if np.isscalar(label) else label[i % len(label)]))
    return TrainBatch(index=index, preferences=tuple(preferences), meta={"progress": 0.0})


@pytest.fixture(scope="session")
def make_batch():
    return random_batch


@pytest.fixture(scope="session")
def make_preference():
    """`make_preference(prompt, first, second)` from token ids."""

    def candidate(ids):
        return Candidate(text=" ".join(map(str, ids)), token_ids=ids, logprobs=(0.0,) * len(ids), policy_version=0)

    def make(prompt, first, second, label=1.0, id="d"):
        context = Prompt(id="p", text="", token_ids=prompt)
        duel = Duel(id=id, batch=0, prompt=context, first=candidate(first), second=candidate(second))
        return Preference(duel=duel, label=label)

    return make


class Shelf:
    """A source's state, as an actor: it outlives the learner's workers and remembers what they asked and sent."""

    def __init__(self, batches):
        self.batches, self.published, self.metrics = batches, {}, {}
        self.asked, self.sent, self.pids, self.hold, self.lost, self.end = [], [], {}, None, None, len(batches)

    def next_batch(self, index, pid, rank):
        if rank == 0 and self.asked[-1:] != [(pid, index)]:  # asking again while it waits counts once
            self.asked.append((pid, index))
        self.pids[rank] = pid
        if index > 0 and index not in self.published:
            return PleasePublish()
        if self.hold is not None and index >= self.hold:
            return None
        return self.batches[index] if index < self.end else EndOfStream()

    def publish(self, weights, metrics, spans=()):
        self.sent.append(weights.version)
        if weights.version == self.lost:
            self.lost = None
            return
        self.published[weights.version] = weights
        if metrics.get("loss") is not None:
            self.metrics[weights.version] = metrics

    def hold_at(self, index):
        self.hold = index

    def end_at(self, index):
        self.end = index

    def lose_at(self, version):
        self.lost = version

    def seen(self):
        return {
            "asked": [index for _, index in self.asked],
            "sent": self.sent,
            "published": self.published,
            "metrics": self.metrics,
            "pids": self.pids,
        }


class ShelfSource:
    """The picklable client of a `Shelf` actor."""

    def __init__(self, shelf):
        self.shelf = shelf

    def next_batch(self, index, timeout_s):
        import time

        import ray

        rank, deadline = int(os.environ.get("RANK", 0)), time.monotonic() + timeout_s
        while (reply := ray.get(self.shelf.next_batch.remote(index, os.getpid(), rank), timeout=60)) is None:
            if time.monotonic() > deadline:
                raise WaitError(f"waited {timeout_s:.0f} s for batch {index} from the shelf.")
            time.sleep(0.05)
        return reply

    def publish(self, weights, metrics, spans=()):
        import ray

        ray.get(self.shelf.publish.remote(weights, dict(metrics)), timeout=60)


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the whole folder."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def shelf(cluster):
    """`shelf(batches)` -> an actor that is gone after the test, and a source that asks it."""
    import ray

    actors = []

    def start(batches):
        actors.append(ray.remote(Shelf).options(num_cpus=0).remote(batches))
        return actors[-1], ShelfSource(actors[-1])

    yield start
    for actor in actors:
        ray.kill(actor)
