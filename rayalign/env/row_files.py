"""Rows out of text files, one after the other, each with where it is: what is wrong is named before Ray reads the file.

lines     one JSON object a line        numbers are lines
array     a JSON list of objects        numbers are rows, from 1
CSV       a header, then rows           numbers are lines, the first of a row that has several
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from rayalign.errors import DataError

EXAMPLE = 'e.g. {"prompt": "..."}'

Numbered = Iterator[tuple[int, dict[str, Any]]]
"""Where a row is, and its fields."""


def is_array(path: Path) -> bool:
    """Whether a JSON file is a list, and not one object a line. Raises `DataError` where there is no such file."""
    with _opened(path) as file:
        first = next((line for line in _text(path, file) if line.strip()), "")
    return first.lstrip().startswith("[")


def json_lines(path: Path) -> Numbered:
    """One object a line. Raises `DataError` that names the line."""
    with _opened(path) as file:
        for number, line in enumerate(_text(path, file), start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not valid JSON: {error}. Each line is one object, {EXAMPLE}.") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is a JSON {type(row).__name__}, not an object. Each line is one, {EXAMPLE}.")
            yield number, row


def json_array(path: Path) -> Numbered:
    """The objects of a list. Raises `DataError` that names the row, or the line where the file is no JSON."""
    with _opened(path) as file:
        try:
            rows = json.loads("".join(_text(path, file)))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} begins like a list, but is not valid JSON: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {number} is a JSON {type(row).__name__}, not an object. Each row is one, {EXAMPLE}."
            )
        yield number, row


def csv_header(path: Path) -> list[str]:
    """The names of the columns. Raises `DataError` if there is none, or one twice."""
    with _opened(path) as file:
        names = next(csv.reader(_text(path, file)), [])
    if not names:
        raise DataError(f"{path} is empty. Its first line names the columns, e.g. prompt,reference.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}; give each a name of its own.")
    return names


def csv_rows(path: Path, types: Mapping[str, pa.DataType]) -> Numbered:
    """Rows of texts, None where nothing is between the commas; numbers where `types` has a number for the column.

    Raises `DataError` that names the line.
    """
    names = csv_header(path)
    with _opened(path) as file:
        reader = csv.reader(_text(path, file), strict=True)
        next(reader)
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path} line {number} is not valid CSV: {error}.") from error
            if values is None:
                return
            if not values:  # an empty line
                continue
            if len(values) != len(names):
                raise DataError(
                    f"{path} line {number} has {len(values)} fields, but the header names {len(names)}. A field with a "
                    'comma or a line break in it stands in "quotes".'
                )
            where = f"{path} line {number}"
            yield (
                number,
                {n: _value(v, types.get(n), f"{where}: field {n!r}") for n, v in zip(names, values, strict=True)},
            )


def _value(text: str, kind: pa.DataType | None, where: str) -> Any:
    if not text:
        return None
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return text
    try:
        return int(text) if pa.types.is_integer(kind) else float(text)
    except ValueError:
        raise DataError(f"{where} is {text!r:.80}; it must be a number.") from None


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise DataError(f"env.path={str(path)!r} does not exist.") from None


def _text(path: Path, file: TextIO) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
