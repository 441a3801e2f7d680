"""The best pairs of a pool: the same as by sorting all of it, without ever holding all of it."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from random_policies import WORDS

from rayalign.agents import make_agent
from rayalign.env.prompt_data import Columns, to_prompt
from rayalign.errors import ConfigError, DataError
from rayalign.rollout.encode import PromptEncoder
from rayalign.scoring import offline_pool
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel
from rayalign.scoring.offline_pool import KEY, SCORE, BestOfBatch, running_top, top_of_pool


def scored(rows):
    """A table of (name, score)."""
    names, scores = zip(*rows, strict=True)
    return pa.table({"name": names, SCORE: pa.array(scores, pa.float64()), KEY: names})


def test_the_running_top_is_the_top_of_everything_whatever_the_order_of_arrival():
    rng = random.Random(0)
    rows = [(f"{i:03}", float(rng.randrange(40))) for i in range(200)]
    expected = [name for name, _ in sorted(rows, key=lambda row: (-row[1], row[0]))]
    for count in (1, 7, 200, 500):
        for _ in range(3):
            rng.shuffle(rows)
            cuts = sorted(rng.sample(range(1, 200), 9))
            tables = [scored(rows[a:b]) for a, b in zip([0, *cuts], [*cuts, 200], strict=True)]
            found = running_top(tables, count)
            assert found["name"].to_pylist() == expected[:count]
            assert found.column_names == ["name", SCORE]


def test_the_running_top_lets_go_of_the_rows_that_lost():
    def tables():
        for i in range(300):
            yield pa.table(
                {"text": [f"{i:01000}"] * 200, SCORE: np.arange(200.0) + i, KEY: [f"{i}-{j}" for j in range(200)]}
            )
            peaks.append(pa.total_allocated_bytes() - before)

    peaks: list[int] = []
    before = pa.total_allocated_bytes()
    best = running_top(tables(), count=50)  # 60 MB pass by
    assert len(best) == 50 and best[SCORE][0].as_py() == 199.0 + 299
    assert max(peaks) < 2e6


def test_an_actor_passes_on_the_best_of_its_batch_and_no_row_that_must_not_be_asked():
    class ByNumber(BestOfBatch):
        def scores(self, rows):
            return np.array([row["n"] for row in rows])

    batch = pa.table({"n": [3.0, -np.inf, 5.0, 1.0, 4.0], "text": list("abcde")})
    best = ByNumber(count=3)(batch)
    assert best["text"].to_pylist() == ["a", "c", "e"] and best[SCORE].to_pylist() == [3.0, 5.0, 4.0]
    assert len(set(best[KEY].to_pylist())) == 3
    assert len(ByNumber(count=3)(pa.table({"n": [-np.inf], "text": ["a"]}))) == 0
    with pytest.raises(DataError, match="not numbers"):
        ByNumber(count=3)(pa.table({"n": [np.nan], "text": ["a"]}))


def test_what_can_not_be_used_is_refused_before_anything_starts(policy):
    with pytest.raises(ConfigError, match="agent='passive' does not score given pairs"):
        top_of_pool(None, "passive", 3, policy=policy)
    with pytest.raises(ConfigError, match="count=0 must be at least 1"):
        top_of_pool(None, "ae_dpo", 0, policy=policy)
    with pytest.raises(DataError, match="the pool has no pair that may be asked"):
        running_top([], 3)


# -- with Ray Data ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """90 pairs in three Parquet files; every tenth pair is twice the same text."""
    folder, rng = tmp_path_factory.mktemp("pool"), random.Random(0)

    def text():
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(1, 8)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text(), "number": i} for i in range(90)]
    for row in rows[::10]:
        row["rejected"] = row["chosen"]
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(rows[i::3]), folder / f"{i}.parquet")
    return folder, rows


def in_memory(rows, agent, model, policy):
    """Numbers of the rows, best first, by scoring all of them at once."""
    encoder = PromptEncoder(policy)
    prompts = [encoder.encode(to_prompt(row, Columns(), "")) for row in rows]
    groups = [encoder.given_pair(prompt) for prompt in prompts]
    scores = make_agent(agent).pair_scores(model, prompts, groups, seed=4)
    order = np.argsort(-scores, kind="stable")
    return [rows[i]["number"] for i in order if np.isfinite(scores[i])], scores


def test_streaming_a_pool_finds_the_pairs_that_scoring_all_of_it_finds(cluster, policy, weights, pool, tmp_path):
    folder, rows = pool
    model = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    expected, scores = in_memory(rows, "us_dpo", model, policy)
    settings = dict(scorer=ScorerConfig(num_replicas=2, cpus_per_replica=0.5), seed=4)
    best = top_of_pool(ray.data.read_parquet(str(folder)), "us_dpo", 7, policy=policy, batch_rows=16, **settings)
    assert best["number"].to_pylist() == expected[:7]
    np.testing.assert_allclose(best[SCORE], np.sort(scores)[::-1][:7], rtol=1e-3)
    assert best.column_names == ["prompt", "chosen", "rejected", "number", SCORE]

    # A checkpoint is asked, the initial policy is the reference.
    model.load(weights)
    model.live.model.save_pretrained(tmp_path / "checkpoint")
    PromptEncoder(policy).tokenizer.save_pretrained(tmp_path / "checkpoint")
    expected, _ = in_memory(rows, "ae_dpo", model, policy)
    best = top_of_pool(
        ray.data.read_parquet(str(folder)), "ae_dpo", 90, policy=tmp_path / "checkpoint", reference=policy, **settings
    )
    assert best["number"].to_pylist() == expected and len(expected) == 81, "pairs of the same text are left out"


def test_a_pool_on_the_command_line_becomes_a_file_of_prompts(cluster, policy, pool, tmp_path, capsys):
    from rayalign.env import make_world

    rows = pool[1]
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [str(tmp_path / "pool.jsonl"), "--policy", str(policy), "--count", "5", "--out"]
    assert offline_pool.main([*command, str(tmp_path / "best.parquet")]) == 0
    assert "5 pairs in" in capsys.readouterr().out
    world = make_world("rayalign/Prompts-v0", path=str(tmp_path / "best.parquet"), heldout=0)
    given = {(row["chosen"], row["rejected"]) for row in rows}
    assert len(world.check_prompts()) == 5 and all(prompt.pair in given for prompt in world.check_prompts())

    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt": "w1", "chosen": "w2"}))
    assert offline_pool.main([*command, str(tmp_path / "none.parquet")]) == 2
    message = capsys.readouterr().err
    assert "error: pool, row {'prompt': 'w1', 'chosen': 'w2'}: field 'chosen' is there, but 'rejected'" in message
    assert not (tmp_path / "none.parquet").exists()
