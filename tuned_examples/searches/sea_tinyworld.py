"""Search SEA's settings on TinyWorld with Ray Tune: ASHA stops trials by what their labels brought.

Command     python tuned_examples/searches/sea_tinyworld.py
            python tuned_examples/searches/sea_tinyworld.py --trials 20 --max-labels 10000 --folder runs/large-search
            ray job submit --working-dir . -- python tuned_examples/searches/sea_tinyworld.py
Hardware    2 CPU cores, 8 GiB: two trials at a time
Result      a table and a plot (search.md, search.png); those of the default search are in docs/searching.md
Compare     tuned_examples/sea_tinyworld.py has the settings that are searched from

The same command with the same folder goes on with a search that was interrupted; no label is bought twice.
"""

import argparse
from pathlib import Path

from ray import tune

import rayalign
from rayalign import storage
from rayalign.cli import show_table
from rayalign.loop.loop import cluster
from rayalign.serve import stop_oracle
from rayalign.studies.search_results import SearchResults

SPACE = {
    "agent.num_candidates": tune.choice([5, 10, 20]),
    "agent.exploration": tune.choice(["bai_ts", "ee_ts", "uncertainty"]),
    "agent.gamma_after": tune.choice([0.5, 0.7, 1.0]),
    "learner.learning_rate": tune.loguniform(1e-4, 1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--budget", type=int, default=512, help="labels of a trial that is not stopped")
    parser.add_argument("--grace", type=int, default=128, help="labels that every trial gets")
    parser.add_argument("--max-labels", type=int, default=2_000, help="labels of all trials together")
    parser.add_argument("--seed", type=int, default=0, help="of the search; the trials' is the example's")
    parser.add_argument("--folder", type=Path, default=Path("runs/search-sea-tinyworld"))
    options = parser.parse_args()
    folder = Path(storage.absolute(options.folder))  # in a Ray job below the home directory

    sea = rayalign.trainable(
        str(Path(__file__).parents[1] / "sea_tinyworld.py"),
        budget=options.budget,
        max_labels=options.max_labels,
        parallel=2,
        folder=folder / "runs",
        **{"evaluation.every": 128, "evaluation.num_prompts": 100},
    )
    with cluster() as own:
        if tune.Tuner.can_restore(str(folder / "tune")):
            tuner = tune.Tuner.restore(str(folder / "tune"), sea, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                sea,
                param_space=SPACE,
                tune_config=tune.TuneConfig(
                    num_samples=options.trials,
                    search_alg=tune.search.BasicVariantGenerator(random_state=options.seed),
                    metric="win_rate",
                    mode="max",
                    scheduler=tune.schedulers.ASHAScheduler(
                        time_attr="labels", max_t=options.budget, grace_period=options.grace, reduction_factor=2
                    ),
                ),
                run_config=tune.RunConfig(storage_path=str(folder), name="tune", verbose=1),
            )
        found = SearchResults.of(tuner.fit())
        if not own:
            stop_oracle("")  # Ray Serve, which the trials shared, if nobody else is on it
    show_table(*found.table())
    print(f"{found.labels_bought:,} labels bought; {', '.join(map(str, found.write(folder)))}")
    print("the best again, with another seed:")
    print(found.command("rayalign run tuned_examples/sea_tinyworld.py --seed 1"))


if __name__ == "__main__":
    main()
