"""Typed configuration trees: strict ``from_dict``/``to_dict`` over dataclasses, YAML files, ``key=value`` overrides.

Unknown keys, wrong types and wrong tags fail with the dotted path and the choices. A union of dataclasses is told
apart by a field ``type`` whose annotation is a ``Literal``. A field that outsiders may extend is annotated with a
registry, ``Annotated[Any, REGISTRY]``: a dict from tag to a class whose attribute ``Config`` is the dataclass, or the
attribute that is named, as in ``Annotated[Any, REGISTRY, "Recipe"]``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from vla_core.errors import VlaError, choices
from vla_core.resources import share

T = TypeVar("T")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # 1e-3 is a text to YAML 1.1


class ConfigError(VlaError):
    """A configuration that does not fit its dataclass."""


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass ``cls`` from plain data; raises :class:`ConfigError` with the dotted path of what is wrong."""
    return typing.cast(T, _decode(cls, data, path))


def to_dict(config: Any) -> Any:
    """Turn a dataclass tree into plain data that :func:`from_dict` reads back equal."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(data).__name__}")
    return data


def config_file(name: Path | str, place: str, what: str) -> Path:
    """The file ``name``, or the shipped one of that name in the folder ``place``, such as "config/train".

    Raises :class:`ConfigError` with the names of those that there are; ``what`` one of them is, such as "recipe".
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = share(place)
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no {what} {str(name)!r}; choices: {choices(p.stem for p in folder.glob('*.yaml'))}, or the "
                          "path of a YAML file")  # fmt: skip
    return path


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``data`` with ``a.b=value`` assignments applied; values are read as YAML."""
    result = to_dict(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {assignment!r}: expected key=value, as in training.steps=1000")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {assignment!r}: {parent} is a value, not a group of keys")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {assignment!r}: {text!r} is not valid YAML") from None
    return typing.cast("dict[str, Any]", result)


def _decode(annotation: Any, data: Any, path: str) -> Any:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        registry = next((extra for extra in extras if isinstance(extra, dict)), None)
        if registry is None:
            return _decode(inner, data, path)
        return _decode_registered(registry, data, path, next((e for e in extras if isinstance(e, str)), "Config"))
    if annotation is Any:
        return data
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(typing.cast("type[Any]", annotation), data, path)
    if origin is Literal:
        return _decode_literal(annotation, data, path)
    if origin in (Union, types.UnionType):
        return _decode_union(annotation, data, path)
    if origin in (list, tuple):
        return _decode_sequence(annotation, data, path)
    if origin is dict:
        return _decode_mapping(annotation, data, path)
    return _decode_scalar(annotation, data, path)


def _decode_dataclass(cls: type[Any], data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(path, f"a group of keys ({choices(f.name for f in dataclasses.fields(cls))})", data)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{_join(path, str(key))}: unknown key; choices: {choices(fields)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)}: missing; it has no default")
    try:
        return cls(**values)
    except ConfigError as error:  # a class's own check knows its field, not its place in the tree
        raise ConfigError(_join(path, str(error)) if path else str(error)) from None


def _decode_registered(registry: Mapping[str, Any], data: Any, path: str, attribute: str) -> Any:
    """A part by its tag; tags that are not registered are looked for in the installed plug-ins."""
    if data is None:
        return None
    tag = data.get("type") if isinstance(data, Mapping) else None
    if isinstance(tag, str) and tag not in registry:
        load_plugins()
    if not isinstance(tag, str) or tag not in registry:
        raise ConfigError(f"{_join(path, 'type')}: found {tag!r}, expected one of {choices(registry)}")
    config: Any = getattr(registry[tag], attribute, None)
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"{_join(path, 'type')}: {tag!r} is registered without a dataclass as its {attribute}")
    return _decode(config, data, path)


def load_plugins() -> None:
    """Import the modules of the entry points ``vla_ros.plugins`` of installed packages; they register their parts."""
    for point in entry_points(group="vla_ros.plugins"):
        point.load()


def _decode_literal(annotation: Any, data: Any, path: str) -> Any:
    if data not in get_args(annotation):
        raise _wrong(path, f"one of {choices(get_args(annotation))}", data)
    return data


def _decode_union(annotation: Any, data: Any, path: str) -> Any:
    options = [option for option in get_args(annotation) if option is not type(None)]
    if data is None:
        if len(options) == len(get_args(annotation)):
            raise _wrong(path, "a value", data)
        return None
    if len(options) == 1:
        return _decode(options[0], data, path)
    if all(dataclasses.is_dataclass(option) for option in options):
        tagged = {tag: option for option in options for tag in _tags(option)}
        tag = data.get("type") if isinstance(data, Mapping) else None
        if not isinstance(tag, str) or tag not in tagged:
            raise ConfigError(f"{_join(path, 'type')}: found {tag!r}, expected one of {choices(tagged)}")
        return _decode(tagged[tag], data, path)
    for option in options:
        try:
            return _decode(option, data, path)
        except ConfigError:
            continue
    raise _wrong(path, " or ".join(getattr(option, "__name__", str(option)) for option in options), data)


def _tags(cls: Any) -> tuple[Any, ...]:
    return get_args(typing.get_type_hints(cls)["type"])


def _decode_sequence(annotation: Any, data: Any, path: str) -> Any:
    if not isinstance(data, list | tuple):
        raise _wrong(path, "a list", data)
    items = get_args(annotation)
    if get_origin(annotation) is list:
        return [_decode(items[0], value, f"{path}[{i}]") for i, value in enumerate(data)]
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], value, f"{path}[{i}]") for i, value in enumerate(data))
    if len(items) != len(data):
        raise _wrong(path, f"{len(items)} values", data)
    return tuple(_decode(item, value, f"{path}[{i}]") for i, (item, value) in enumerate(zip(items, data, strict=True)))


def _decode_mapping(annotation: Any, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(path, "a group of keys", data)
    _, value_type = get_args(annotation)
    return {str(key): _decode(value_type, value, _join(path, str(key))) for key, value in data.items()}


def _decode_scalar(annotation: Any, data: Any, path: str) -> Any:
    if annotation is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if annotation is float and isinstance(data, str) and _EXPONENT.fullmatch(data):
        return float(data)
    if annotation is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if annotation in (bool, str) and isinstance(data, annotation):
        return data
    if annotation not in (bool, str, int, float):
        raise TypeError(f"{path}: config fields cannot have type {annotation}")
    raise _wrong(path, f"a value of type {annotation.__name__}", data)


def _wrong(path: str, expected: str, data: Any) -> ConfigError:
    return ConfigError(f"{path or '(top)'}: expected {expected}, found {data!r}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
