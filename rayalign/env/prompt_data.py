"""Prompts out of JSON, CSV, Parquet or Hugging Face data: checked row by row, read through Ray Data.

    source    what it is                                   checked here, before Ray            read by
    JSONL     *.jsonl, *.ndjson, *.json: one object a line every line, with its number         ray.data.read_json
    JSON      *.json: a list of objects                    every row, with its number          ray.data.from_arrow
    CSV       *.csv: a header, then rows                   every line, with its number         ray.data.read_csv
    Parquet   *.parquet, or a folder of them               the columns                         ray.data.read_parquet
    datasets  a Dataset, a saved one's folder, or a name   the columns                         ray.data.from_huggingface

Whatever the source, each row then goes through `Source.prompts`: through its format if it has one, then `to_prompt`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayalign.env.formats import Format
from rayalign.env.row_files import Numbered, csv_header, csv_rows, is_array, json_array, json_lines
from rayalign.errors import DataError
from rayalign.types import Prompt

PREFERRED = "preferred"
"""Key of `Prompt.meta`: index of the response of `Prompt.pair` that the data says is better."""

JSON_ENDINGS, CSV_ENDING, PARQUET_ENDINGS = (".jsonl", ".ndjson", ".json"), ".csv", (".parquet", ".pq")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of the data is what; only the prompt has to be there."""

    prompt: str = "prompt"
    """A text, or chat messages: a list of {"role", "content"}."""
    reference: str = "reference"
    """A response to compare with in evaluation: a text, or messages of which the last one counts."""
    responses: str = "responses"
    """A list of two given responses."""
    chosen: str = "chosen"
    """With `rejected`: two given responses, where `responses` is not there. Which was chosen is known to
    `oracle.kind=data` alone."""
    rejected: str = "rejected"
    """See `chosen`."""

    def names(self) -> tuple[str, ...]:
        """All column names, the prompt's first."""
        return self.prompt, self.reference, self.responses, self.chosen, self.rejected


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where prompts come from, and how its rows are read."""

    path: Any
    """A file, a folder, a dataset's name or a `datasets.Dataset`."""
    columns: Columns = field(default_factory=Columns)
    """Which column is what; with a format, the names of its records, which are the default ones."""
    split: str = "train"
    """Datasets only: which part of it."""
    revision: str = ""
    """Datasets of a hub only: branch, tag or commit; empty is the newest."""
    format: Format | None = None
    """What makes records of rows; None: they are records."""

    def names(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.columns.names() if self.format is None else tuple(self.format.schema.names)

    def required(self) -> tuple[str, ...]:
        """The columns that have to be there."""
        if self.format is None:
            return (self.columns.prompt,)
        return tuple(name for name in self.format.schema.names if name not in self.format.optional)

    def prompts(self, row: Mapping[str, Any], where: str) -> list[Prompt]:
        """The prompts of one row. Raises `DataError` that begins with `where`."""
        if self.format is None:
            return [to_prompt(row, self.columns, where)]
        try:
            return [to_prompt(record, self.columns, where) for record in self.format.read(row)]
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: {error} Its format is that of {self.format.data}.") from None


def load_prompts(source: Source) -> list[Prompt]:
    """Every prompt of `source`, in its order. Raises `DataError` that names file, line or row, and column.

    Uses the Ray that is running; if none is, one is started for the time of reading.
    """
    with _ray():
        rows = _read(source, check_source(source))
        return [prompt for where, row in rows for prompt in source.prompts(row, where)]


def check_source(origin: Source) -> str:
    """What `origin` is: `json`, `json list`, `csv`, `parquet` or `datasets`.

    Raises `DataError` for what can be seen without Ray.
    """
    source = origin.path
    if hasattr(source, "column_names") and hasattr(source, "features"):
        _check_columns(source.column_names, origin, "the dataset")
        if not len(source):
            raise DataError("the dataset has no rows.")
        return "datasets"
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            f"env.path is a {type(source).__name__}; give a file, a folder, a dataset's name or a datasets.Dataset."
        )
    path = Path(source)
    ending = path.suffix.lower()
    if path.is_dir() and not any(path.glob("*.parquet")):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return check_source(replace(origin, path=_saved(path, origin.split)))
        raise DataError(f"env.path={str(source)!r} is a folder with neither Parquet files nor a saved dataset in it.")
    if path.is_dir() or ending in PARQUET_ENDINGS:
        _check_parquet(path, origin)
        return "parquet"
    if ending in JSON_ENDINGS:
        kind = "json list" if ending == ".json" and is_array(path) else "json"
        _check_rows(path, origin, kind)
        return kind
    if ending == CSV_ENDING:
        _check_columns(csv_header(path), origin, str(path))
        _check_rows(path, origin, "csv")
        return "csv"
    if path.exists():
        raise DataError(
            f"env.path={str(source)!r} ends in {ending!r}; known are "
            f"{', '.join((*JSON_ENDINGS, CSV_ENDING, *PARQUET_ENDINGS))}."
        )
    if ending in (".tsv", ".txt", ".gz", ".zst"):
        raise DataError(f"env.path={str(source)!r} does not exist.")
    return "datasets"


def to_prompt(row: Mapping[str, Any], columns: Columns, where: str) -> Prompt:
    """One row as a `Prompt`, its id a hash of its content. Raises `DataError` that begins with `where`."""
    raw = row.get(columns.prompt)
    if raw is None:
        raise DataError(
            f"{where}: field {columns.prompt!r} is missing. It holds the prompt, as a text or as chat messages."
        )
    messages = None if isinstance(raw, str) else _messages(raw, columns.prompt, where)
    text = raw if messages is None else readable_messages(messages)
    if not text.strip():
        raise DataError(f"{where}: field {columns.prompt!r} is empty.")
    try:
        digest = hashlib.blake2b(
            (text if messages is None else json.dumps(messages)).encode(), digest_size=8
        ).hexdigest()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {columns.prompt!r} is not valid Unicode: {error}.") from error
    reference = row.get(columns.reference)
    pair, preferred = _pair(row, columns, where)
    meta: dict[str, Any] = {} if messages is None else {"messages": messages}
    return Prompt(
        id=digest,
        text=text,
        token_ids=(),
        reference=None if reference is None else _response(reference, columns.reference, where),
        pair=pair,
        meta=meta if preferred is None else {**meta, PREFERRED: preferred},
    )


# -- fields -------------------------------------------------------------------------------------------------------
def _messages(value: Any, field: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise DataError(f"{where}: field {field!r} is {value!r:.80}; it must be a text or a list of chat messages.")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f"{where}: field {field!r} has the message {message!r:.80}; each needs a text 'role' and 'content'."
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def readable_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """What a person or a judge reads of a conversation: one message's text, or each with its role before it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _response(value: Any, field: str, where: str) -> str:
    return value if isinstance(value, str) else _messages(value, field, where)[-1]["content"]


def _pair(row: Mapping[str, Any], columns: Columns, where: str) -> tuple[tuple[str, str] | None, int | None]:
    """Two given responses, and the index of the one that the data says is better, where it has them."""
    responses = row.get(columns.responses)
    if responses is not None:
        if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) != 2:
            raise DataError(
                f"{where}: field {columns.responses!r} is {responses!r:.80}; it must be a list of two responses."
            )
        first, second = (_response(response, columns.responses, where) for response in responses)
        preferred = row.get(PREFERRED)
        return (first, second), preferred if preferred in (0, 1) else None
    chosen, rejected = row.get(columns.chosen), row.get(columns.rejected)
    if (chosen is None) != (rejected is None):
        there, missing = (columns.chosen, columns.rejected) if rejected is None else (columns.rejected, columns.chosen)
        raise DataError(f"{where}: field {there!r} is there, but {missing!r} is missing; a pair needs both.")
    if chosen is None:
        return None, None
    return (_response(chosen, columns.chosen, where), _response(rejected, columns.rejected, where)), 0


# -- checks before Ray --------------------------------------------------------------------------------------------
def _check_rows(path: Path, source: Source, kind: str) -> None:
    """Every row by itself: Arrow's readers would tell neither the line nor the field."""
    kinds: dict[str, tuple[int, str]] = {}
    unit, empty = UNITS[kind], True
    for number, row in _rows(path, source, kind):
        where, empty = f"{path} {unit} {number}", False
        source.prompts(row, where)
        if source.format is not None:
            _check_texts(row, source.format, where)
            continue
        for name in source.columns.names():
            if row.get(name) is not None:
                form = "text" if isinstance(row[name], str) else "list"
                first, expected = kinds.setdefault(name, (number, form))
                if form != expected:
                    raise DataError(
                        f"{where}: field {name!r} is a {form}, but in {unit} {first} it is a {expected}; use one form."
                    )
    if empty:
        why = {"csv": "no row follows its header.", "json list": "its list has no rows."}
        raise DataError(f"{path} is empty: " + why.get(kind, 'each line is one object, e.g. {"prompt": "..."}.'))


UNITS = {"json": "line", "json list": "row", "csv": "line"}
"""Kind of file -> what its rows are counted in."""


def _rows(path: Path, source: Source, kind: str) -> Numbered:
    if kind == "csv":
        return csv_rows(path, _csv_types(source))
    return json_array(path) if kind == "json list" else json_lines(path)


def _check_texts(row: Mapping[str, Any], known: Format, where: str) -> None:
    """Also of the columns that the format takes as they are, such as the value of a clue."""
    for column in known.schema:
        value = row.get(column.name)
        if column.type == pa.string() and not isinstance(value, str | None):
            raise DataError(
                f"{where}: field {column.name!r} is {value!r:.80}; it must be a text. "
                f"Its format is that of {known.data}."
            )


def _check_parquet(path: Path, source: Source) -> None:
    import pyarrow.dataset

    try:
        dataset = pyarrow.dataset.dataset(str(path), format="parquet")
        num_rows = dataset.count_rows()
    except FileNotFoundError:
        raise DataError(f"env.path={str(path)!r} does not exist.") from None
    except pa.ArrowException as error:
        raise DataError(f"env.path={str(path)!r} can't be read as Parquet: {error}.") from error
    _check_columns(dataset.schema.names, source, str(path))
    if not num_rows:
        raise DataError(f"{path} is empty: it has no rows.")


def _check_columns(names: Sequence[str], source: Source, where: str) -> None:
    missing = [name for name in source.required() if name not in names]
    if not missing:
        return
    there = ", ".join(map(repr, names))
    if source.format is not None:
        raise DataError(
            f"{where} has no column {missing[0]!r}, but {there}. env.format reads the columns of {source.format.data}."
        )
    raise DataError(
        f"{where} has no column {missing[0]!r}, but {there}. Set env.prompt_column to the one with prompts."
    )


# -- reading ------------------------------------------------------------------------------------------------------
class _ray:
    """A running Ray: the caller's, left as it is, or one of our own, stopped at the end. Ray Data keeps quiet."""

    def __enter__(self) -> None:
        import ray
        import ray.data

        self.log = logging.getLogger("ray.data")
        self.level = self.log.level
        self.log.setLevel(logging.ERROR)

        self.own = not ray.is_initialized()
        if self.own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            ray.init(log_to_driver=False, configure_logging=False, **local)

    def __exit__(self, *exc: object) -> None:
        import ray

        self.log.setLevel(self.level)
        if self.own:
            ray.shutdown()


def _read(origin: Source, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows in order, each with the words for where it is."""
    import ray.data

    source = origin.path
    name = "the dataset" if not isinstance(source, str | os.PathLike) else str(source)
    if kind == "json":
        import pyarrow.json

        parse = pyarrow.json.ParseOptions(
            explicit_schema=_schema(Path(source), origin, kind), unexpected_field_behavior="ignore"
        )
        data = ray.data.read_json(_absolute(source), file_extensions=None, parse_options=parse)
    elif kind == "json list":
        rows = [row for _, row in json_array(Path(source))]
        data = ray.data.from_arrow(pa.Table.from_pylist(rows, schema=_schema(Path(source), origin, kind)))
    elif kind == "csv":
        import pyarrow.csv

        types = _csv_types(origin)
        convert = pyarrow.csv.ConvertOptions(
            column_types=types,
            include_columns=[name for name in csv_header(Path(source)) if name in types],
            null_values=[""],
            strings_can_be_null=True,
        )
        data = ray.data.read_csv(
            _absolute(source),
            file_extensions=None,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
    elif kind == "parquet":
        import pyarrow.dataset

        there = pyarrow.dataset.dataset(str(source), format="parquet").schema.names
        data = ray.data.read_parquet(_absolute(source), columns=[c for c in origin.names() if c in there])
    else:
        rows = source if hasattr(source, "features") else _saved_or_named(origin)
        data = ray.data.from_huggingface(rows.select_columns([c for c in origin.names() if c in rows.column_names]))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    number = 0
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            number += 1
            yield f"{name} row {number}", row


def _absolute(path: str | os.PathLike[str]) -> str:
    """As Ray's workers find it: they are where Ray was started, which need not be where the run is."""
    return os.path.abspath(path)


def _csv_types(source: Source) -> dict[str, pa.DataType]:
    """The types of the columns that are read: texts where no format says otherwise."""
    known = source.format.schema if source.format is not None else None
    return {name: known.field(name).type if known is not None else pa.string() for name in source.names()}


def _schema(path: Path, source: Source, kind: str) -> pa.Schema:
    """The types of the columns, from the first row that has them: nothing is left to guess (dates, numbers)."""
    if source.format is not None:
        return source.format.schema
    columns = source.columns
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types: dict[str, pa.DataType] = {}
    for _, row in _rows(path, source, kind):
        for name in columns.names():
            value = row.get(name)
            if value is None or name in types:
                continue
            if isinstance(value, str):
                types[name] = pa.string()
            elif name == columns.responses:
                types[name] = pa.list_(pa.string() if isinstance(value[0], str) else messages)
            else:
                types[name] = messages
    return pa.schema(list(types.items()))


def _saved(path: Path, split: str) -> Any:
    """The Dataset that `save_to_disk` left in `path`."""
    datasets = _datasets_library()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library raises, it is about this folder
        raise DataError(f"env.path={str(path)!r} can't be read as a saved dataset: {error}.") from error
    return _choose_split(loaded, split, str(path))


def _saved_or_named(origin: Source) -> Any:
    source, split = origin.path, origin.split
    if Path(source).is_dir():
        return _saved(Path(source), split)
    datasets = _datasets_library()
    try:
        loaded = datasets.load_dataset(str(source), split=split, revision=origin.revision or None)
    except Exception as error:  # no such name, no such split, no network: the library has a dozen types for it
        raise DataError(
            f"env.path={str(source)!r} is no file or folder here, and the datasets library can't load split "
            f"{split!r} of it: {error}"
        ) from error
    check_source(replace(origin, path=loaded))
    return loaded


def _choose_split(loaded: Any, split: str, where: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(
            f"{where} has no split {split!r}, but {', '.join(map(repr, loaded))}. Set env.split to one of them."
        )
    return loaded[split]


def _datasets_library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face data needs the datasets library: pip install rayalign[huggingface].") from error
    return datasets
