"""Conditions on the fields of a record, as a job file writes them: ``language == 'en'``, ``score >= 0.5``."""

import operator
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from actlake.storage.errors import BadInputError

_EXAMPLES = "language == 'en', score >= 0.5 or kind in ['a', 'b']"
_PARTS = re.compile(r"\s*([^\s<>=!]+)\s*(==|!=|<=|>=|<|>|\bnot in\b|\bin\b)\s*(.+)", re.DOTALL)
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One condition: a field, one of ``== != < <= > >= in``, ``not in``, and a value as TOML writes it."""

    field: str
    comparison: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a condition; raise ``BadInputError`` for one that cannot be understood."""
        found = _PARTS.fullmatch(text)
        if found is None:
            raise BadInputError(f"filters: {text!r} is no condition; write e.g. {_EXAMPLES}")
        field, comparison, literal = found.groups()
        try:
            table = tomllib.loads(f"value = {literal}")
        except tomllib.TOMLDecodeError as error:
            raise BadInputError(
                f"filters: in {text!r}, {literal!r} is no value ({error}); text is quoted: {_EXAMPLES}"
            ) from error
        value = table.pop("value")
        is_list, is_order = isinstance(value, list), comparison in _ORDERS
        if table or is_list != comparison.endswith("in") or (is_order and _kind(value) not in (str, float)):
            raise BadInputError(f"filters: {text!r} compares what cannot be compared so; write e.g. {_EXAMPLES}")
        return cls(field=field, comparison=comparison, value=value)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Say whether a record fulfils it; an absent field is equal to nothing, and neither more nor less.

        Raises ``BadInputError`` for an order between values of different kinds.
        """
        found = record.get(self.field)
        if self.comparison in ("==", "!="):
            return _equal(found, self.value) == (self.comparison == "==")
        if self.comparison in ("in", "not in"):
            return any(_equal(found, value) for value in self.value) == (self.comparison == "in")
        if found is None:
            return False
        if _kind(found) is not _kind(self.value):
            condition = f"{self.field} {self.comparison} {self.value!r}"
            raise BadInputError(f"the filter {condition} meets {found!r}; both must be numbers or text")
        return _ORDERS[self.comparison](found, self.value)


def _equal(found: Any, value: Any) -> bool:
    return _kind(found) is _kind(value) and bool(found == value)


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)
