"""`rayalign.system.hf` spares scikit-learn's import, and takes nothing away."""

import subprocess
import sys
from pathlib import Path

import pytest

import rayalign


def test_a_model_class_is_imported_without_scikit_learn_and_assisted_decoding_still_finds_it() -> None:
    pytest.importorskip("sklearn")
    code = """
import sys
from rayalign.system.hf import AutoModelForCausalLM, AutoTokenizer
assert "sklearn" not in sys.modules and "pandas" not in sys.modules
from transformers.generation import candidate_generator
from transformers.utils import is_sklearn_available
assert candidate_generator.is_sklearn_available is is_sklearn_available
false_rate, true_rate, _ = candidate_generator.roc_curve([0, 1], [0.1, 0.9])
assert list(false_rate) == [0, 0, 1] and list(true_rate) == [0, 1, 1], (false_rate, true_rate)
assert "sklearn" in sys.modules and is_sklearn_available()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_whatever_the_package_takes_from_the_top_of_transformers_comes_through_hf() -> None:
    files = Path(rayalign.__file__).parent.rglob("*.py")
    direct = [f.name for f in files if "from transformers import" in f.read_text(encoding="utf-8")]
    assert direct == ["hf.py"]
