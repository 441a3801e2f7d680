"""The best pairs of a pool: the same as by sorting all of it, without ever holding all of it."""

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
from rayalign.scoring.offline_pool import (
    ERROR,
    KEY,
    SCORE,
    BestSoFar,
    PairScorer,
    running_top,
    stream_top,
    top_of_pool,
)


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


class ByNumber(BestSoFar):
    """Scores by a column."""

    def scores(self, rows):
        return np.array([row["n"] for row in rows])


def numbers(*values):
    return pa.table({"n": pa.array(values, pa.float64()), "text": [f"text {value}" for value in values]})


def test_an_actor_passes_on_what_is_among_its_best_so_far_and_no_row_that_must_not_be_asked():
    actor = ByNumber(count=3)
    assert actor(numbers(3, -np.inf, 5, 1, 4))["n"].to_pylist() == [3, 5, 1, 4], "nothing is known yet"
    assert actor(numbers(2, 3, 6, 0))["n"].to_pylist() == [3, 6], "3, 4 and 5 are known, ties pass"
    assert actor(numbers(4, 3.5))["n"].to_pylist() == [4], "and now 4, 5 and 6"
    assert len(actor(numbers(-np.inf))) == 0
    assert "not numbers" in actor(numbers(np.nan))[ERROR][0].as_py()


def test_a_batch_that_comes_again_does_not_raise_the_floor():
    actor = ByNumber(count=3)
    for _ in range(4):
        actor(numbers(9, 8))
    assert actor(numbers(1, 2))["n"].to_pylist() == [1, 2], "the third best of all is 2"


def test_actors_that_share_a_pool_pass_on_its_top_and_little_else():
    rng = np.random.default_rng(0)
    values = rng.permutation(20_000).astype(float)
    actors = [ByNumber(count=50) for _ in range(2)]
    passed = [actors[i % 2](numbers(*part)) for i, part in enumerate(np.split(values, 100))]
    assert running_top(passed, 50)["n"].to_pylist() == list(range(19_999, 19_949, -1))
    assert sum(map(len, passed)) < 1_500  # 2 * 50 * (1 + log(10,000 / 50)) = 630, and first batches pass whole


def test_what_can_not_be_used_is_refused_before_anything_starts(policy):
    with pytest.raises(ConfigError, match="agent='passive' does not score given pairs"):
        top_of_pool(None, "passive", 3, policy=policy)
    with pytest.raises(ConfigError, match="count=0 must be at least 1"):
        top_of_pool(None, "ae_dpo", 0, policy=policy)
    with pytest.raises(DataError, match="the pool has no pair that may be asked"):
        running_top([], 3)


# -- a model and pairs --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows():
    """90 pairs; every tenth is twice the same text."""
    rng = random.Random(0)

    def text():
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(1, 8)))

    rows = [{"prompt": text(), "chosen": text(), "rejected": text(), "number": i} for i in range(90)]
    for row in rows[::10]:
        row["rejected"] = row["chosen"]
    return rows


def by_sorting(rows, agent, model, policy, seed=0):
    """Numbers of the rows, best first, by scoring all of them at once; and the scores."""
    encoder = PromptEncoder(policy)
    prompts = [encoder.encode(to_prompt(row, Columns(), "")) for row in rows]
    groups = [encoder.given_pair(prompt) for prompt in prompts]
    scores = make_agent(agent).pair_scores(model, prompts, groups, seed=seed)
    order = np.argsort(-scores, kind="stable")
    return [rows[i]["number"] for i in order if np.isfinite(scores[i])], scores


def test_a_checkpoint_is_asked_and_the_initial_policy_is_the_reference(policy, weights, rows, tmp_path):
    model = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    model.load(weights)
    model.live.model.save_pretrained(tmp_path)
    settings = dict(config=ScorerConfig(), columns=Columns(), chat="auto", max_prompt_tokens=100, seed=4)
    actor = PairScorer(90, make_agent("ae_dpo"), str(tmp_path), str(policy), **settings)
    expected, scores = by_sorting(rows, "ae_dpo", model, policy, seed=4)
    best = running_top([actor(pa.Table.from_pylist(part)) for part in (rows[:40], rows[40:])], 90)
    assert best["number"].to_pylist() == expected and len(expected) == 81, "pairs of the same text are left out"
    np.testing.assert_allclose(best[SCORE], np.sort(scores)[::-1][:81], rtol=1e-3)
    too_long = actor(pa.Table.from_pylist([{"prompt": "w1 " * 99, "chosen": "w2 " * 200, "rejected": "w3"}]))
    assert "exceeds the 256 positions of the model" in too_long[ERROR][0].as_py()


# -- with Ray Data ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_streamed_pool_becomes_a_file_of_the_prompts_that_scoring_all_of_it_finds(
    cluster, policy, rows, tmp_path, capsys
):
    model = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    expected, scores = by_sorting(rows, "us_dpo", model, policy)
    (tmp_path / "pool").mkdir()
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(rows[i::3]), tmp_path / "pool" / f"{i}.parquet")
    command = ["--agent", "us_dpo", "--policy", str(policy), "--count", "7", "--out", str(tmp_path / "best.parquet")]
    assert offline_pool.main([str(tmp_path / "pool"), *command]) == 0
    assert "7 pairs in" in capsys.readouterr().out
    best = pq.read_table(tmp_path / "best.parquet")
    assert best["number"].to_pylist() == expected[:7]
    np.testing.assert_allclose(best[SCORE], np.sort(scores)[::-1][:7], rtol=1e-3)
    assert best.column_names == ["prompt", "chosen", "rejected", "number", SCORE]
    chosen = [rows[i] for i in expected[:7]]
    prompts = [to_prompt(row, Columns(), "") for row in best.to_pylist()]
    assert [prompt.pair for prompt in prompts] == [(row["chosen"], row["rejected"]) for row in chosen]


def test_a_row_that_can_not_be_used_is_an_error_of_ours_that_shows_it(cluster):
    class Picky(BestSoFar):
        def scores(self, rows):
            for row in rows:
                if row["id"] == 31:
                    raise DataError(f"pool, row {row}: has no pair")
            return np.zeros(len(rows))

    with pytest.raises(DataError, match=r"^pool, row \{'id': 31\}: has no pair$"):
        stream_top(ray.data.range(50), Picky, {}, 5, batch_rows=4, config=ScorerConfig(cpus_per_replica=0.5))
