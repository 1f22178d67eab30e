"""Frozen dataclasses from JSON values, strictly: every key there, none beside, each of its type."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(wanted: type[T], value: Any) -> T:
    """The dataclass `wanted` of a JSON object.

    Raises:
        ValueError: the first key at fault, with its value and what is allowed.
    """
    return typing.cast(T, _build(wanted, value, ""))


def _build(wanted: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return _object(wanted, value, key)
    if origin is types.UnionType:
        return _one_of(arguments, value, key)
    if origin is typing.Literal:
        return _checked(value in arguments and isinstance(value, type(arguments[0])), value, key, f"one of {list(arguments)}")
    if origin is tuple:
        _checked(isinstance(value, list), value, key, "a list")
        return tuple(_build(arguments[0], one, f"{key}.{i}") for i, one in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        _checked(isinstance(value, dict), value, key, "an object")
        return {name: _build(arguments[1], one, f"{key}.{name}") for name, one in value.items()}
    if wanted is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return float(_checked(number, value, key, "a finite number"))
    if wanted is type(None):
        return _checked(value is None, value, key, "null")
    names = {int: "a whole number", str: "text", bool: "true or false"}
    return _checked(type(value) is wanted, value, key, names[wanted])


def _object(wanted: Any, value: Any, key: str) -> Any:
    _checked(isinstance(value, dict), value, key, "an object")
    kinds = typing.get_type_hints(wanted)
    if differing := sorted(kinds.keys() ^ value.keys()):
        name = f"{key}.{differing[0]}" if key else differing[0]
        raise ValueError(f"{name}: is missing" if differing[0] in kinds else f"{name}: there is no such key")
    return wanted(**{name: _build(kind, value[name], f"{key}.{name}" if key else name) for name, kind in kinds.items()})


def _one_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    faults = []
    for kind in kinds:
        try:
            return _build(kind, value, key)
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(faults[0])


def _checked(right: bool, value: Any, key: str, allowed: str) -> Any:
    if not right:
        raise ValueError(f"{key}={str(value)[:80]!r}: must be {allowed}")
    return value
