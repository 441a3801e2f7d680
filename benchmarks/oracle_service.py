"""How fast the oracle service answers, and what it costs over the bare oracle.

    python benchmarks/oracle_service.py [http] [function] [reward_model] [faults] [--seconds 60] [--duels 20000]

    http          a programmatic oracle with its journal on disk, over HTTP: 8 callers with lists of 50 duels, 1 caller
                  with lists of 500, 16 callers with single duels; callers are threads of one process that asks as
                  `oracle.kind=http` does, and share the machine's cores with the service
    function      the same oracle by its handle: one caller with lists of 5,000 duels, one caller with single duels, 64
                  callers with single duels at the same time
    reward_model  an encoder of MiniLM's size (6 layers, width 384, random weights; speed does not depend on values):
                  the bare model over batches sorted by length, then the service with 64 callers at the same time
    faults        a replica is killed every 5 s, over HTTP and by handle: duels lost, duels charged twice

Nothing is judged twice, so no cache helps. Threads: OMP_NUM_THREADS, or 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
import torch

from rayalign.after.serving import serve_oracle
from rayalign.env.labels import Oracle
from rayalign.serve import OracleConfig, start_oracle, stop_oracle
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Candidate, Duel, Prompt, Verdict

CALLERS = 64
WORDS = [f"w{i}" for i in range(2000)]


def made_up_duels(n: int, seed: int, longest: int) -> list[Duel]:
    """Prompts of 32 words, responses of a quarter of `longest` to `longest` words."""
    rng = random.Random(seed)

    def response() -> Candidate:
        text = " ".join(rng.choices(WORDS, k=rng.randint(longest // 4, longest)))
        return Candidate(text=text, token_ids=(1,) * 32, logprobs=(-1.0,) * 32, policy_version=0)

    return [
        Duel(
            id=f"{seed}-{i}",
            batch=0,
            prompt=Prompt(id=f"{seed}-{i}", text=" ".join(rng.choices(WORDS, k=32)), token_ids=(1,) * 32),
            first=response(),
            second=response(),
        )
        for i in range(n)
    ]


def length(prompt: str, response: str) -> float:
    return float(len(response))


def in_parallel(oracle: Oracle, lists: Sequence[Sequence[Duel]]) -> tuple[float, np.ndarray]:
    """Duels per second, and seconds per call, with 64 callers that each ask a list when their last one is answered."""
    seconds: list[float] = []

    def ask(duels: Sequence[Duel]) -> None:
        start = time.perf_counter()
        assert len(oracle.judge(duels)) == len(duels)
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(ask, lists))
    return sum(map(len, lists)) / (time.perf_counter() - start), np.array(seconds)


def say(what: str, rate: float, seconds: np.ndarray | None = None, more: str = "") -> None:
    latency = ""
    if seconds is not None:
        p50, p99 = np.percentile(seconds, [50, 99]) * 1000
        latency = f"   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms"
    print(f"{what:52s} {rate:9.0f} duels/s{latency}{more}", flush=True)


def bench_http(folder: Path, n: int) -> None:
    with serve_oracle(length, port=free_port(), folder=folder / "http", **{"oracle.cpus_per_replica": 1.0}) as server:
        config = OracleConfig(kind="http", target=server.url)
        for callers, size, total, seed in ((8, 50, n, 200), (1, 500, n, 201), (16, 1, max(16, n // 10), 202)):
            oracles = [oracle_factory(config)() for _ in range(callers)]
            for i, oracle in enumerate(oracles):
                oracle.judge(made_up_duels(size, seed=seed * 1000 + i, longest=48))  # warm-up, connections included
            duels = made_up_duels(total, seed=seed, longest=48)
            shares = [duels[i::callers] for i in range(callers)]
            start = time.perf_counter()
            with ThreadPoolExecutor(callers) as pool:
                seconds = list(pool.map(partial(ask_in_lists, size), oracles, shares))
            rate = total / (time.perf_counter() - start)
            say(f"http, {callers} callers, lists of {size}", rate, np.concatenate(seconds))


def ask_in_lists(size: int, oracle: Oracle, duels: Sequence[Duel]) -> np.ndarray:
    """Seconds per call."""
    seconds = []
    for i in range(0, len(duels), size):
        asked = duels[i : i + size]
        start = time.perf_counter()
        assert len(oracle.judge(asked)) == len(asked)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def bench_function(folder: Path, n: int) -> None:
    config = OracleConfig(kind="function", cpus_per_replica=1.0)
    oracle = start_oracle(config, oracle_factory(config, custom=length), "function", folder / "function")
    oracle.judge(made_up_duels(2000, seed=0, longest=48))  # warm-up
    lists = [made_up_duels(5000, seed=seed, longest=48) for seed in range(1, 1 + max(1, n // 5000))]
    start = time.perf_counter()
    for duels in lists:
        oracle.judge(duels)
    say("function, 1 caller, lists of 5,000", sum(map(len, lists)) / (time.perf_counter() - start))
    seconds = []
    for duel in made_up_duels(300, seed=100, longest=48):
        start = time.perf_counter()
        oracle.judge([duel])
        seconds.append(time.perf_counter() - start)
    say("function, 1 caller, single duels", len(seconds) / sum(seconds), np.array(seconds))
    rate, latencies = in_parallel(oracle, [[duel] for duel in made_up_duels(3000, seed=101, longest=48)])
    say(f"function, {CALLERS} callers, single duels", rate, latencies)
    stop_oracle("function")


def save_model(folder: Path) -> str:
    """An encoder of MiniLM's size and a tokenizer that knows `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@ray.remote(num_cpus=1)
class BareModel:
    """Hugging Face's own classes, batches of 32 responses, sorted by length."""

    def __init__(self, target: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.model = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32).eval()

    def seconds(self, duels: Sequence[Duel], batch: int = 32) -> tuple[float, float]:
        """That it takes to score both responses of each duel: on the clock, and of the CPU."""
        pairs = [(d.prompt.text, r.text) for d in duels for r in (d.first, d.second)]
        start, start_cpu = time.perf_counter(), time.process_time()
        pairs.sort(key=lambda pair: len(pair[1]))
        with torch.inference_mode():
            for i in range(0, len(pairs), batch):
                prompts, responses = map(list, zip(*pairs[i : i + batch], strict=True))
                self.model(**self.tokenizer(prompts, responses, padding=True, return_tensors="pt")).logits.tolist()
        return time.perf_counter() - start, time.process_time() - start_cpu


def reward_model_that_says_its_pid(config: OracleConfig, folder: Path) -> Oracle:
    (folder / "pid").write_text(str(os.getpid()))
    return oracle_factory(config)()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_reward_model(folder: Path, n: int, rounds: int) -> None:
    """In turns, because the speed of a shared machine changes from minute to minute; the CPU time hardly does."""
    target = save_model(folder / "model")
    bare = BareModel.remote(target)
    config = OracleConfig(kind="reward_model", target=target, cpus_per_replica=1.0)
    factory = partial(reward_model_that_says_its_pid, config, folder)
    oracle = start_oracle(config, factory, "reward-model", folder / "reward-model")
    replica = int((folder / "pid").read_text())
    warm_up = made_up_duels(8, seed=0, longest=64)
    oracle.judge(warm_up)
    ray.get(bare.seconds.remote(warm_up))
    seconds: dict[int, list[float]] = {0: [], 1: [], 8: []}  # 0: bare
    cpu = dict.fromkeys(seconds, 0.0)
    latencies: dict[int, list[np.ndarray]] = {1: [], 8: []}
    for turn in range(rounds):
        clock, used = ray.get(bare.seconds.remote(made_up_duels(n, seed=100 * turn + 1, longest=64)))
        seconds[0].append(clock)
        cpu[0] += used
        for size in (1, 8):
            duels = made_up_duels(n, seed=100 * turn + 1 + size, longest=64)
            before = cpu_seconds(replica)
            rate, latency = in_parallel(oracle, [duels[i : i + size] for i in range(0, n, size)])
            seconds[size].append(n / rate)
            latencies[size].append(latency)
            cpu[size] += cpu_seconds(replica) - before
    stop_oracle("reward-model")
    ray.kill(bare)
    say("reward model, bare, batches sorted by length", n * rounds / sum(seconds[0]))
    for size in (1, 8):
        what = "single duels" if size == 1 else f"lists of {size}"
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(seconds[0], seconds[size], strict=True))
        rate, overall = n * rounds / sum(seconds[size]), sum(seconds[0]) / sum(seconds[size])
        more = f"   {overall:.2f} of bare (by turns: {ratios}; by CPU time {cpu[0] / cpu[size]:.2f})"
        say(f"reward model, {CALLERS} callers, {what}", rate, np.concatenate(latencies[size]), more)


class Slow:
    """Says which process it is in, and takes 20 ms."""

    id = "slow"

    def __init__(self, pids: Path) -> None:
        self.pids = pids

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """A coin's probabilities."""
        (self.pids / str(os.getpid())).touch()
        time.sleep(0.02)
        return [Verdict(duel_id=duel.id, probability=0.5, price=1.0) for duel in duels]


def bench_faults(folder: Path, seconds: float) -> None:
    for name in ("http", "handle"):
        (folder / f"{name} pids").mkdir()
    settings = {"oracle.num_replicas": 2, "oracle.cpus_per_replica": 0.5}
    slow = Slow(folder / "http pids")
    with serve_oracle(slow, port=free_port(), folder=folder / "http answers", **settings) as server:
        config = OracleConfig(kind="http", target=server.url)
        over_http = [oracle_factory(config)() for _ in range(8)]
        kill_and_count("faults, over HTTP", over_http, slow.pids, folder / "http answers", seconds)
    config = OracleConfig(kind="function", num_replicas=2, cpus_per_replica=0.5, retries=20)
    slow, journal = Slow(folder / "handle pids"), folder / "handle answers"
    oracle = start_oracle(config, oracle_factory(config, custom=slow), "faults", journal)
    kill_and_count("faults, by handle", [oracle] * 8, slow.pids, journal, seconds)
    stop_oracle("faults")


def kill_and_count(what: str, oracles: Sequence[Oracle], pids: Path, journal: Path, seconds: float) -> None:
    """Each of `oracles` is asked by one caller, 8 duels at a time, while the replica that worked last is killed."""
    over, killed = threading.Event(), set[int]()

    def kill() -> None:
        while not over.wait(5.0):
            alive = [p for p in pids.iterdir() if int(p.name) not in killed]
            if alive:
                last = int(max(alive, key=lambda path: path.stat().st_mtime).name)
                killed.add(last)
                os.kill(last, signal.SIGKILL)

    asked: list[str] = []
    answered: list[str] = []
    latencies: list[float] = []

    def ask(caller: int, oracle: Oracle) -> None:
        deadline = time.monotonic() + seconds
        for turn in range(1_000_000):
            if time.monotonic() > deadline:
                return
            duels = made_up_duels(8, seed=1_000_000 * (1 + caller) + turn, longest=8)
            asked.extend(duel.id for duel in duels)
            start = time.perf_counter()
            answered.extend(verdict.duel_id for verdict in oracle.judge(duels))
            latencies.append(time.perf_counter() - start)

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(len(oracles)) as pool:
        list(pool.map(ask, range(len(oracles)), oracles))
    rate = len(answered) / (time.perf_counter() - start)
    over.set()
    killer.join()
    charged = Counter(
        json.loads(line)["duel_id"] for file in journal.glob("*.jsonl") for line in file.read_text().splitlines()
    )
    lost, twice = len(set(asked) - set(answered)), sum(count > 1 for count in charged.values())
    more = f"   {lost} lost, {twice} charged twice; {len(asked)} asked, {sum(charged.values())} charged"
    say(f"{what}, {len(oracles)} callers, {len(killed)} replicas killed", rate, np.array(latencies), more)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="http, function, reward_model, faults; all of them by default")
    parser.add_argument("--duels", type=int, default=20_000, help="through the function, over HTTP and in lists")
    parser.add_argument("--model-duels", type=int, default=256, help="through the reward model in each of the turns")
    parser.add_argument("--turns", type=int, default=4, help="of bare model and service")
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults")
    args = parser.parse_args()
    what = args.what or ["http", "function", "reward_model", "faults"]
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "http" in what:
            bench_http(folder, args.duels)
        if "function" in what:
            bench_function(folder, args.duels)
        if "reward_model" in what:
            bench_reward_model(folder, args.model_duels, args.turns)
        if "faults" in what:
            bench_faults(folder, args.seconds)
    ray.shutdown()


if __name__ == "__main__":
    main()
