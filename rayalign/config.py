"""Settings: nested frozen dataclasses, changed by dotted names, written to the run directory and read back.

    {"agent.beta": "0.2", "learner": {"lora": {"rank": 8}}}
        -> changes by section -> each value read as YAML and checked by its field's type -> one `replace` per section

All changes of a section are applied at once, so that a check of `__post_init__` which looks at several fields
sees them together. This file knows no particular setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from docstring_parser import parse_from_object
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from rayalign.errors import ConfigError

Config = TypeVar("Config")


class Setting(NamedTuple):
    """One row of `describe`."""

    name: str
    """Dotted, from the outermost section."""
    type: str
    """As it is written in the source."""
    default: Any
    """`REQUIRED` where there is none."""
    help: str
    """The docstring under the field, on one line."""


class _Marker(Enum):
    REQUIRED = "required"
    ABSENT = "absent"

    def __repr__(self) -> str:
        return f"<{self.value}>"


REQUIRED = _Marker.REQUIRED
ABSENT = _Marker.ABSENT


# -- change -------------------------------------------------------------------------------------------------------
def apply(config: Config, changes: Mapping[str, Any], *, yaml_text: bool = True) -> Config:
    """A copy of `config` with `changes`, whose names are dotted, nested, or both; the later of two wins.

    A text value is read as YAML where its field is not a text (`"10"` -> 10, `"[0.9, 0.95]"` -> a tuple, `"null"` ->
    None) unless `yaml_text` is off. A section may be given as an instance of its class. An optional section that is
    None comes to life with its defaults when one of its fields is named.

    Raises `ConfigError` for an unknown name (with the closest known ones) and for a value of the wrong type;
    what a section's own `__post_init__` raises passes through.
    """
    return _changed(config, list(changes.items()), "", _Reader(config, yaml_text))


class _Reader(NamedTuple):
    """What stays the same all the way down."""

    root: Any
    """The outermost config, whose names are suggested after an unknown one."""
    yaml_text: bool


def _changed(config: Any, changes: list[tuple[str, Any]], prefix: str, reader: _Reader) -> Any:
    """`config` with the changes, in order; `prefix` is its own dotted name and a dot."""
    cls: Any = type(config)
    hints = field_types(cls)
    by_field: dict[str, list[tuple[str, Any]]] = {}
    for name, value in changes:
        head, _, rest = name.partition(".")
        if head not in hints:
            raise ConfigError(_unknown(prefix + name, reader.root))
        by_field.setdefault(head, []).append((rest, value))
    new: dict[str, Any] = {}
    for name, below in by_field.items():
        current, annotation = getattr(config, name), hints[name]
        section = section_type(annotation) or (type(current) if dataclasses.is_dataclass(current) else None)
        if section is not None:
            new[name] = _changed_section(prefix + name, current, section, annotation, below, reader)
        else:
            new[name] = _changed_value(prefix + name, current, annotation, below, reader)
    return dataclasses.replace(config, **new)


def _changed_section(
    name: str, current: Any, section: type, annotation: Any, changes: list[tuple[str, Any]], reader: _Reader
) -> Any:
    inner: list[tuple[str, Any]] = []
    for rest, value in changes:
        if not rest and isinstance(value, str) and reader.yaml_text:
            value = from_yaml_text(value)
        if rest:
            inner.append((rest, value))
        elif isinstance(value, Mapping):
            inner.extend(value.items())
        elif isinstance(value, section) or (value is None and type(None) in typing.get_args(annotation)):
            current, inner = value, []  # the whole section: what came before it is overruled
        else:
            raise ConfigError(
                f"{name}={value!r} is a section: name one of its fields ({name}.{next(iter(field_types(section)))}, "
                f"...), or give a mapping or an instance of {section.__name__}."
            )
    if not inner:
        return current
    return _changed(section() if current is None else current, inner, name + ".", reader)


def _changed_value(name: str, value: Any, annotation: Any, changes: list[tuple[str, Any]], reader: _Reader) -> Any:
    for rest, new in changes:
        if not rest:
            value = check(name, new, annotation, yaml_text=reader.yaml_text)
        elif _is_mapping(annotation):
            text = reader.yaml_text and isinstance(new, str)  # no type says what it means, so YAML does
            value = check(name, {**(value or {}), rest: from_yaml_text(new) if text else new}, annotation)
        else:
            raise ConfigError(_unknown(f"{name}.{rest}", reader.root))
    return value


def _unknown(name: str, root: Any) -> str:
    known = [setting.name for setting in describe(root)]
    last = name.rpartition(".")[2]
    same_last = [k for k in known if k.rpartition(".")[2] == last]
    sections = {".".join(k.split(".")[:i]) for k in known for i in range(1, k.count(".") + 1)}
    close = difflib.get_close_matches(name, [*known, *sorted(sections)], n=3, cutoff=0.75)
    hints = list(dict.fromkeys(same_last + close))[:3]
    hint = f"Did you mean {' or '.join(map(repr, hints))}?" if hints else "`rayalign settings` lists all names."
    return f"{name!r} is not a setting. {hint}"


# -- values -------------------------------------------------------------------------------------------------------
def check(name: str, value: Any, annotation: Any, *, yaml_text: bool = True) -> Any:
    """`value` coerced to the type `annotation`, or `ConfigError` that names the setting, the value and the type."""
    problem = ""
    for reading in _readings(value, annotation, yaml_text):
        if isinstance(reading, bool) and not _accepts_bool(annotation):
            problem = problem or "true and false are not numbers here"
            continue
        try:
            return _adapter(annotation).validate_python(reading)
        except ValidationError as error:
            problem = problem or error.errors()[0]["msg"]
    raise ConfigError(f"{name}={value!r} must be {type_name(annotation)}: {problem}.")


def _readings(value: Any, annotation: Any, yaml_text: bool) -> list[Any]:
    """What `value` may mean, likeliest first."""
    if isinstance(value, os.PathLike):
        return [value, os.fspath(value)]
    if isinstance(value, np.generic):  # sweeps draw numpy numbers
        return [value.item()]
    if not isinstance(value, str) or not yaml_text or annotation is str:
        return [value]
    readings = [from_yaml_text(value)]
    if "," in value and not value.lstrip().startswith(("[", "{")):
        readings.append(from_yaml_text(f"[{value.strip().strip('()')}]"))  # --set learner.adam_betas=0.9,0.95
    return [*readings, value]


def from_yaml_text(text: str) -> Any:
    """What a text means where nothing else says it: YAML, with `1e-4` a number and `none` nothing."""
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if re.fullmatch(r"\s*[-+]?\d+(\.\d*)?[eE][-+]?\d+\s*", text):  # YAML 1.1 takes 5e-7 for a text
        return float(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    unquoted_text = isinstance(value, str) and text[:1] not in "\"'"  # a comment sign in it is part of it
    return text if value is None or unquoted_text else value


def _accepts_bool(annotation: Any) -> bool:
    if annotation in (bool, object, Any):
        return True
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return not issubclass(annotation, int | float)
    return any(_accepts_bool(a) for a in typing.get_args(annotation) if not isinstance(a, str))


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # dataclasses bring their own config
        return TypeAdapter(annotation)


# -- look ---------------------------------------------------------------------------------------------------------
def describe(config: Any) -> list[Setting]:
    """Every setting of a config class (or instance, whose values are then the defaults), sections flattened."""
    return list(_walk(config, ""))


def _walk(config: Any, prefix: str) -> Iterable[Setting]:
    cls = config if isinstance(config, type) else type(config)
    hints, docs = field_types(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        value = _default_of(field) if config is cls else getattr(config, field.name)
        name, annotation = prefix + field.name, hints[field.name]
        section = type(value) if dataclasses.is_dataclass(value) else section_type(annotation)
        if section is None or value is None:
            yield Setting(name, type_name(annotation), value, docs.get(field.name, ""))
        if section is not None:
            yield from _walk(value if isinstance(value, section) else section, name + ".")


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, on one line; a subclass's own wins."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            params = parse_from_object(base).params
            docs |= {p.arg_name: " ".join((p.description or "").split()) for p in params}
    return docs


def section_type(annotation: Any) -> type | None:
    """The dataclass behind `Section` or `Section | None`; None for an ordinary type."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return found[0] if len(found) == 1 else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def type_name(annotation: Any) -> str:
    """An annotation as one would write it.

    >>> type_name(tuple[float, float]), type_name(str | None)
    ('tuple[float, float]', 'str | None')
    """
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    if _is_union(annotation):
        return " | ".join(type_name(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return "None"
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))


def _is_mapping(annotation: Any) -> bool:
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    origins = [typing.get_origin(option) or option for option in options]
    return any(isinstance(origin, type) and issubclass(origin, Mapping) for origin in origins)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting of an instance, or of nested mappings of changes.

    >>> flatten({"learner": {"lora": {"rank": 8}}, "agent.beta": 0.2})
    {'learner.lora.rank': 8, 'agent.beta': 0.2}
    """
    mapping = isinstance(config, Mapping)
    items = config.items() if mapping else [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    values: dict[str, Any] = {}
    for name, value in items:
        nested = isinstance(value, Mapping) if mapping else dataclasses.is_dataclass(value)
        values |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return values


def diff(left: Any, right: Any) -> list[str]:
    """The settings that differ between two instances, one line each: `loop.budget: 100 -> 200`."""
    a, b = flatten(left), flatten(right)
    both = ((name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in {**a, **b})
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in both if old != new]


# -- keep ---------------------------------------------------------------------------------------------------------
def to_plain(config: Any, name: str = "") -> Any:
    """Nested dicts, lists, numbers and texts that YAML and JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        prefix = f"{name}." if name else ""
        return {f.name: to_plain(getattr(config, f.name), prefix + f.name) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, Mapping):
        return {str(key): to_plain(value, f"{name}.{key}") for key, value in config.items()}
    if isinstance(config, list | tuple | set | frozenset):
        return [to_plain(value, name) for value in config]
    if hasattr(config, "item"):  # a numpy number
        return config.item()
    raise ConfigError(
        f"{name}={config!r} can't be written to the run directory, so the run could not be resumed; "
        "use numbers, texts, lists and mappings in settings."
    )


def to_yaml(config: Any) -> str:
    """The whole config as YAML text; `from_yaml` reads it back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)


def read_yaml(text: str) -> dict[str, Any]:
    """The nested values that `to_yaml` wrote, for a look before the classes of the sections are known."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The settings are not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"The settings must be a mapping of names to values, not {type(values).__name__}.")
    return values


def from_yaml(base: type[Config] | Config, text: str) -> Config:
    """The config that `to_yaml` wrote. `base` is its class, or an instance whose sections have the right classes."""
    instance: Any = base() if isinstance(base, type) else base
    return apply(instance, read_yaml(text), yaml_text=False)
