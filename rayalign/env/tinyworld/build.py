"""Where the models of TinyWorld come from: shipped in `assets/`, else built once and cached.

    python -m rayalign.env.tinyworld.build --seed 0 [--out DIR]
    python -m rayalign.env.tinyworld.build --backbone [--out DIR]

Without --out the shipped copy is replaced, so these commands, with seeds 0 to 2, regenerate all that is shipped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rayalign.system.cache import cached_folder

ASSETS = Path(__file__).parent / "assets"
RECIPE = 2
"""Raised whenever the same seed would give other weights; part of the names in the cache."""


def policy_dir(seed: int) -> Path:
    """The initial policy of world `seed`; built and cached if it is not shipped."""
    return _shipped_or_cached(f"policy_{seed}", lambda out: build_policy(seed, out))


def backbone_dir() -> Path:
    """The reward backbone of all worlds; built and cached if it is not shipped."""
    return _shipped_or_cached("backbone", build_backbone)


def build_policy(seed: int, out: Path, steps: tuple[int, int] | None = None) -> None:
    """Train the policy of world `seed` and write it, tokenizer included, to `out`, all or nothing."""
    from rayalign.env.tinyworld import pretraining
    from rayalign.env.tinyworld.tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    _save(pretraining.train_policy(seed, tokenizer, steps or pretraining.POLICY_STEPS), tokenizer, out)


def build_backbone(out: Path, steps: int | None = None) -> None:
    """Train the reward backbone and write it, tokenizer included, to `out`, all or nothing."""
    from rayalign.env.tinyworld import pretraining
    from rayalign.env.tinyworld.tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    _save(pretraining.train_backbone(tokenizer, steps or pretraining.BACKBONE_STEPS), tokenizer, out)


def _shipped_or_cached(name: str, build: Callable[[Path], None]) -> Path:
    shipped = ASSETS / name
    if shipped.is_dir():
        return shipped

    def announced(folder: Path) -> None:
        print(f"rayalign: building TinyWorld's {name}, once, about a minute", file=sys.stderr, flush=True)
        build(folder)

    return cached_folder(f"tinyworld-v{RECIPE}/{name}", announced)


def _save(model, tokenizer, out: Path) -> None:  # type: ignore[no-untyped-def]  # transformers is imported late
    """Write into a folder beside `out`, then rename: a reader never sees half a model, the last writer wins."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "model"
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        try:
            fresh.rename(out)
        except OSError:  # `out` is there: an older build, or that of another process
            shutil.move(out, Path(scratch) / "old")
            fresh.rename(out)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rayalign.env.tinyworld.build", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="build the initial policy of this world")
    what.add_argument("--backbone", action="store_true", help="build the reward backbone")
    parser.add_argument("--out", type=Path, help="folder to write; default: the shipped copy")
    given = parser.parse_args(arguments)
    if given.backbone:
        build_backbone(given.out or ASSETS / "backbone")
    else:
        build_policy(given.seed, given.out or ASSETS / f"policy_{given.seed}")


if __name__ == "__main__":
    main()
