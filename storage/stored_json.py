"""Reading JSON that others stored: strict, of bounded size, and its fields of the types that they are declared with.

A bucket may be hostile. What ``json`` and dataclasses let pass (a text where a number belongs, NaN, a field given
twice, nesting without end) would surface somewhere else, as an error that names no object.
"""

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

#: No metadata object of ours is larger: ``corpus.json`` of a million files has 100 MB, a commit record 50 kB.
MAX_NBYTES = 256 << 20

#: Numbers beyond it fit no column of a manifest. A seed may be larger: its spec looks at it.
_INTEGERS = range(-(2**63), 2**64)

#: Types of the fields of each dataclass that was asked for: finding them takes longer than looking at a record.
_known_hints: dict[type[Any], dict[str, Any]] = {}


def parse_object(data: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object that these bytes are.

    Raises ``ValueError`` for anything else, with the reason: no JSON, no object, not-a-number, a field given twice,
    nesting too deep, a number beyond 64 bits, half of a surrogate pair.
    """
    text = bytes(data).decode()
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # A UnicodeEncodeError is a ValueError.
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    # A hundred digits: a number of a million would take minutes.
    if len(digits) > 100 or int(digits) not in _INTEGERS:
        raise ValueError(f"{digits[:30]}... does not fit 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:30]} does not fit 64 bits")
    return value


def require_fields(cls: type[Any], value: Mapping[str, Any], skip: Iterable[str] = ()) -> Mapping[str, Any]:
    """Return the fields of a dataclass as JSON gave them, if each is of its declared type; others are let be.

    Whole numbers below 2**53 serve as floats, lists as tuples. Those in ``skip`` have types of their own. Raises
    ``TypeError``.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.80} is no object")
    hints = _hints(cls)
    for name, item in value.items():
        if name in hints and name not in skip and not _is(hints[name], item):
            raise TypeError(f"{name} = {item!r:.80} is no {getattr(hints[name], '__name__', hints[name])}")
    return value


def _hints(cls: type[Any]) -> dict[str, Any]:
    if cls not in _known_hints:
        hints = get_type_hints(cls)
        _known_hints[cls] = {item.name: hints[item.name] for item in fields(cls)}
    return _known_hints[cls]


def _is(hint: Any, value: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(one, value) for one in inner)
    if origin is tuple:
        return isinstance(value, list) and all(_is(inner[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_is(inner[1], item) for item in value.values())
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
