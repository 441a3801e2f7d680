"""`transformers`, imported in two thirds of the time: `from rayalign.system.hf import AutoTokenizer`.

Wherever scikit-learn is installed, `transformers.generation` imports it, and with it SciPy's statistics and pandas, for
one function that assisted decoding may call: a second and more of every process that loads a tokenizer or a model. Here
that function is looked up when it is called, and everything else is as `transformers` has it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import transformers
from transformers import utils

USER = "transformers.generation.candidate_generator"


def _roc_curve(*arguments: Any, **options: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **options)


def _import_without_scikit_learn() -> None:
    """Import the one module that wants it while it seems absent, then give the module what it would have."""
    available = utils.is_sklearn_available
    if USER in sys.modules or "sklearn.metrics" in sys.modules or not available():
        return
    utils.is_sklearn_available = lambda: False
    try:
        module: Any = importlib.import_module(USER)
    finally:
        utils.is_sklearn_available = available
    module.is_sklearn_available, module.roc_curve = available, _roc_curve


_import_without_scikit_learn()


def __getattr__(name: str) -> Any:
    return getattr(transformers, name)
