"""`export`: a finished run as others use it. Weights or adapter, tokenizer, preferences, and a card with the rest.

    DIR/
      README.md                    model card
      config.json, *.safetensors   the policy, adapters merged in; or adapter_config.json, adapter_model.safetensors
      tokenizer files
      preferences/                 a dataset for `datasets` and TRL

It appears whole or not at all, and only after what was written has been loaded again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rayalign import storage
from rayalign.config import read_yaml
from rayalign.errors import ConfigError, DataError
from rayalign.ledger.ledger import Ledger
from rayalign.models import hub_id
from rayalign.rollout.encode import load_tokenizer
from rayalign.runs.preference_export import export_preferences
from rayalign.runs.record import REPLAY, RunRecord
from rayalign.runs.result import Result
from rayalign.runs.stored import StoredRun
from rayalign.system.cache import built_once

ADAPTER = "adapter"
"""Folder of the adapters in a run's checkpoint."""
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    adapter: bool = False,
    base_model: str | None = None,
    conversational: bool | None = None,
) -> Path:
    """Write what a finished run made into the new or empty directory `out`; returns it.

    Args:
        run_dir: of a finished run or replay; a folder, or a URI in a bucket.
        out: nothing in it is ever overwritten.
        adapter: the adapters alone; the run must have trained adapters (`learner.lora.rank`).
        base_model: the hub's id of the initial policy, for the card and the adapter; default: what its directory says.
        conversational: preferences as chat messages; default: where the policy was prompted through a chat template.

    Raises:
        DataError: the run is not finished, or `out` is not empty, or what was written can't be loaded again.
        ConfigError: adapters are asked for, and the run has none.
    """
    storage.local_only(out, "out")
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"out={str(out)!r} is there already; name a new or an empty directory: nothing is overwritten.")
    result = Result.load(run_dir)  # of a run in a bucket the only download; the rest is read from its copy
    record, stored = RunRecord.read(result.path), StoredRun.read(result.path)
    if adapter and not (result.checkpoint / ADAPTER).is_dir():
        raise ConfigError(
            f"--adapter: {storage.plain(run_dir)!r} trained all weights (learner.lora.rank=0): there is no adapter. "
            "Leave it out."
        )
    base = base_model or hub_id(stored.config.policy)
    chat = stored.config.rollout.chat
    if conversational is not None:
        chat = "always" if conversational else "never"

    def build(folder: Path) -> None:
        if adapter:
            _copy_adapter(result.checkpoint, folder, base)
        else:
            shutil.copytree(result.checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ADAPTER))
        rows, price, conversational = _preferences(stored, folder / "preferences", result.checkpoint, chat)
        write_card(
            folder,
            record,
            stored,
            base_model=base,
            adapter=adapter,
            price=price,
            rows=rows,
            conversational=conversational,
        )
        check_loads(folder, stored.config.policy if adapter else None)

    from rayalign.after.model_card import write_card  # huggingface_hub and jinja take their time

    if target.exists():
        target.rmdir()
    return built_once(target, build)


def _copy_adapter(checkpoint: Path, folder: Path, base: str | None) -> None:
    """The adapter, the base model's name in it, and the tokenizer."""
    shutil.copytree(checkpoint / ADAPTER, folder, dirs_exist_ok=True)
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ADAPTER, *MODEL_FILES))
    if base is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}, indent=2))


def _preferences(stored: StoredRun, folder: Path, policy: Path, chat: str) -> tuple[int, float | None, bool]:
    """Write the dataset; returns its rows, what the labels cost where the run paid for them itself, and its format."""
    import pyarrow.parquet as parquet

    named, which = str(stored.path / "ledger.arrow"), {}
    if stored.is_replay:
        used = read_yaml((stored.path / REPLAY).read_text())
        named, which = used["ledger"], {"batches": used["batches"], "synthetic": used["synthetic"]}
    source = storage.fetched_ledger(named)
    if not source.exists():
        raise DataError(f"the labels of {str(stored.path)!r} are not where they were: {named} does not exist.")
    conversational = export_preferences(source, folder, policy, chat, **which)
    with Ledger(source, read_only=True) as ledger:
        price = None if stored.is_replay else ledger.price
    table = parquet.read_metadata(folder / "preferences.parquet")
    (folder / "README.md").write_text(
        f"---\ntags: [preference, rayalign, trl]\ntask_categories: [text-generation]\n---\n"
        f"{table.num_rows:,} preferences, in the {'conversational' if conversational else 'standard'} format of TRL: "
        "`prompt`, `chosen`, `rejected`. `source` says whether an oracle was paid for the label or the agent gave it "
        "itself (`synthetic`); `probability` is what the oracle said that the first of the two shown would win.\n"
    )
    return table.num_rows, price, conversational


def check_loads(folder: Path, base: str | None = None) -> None:
    """Load `folder` as its users will: a model, or an adapter on the model in `base`. `DataError` if that fails."""
    from rayalign.system.hf import AutoModelForCausalLM

    load_tokenizer(folder)
    try:
        if base is not None:
            from peft import PeftModel

            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
            return
        _, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    except Exception as error:  # whatever the library raises, it is about this folder
        raise DataError(f"what was exported can't be loaded again: {error}. Nothing was left in its place.") from error
    if bad := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise DataError(f"what was exported does not fit its own config: {bad}. Nothing was left in its place.")
