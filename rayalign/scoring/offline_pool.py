"""The best pairs of a pool that is too big for memory, by the score of an agent that works with given pairs.

    files --> Ray Data, block by block --> actors: encode, score, pass on the best so far --> running top --> table
              (bounded by its object store)        a ScorerModel in each                  (count rows)

    python -m rayalign.scoring.offline_pool POOL.parquet --agent ae_dpo --policy DIR --count 20000 --out best.parquet
    rayalign run ae_dpo --env rayalign/Prompts-v0 --policy DIR --set env.path=best.parquet ...

All scores are made by one policy: the initial one, or a checkpoint (`--policy CHECKPOINT --reference DIR`). A run then
scores the chosen pairs again, a window of its stream at a time, with the policy as it is by then. Nothing is labelled.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray.data

from rayalign.agents import make_agent
from rayalign.agents.scorer import Groups, Scorer
from rayalign.env.prompt_data import Columns, to_prompt
from rayalign.errors import ConfigError, DataError, RayalignError
from rayalign.models import resolve_policy
from rayalign.rollout.encode import PromptEncoder, check_fits, context_length
from rayalign.rollout.weights import pack
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel
from rayalign.types import Prompt

SCORE, KEY, ERROR = "rayalign_score", "rayalign_key", "rayalign_error"
"""Columns that scoring adds: the score; a hash of the row, which decides ties whatever the order of arrival; and what
is wrong with a row."""


class ScoresPairs(Protocol):
    """What an agent needs for this: `ae_dpo` and `us_dpo` have it."""

    def pair_scores(self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups, *, seed: int) -> np.ndarray:
        """Score of each prompt's pair, `P`; -inf where it must not be asked."""


def top_of_pool(
    data: ray.data.Dataset,
    agent: str | ScoresPairs,
    count: int,
    *,
    policy: str | Path,
    reference: str | Path | None = None,
    scorer: ScorerConfig | None = None,
    columns: Columns | None = None,
    chat: str = "auto",
    max_prompt_tokens: int = 1024,
    batch_rows: int = 256,
    seed: int = 0,
) -> pa.Table:
    """The `count` rows of `data` with the highest scores, highest first, with a column `rayalign_score`.

    Args:
        data: rows with a prompt and two responses, e.g. `ray.data.read_parquet(files)`; read once, as a stream.
        agent: `ae_dpo`, `us_dpo`, or one of your own with `pair_scores`.
        policy: Hugging Face directory or id of the policy that is asked.
        reference: of the initial policy, where `policy` is a checkpoint of it.
        scorer: `num_replicas` actors, what each reserves, and sizes of its batches.
        columns: which column is what, as for `rayalign/Prompts-v0`.
        chat, max_prompt_tokens: as in `rollout.*`.
        batch_rows: rows that an actor scores at a time.
        seed: names the dropout masks, the same for all rows.

    Raises `DataError` that shows the row, if one has no pair or does not fit into the model's context.
    """
    found = make_agent(agent) if isinstance(agent, str) else agent
    if not hasattr(found, "pair_scores"):
        raise ConfigError(f"agent={agent!r} does not score given pairs. Use 'ae_dpo' or 'us_dpo'.")
    for name, value in (("count", count), ("batch_rows", batch_rows)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    settings = {
        "agent": found,
        "policy": str(resolve_policy(policy)),
        "reference": str(resolve_policy(policy if reference is None else reference)),
        "config": scorer or ScorerConfig(),
        "columns": columns or Columns(),
        "chat": chat,
        "max_prompt_tokens": max_prompt_tokens,
        "seed": seed,
    }
    return stream_top(data, PairScorer, settings, count, batch_rows=batch_rows, config=scorer or ScorerConfig())


def stream_top(
    data: ray.data.Dataset,
    stage: type[BestSoFar],
    settings: Mapping[str, Any],
    count: int,
    *,
    batch_rows: int,
    config: ScorerConfig,
) -> pa.Table:
    """Send `data` through actors that run `stage(count=..., **settings)`, and keep the running top."""
    scored = data.map_batches(
        stage,
        fn_constructor_kwargs={"count": count, **settings},
        batch_size=batch_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, config.num_replicas)),
        num_cpus=config.cpus_per_replica,
        num_gpus=config.gpus_per_replica,
        runtime_env={"env_vars": config.environment()},
    )
    scored.context.enable_progress_bars = False
    return running_top(_checked(scored.iter_batches(batch_size=None, batch_format="pyarrow")), count)


def _checked(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Raises what an actor sent instead of rows: an exception's own type does not survive the way through Ray Data."""
    for table in tables:
        if ERROR in table.column_names and table[ERROR].null_count < len(table):
            raise DataError(table[ERROR].drop_null()[0].as_py())
        yield table


def running_top(tables: Iterable[pa.Table], count: int) -> pa.Table:
    """The `count` rows with the highest score of all tables, highest first; at most `2 count` rows and a table are
    held. Ties go to the lowest key. `DataError` if there is no row at all.
    """
    kept: list[pa.Table] = []
    for table in tables:
        kept.append(table)
        if sum(map(len, kept)) >= 2 * count:
            kept = [_best(kept, count)]
    best = _best(kept, count) if kept else pa.table({SCORE: pa.array([], pa.float64())})
    if not len(best):
        raise DataError(
            "the pool has no pair that may be asked: it is empty, or both responses of all pairs are equal."
        )
    return best.drop_columns([KEY])


def _best(tables: Sequence[pa.Table], count: int) -> pa.Table:
    """Sorted and cut. Sorting copies the rows, so that the blocks they came from are free."""
    whole = pa.concat_tables(tables, promote_options="permissive")
    return whole.sort_by([(SCORE, "descending"), (KEY, "ascending")]).slice(0, count).combine_chunks()


# -- in the actors ------------------------------------------------------------------------------------------------
class BestSoFar:
    """Scores batches of rows and passes on those that are among the best `count` it has seen: no other row can be among
    the pool's. So few pass, about `count * log(rows / count)`, and the driver is not the pool's bottleneck.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._best: list[tuple[float, str]] = []  # a heap of score and key, the worst first
        self._known: set[str] = set()

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """A score per row; -inf leaves it out."""
        raise NotImplementedError

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows that pass, in their order, with score and key; or an error of ours in a column of its own."""
        try:
            scores = np.asarray(self.scores(table.to_pylist()), dtype=np.float64)
        except RayalignError as error:
            return pa.table({ERROR: [str(error)]})
        if np.isnan(scores).any():
            return pa.table(
                {ERROR: ["the policy's scores are not numbers. Use scorer.dtype=float32, or another policy."]}
            )
        floor = self._best[0][0] if len(self._best) == self.count else -np.inf
        passing = np.flatnonzero(np.isfinite(scores) & (scores >= floor))
        rows = table.take(pa.array(passing, pa.int64()))
        keys = [_key(row) for row in rows.to_pylist()]
        for score, key in zip(scores[passing], keys, strict=True):
            self._note(float(score), key)
        return rows.append_column(SCORE, pa.array(scores[passing])).append_column(KEY, pa.array(keys, pa.string()))

    def _note(self, score: float, key: str) -> None:
        """A row that comes again, as after a retry, counts once: twice would put the floor too high."""
        if key in self._known:
            return
        self._known.add(key)
        heapq.heappush(self._best, (score, key))
        if len(self._best) > self.count:
            self._known.discard(heapq.heappop(self._best)[1])


class PairScorer(BestSoFar):
    """Rows as prompts and pairs, scored by an agent with a model of its own."""

    def __init__(
        self,
        count: int,
        agent: ScoresPairs,
        policy: str,
        reference: str,
        config: ScorerConfig,
        columns: Columns,
        chat: str,
        max_prompt_tokens: int,
        seed: int,
    ) -> None:
        super().__init__(count)
        self.agent, self.columns, self.seed = agent, columns, seed
        self.encoder = PromptEncoder(reference, max_prompt_tokens, chat)
        self.context = context_length(reference)
        self.model = ScorerModel(config, reference)
        if policy != reference:
            self.model.load(pack(1, ScorerModel(config, policy).live.model.state_dict()))

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The agent's."""
        prompts = [
            self.encoder.encode(to_prompt(row, self.columns, f"pool, row {str(dict(row))[:120]}")) for row in rows
        ]
        groups = [self.encoder.given_pair(prompt) for prompt in prompts]
        for prompt, pair in zip(prompts, groups, strict=True):
            check_fits(prompt, max(len(response.token_ids) for response in pair), self.context)
        return self.agent.pair_scores(self.model, prompts, groups, seed=self.seed)


def _key(row: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


# -- command line -------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m rayalign.scoring.offline_pool`; returns the exit status."""
    import pyarrow.parquet

    parser = argparse.ArgumentParser(
        prog="python -m rayalign.scoring.offline_pool",
        description="The best pairs of a pool of any size, as a Parquet file for rayalign/Prompts-v0.",
    )
    parser.add_argument("pool", nargs="+", help="Parquet files or folders, or JSONL files: a prompt and two responses")
    parser.add_argument("--agent", default="ae_dpo", help="ae_dpo, us_dpo, or module:Class with pair_scores")
    parser.add_argument("--policy", required=True, help="directory or Hugging Face id of the policy that is asked")
    parser.add_argument("--reference", help="the initial policy, where --policy is a checkpoint of it")
    parser.add_argument("--count", type=int, required=True, help="pairs to keep")
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--replicas", type=int, default=1, help="actors that score")
    parser.add_argument("--gpus-per-replica", type=float, default=0.0)
    parser.add_argument("--prompt-column", default="prompt")
    options = parser.parse_args(arguments)
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, configure_logging=False, **local)
    try:
        read = ray.data.read_json if Path(options.pool[0]).suffix in (".jsonl", ".ndjson") else ray.data.read_parquet
        best = top_of_pool(
            read(options.pool),
            options.agent,
            options.count,
            policy=options.policy,
            reference=options.reference,
            scorer=ScorerConfig(num_replicas=options.replicas, gpus_per_replica=options.gpus_per_replica),
            columns=Columns(prompt=options.prompt_column),
        )
    except RayalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if own:
            ray.shutdown()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(best, options.out)
    print(f"{len(best)} pairs in {options.out}, scores {best[SCORE][0].as_py():.3g} to {best[SCORE][-1].as_py():.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
