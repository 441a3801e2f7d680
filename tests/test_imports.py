"""Imports point one way, importing the package is cheap, and nothing tracked knows the machine it was written on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rayalign

PACKAGE = Path(rayalign.__file__).parent
ROOT = PACKAGE.parent

ORDER = """
    errors types config random_streams
    system
    env ledger storage
    rollout models
    agents
    learner
    scoring
    serve
    evaluation
    runs
    report
    loop
    example estimate studies after
    cli
""".split()
"""Each file or folder of the package may import those before it; `rayalign/__init__.py` imports lazily, exempt."""

MACHINE = re.compile("|".join(["/" + name for name in (r"work/\w", r"root/\w", r"home/\w", r"Users/\w", r"tmp/w/")]))


def modules() -> dict[str, Path]:
    """Dotted name without the package -> file."""
    files = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__"): p
        for p in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix("."): path for name, path in files.items() if name}


def imported(path: Path, *, at_start_only: bool = False) -> Iterator[str]:
    """Names of the package's modules that a file imports, for type checking alone not counted."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; name the module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("rayalign.") for name in names if name.startswith("rayalign."))


def as_module(name: str, known: dict[str, Path]) -> str:
    """`env.world.World` -> `env.world`."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def test_every_file_has_its_place_in_the_order() -> None:
    unknown = {name.partition(".")[0] for name in modules()} - set(ORDER)
    assert not unknown, f"add {sorted(unknown)} to ORDER, after everything they import"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name: str) -> None:
    own = ORDER.index(name.partition(".")[0])
    for target in imported(modules()[name]):
        other = target.partition(".")[0]
        assert ORDER.index(other) <= own, f"rayalign/{name} imports rayalign.{target}, which comes after it"


def test_no_two_modules_need_each_other_to_be_imported() -> None:
    known = modules()
    graph = {
        name: {as_module(target, known) for target in imported(path, at_start_only=True)} - {name}
        for name, path in known.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which shows the cycle


def test_importing_the_package_loads_neither_torch_nor_ray_and_takes_less_than_half_a_second() -> None:
    def seconds(code: str) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
            best = min(best, time.perf_counter() - start)
        return best

    heavy = ("torch", "ray", "transformers", "vllm", "numpy", "pyarrow")
    check = f"import sys, rayalign; assert not set({heavy!r}) & set(sys.modules), 'rayalign is not light'"
    assert seconds(check) - seconds("pass") < 0.5


def test_every_public_name_of_the_package_exists() -> None:
    assert {name for name in rayalign.__all__ if getattr(rayalign, name, None) is None} == set()
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        rayalign.runn  # noqa: B018


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        found = MACHINE.search(content.decode("utf-8", errors="replace"))
        assert not found, f"{name} names {found.group()!r}" if found else ""
