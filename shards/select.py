"""Choosing rows when they are read: what users ask for becomes a ``RowFilter``, which gives masks of stored rows."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from actlake.shards.conditions import Condition, IntRange, Labelled, Mask, NormIn, OneOf, PositionIn, Range, StoredRows
from actlake.shards.recompute import statistics_from_rows
from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.rowspace import ROLE_VOID, ROLES, content_hash

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset

#: A value of a document's field.
Label = str | int | float | bool | None

#: Longer descriptions are replaced by their hash, so that the state of a stream stays small.
_MAX_DESCRIPTION = 160


@dataclass(frozen=True, eq=False)
class RowFilter:
    """Which rows of a dataset are chosen: those that fulfil every condition and are not void.

    Thread-safe; pickles with its dataset. Made by ``where``.
    """

    dataset: "ActivationDataset"
    conditions: tuple[Condition, ...]

    def mask(self, shard: int, start: int, n_rows: int) -> Mask:
        """Return bool [n_rows]: which of a shard's stored rows ``start:start + n_rows`` are chosen.

        Reads the chunks of the row columns that the conditions name (they have as many rows as the largest chunk of
        any hook point), for a norm the point's chunks in which a row is still left. Raises as reading rows does.
        """
        rows = StoredRows(self.dataset, shard, start, n_rows)
        chosen = rows.column("role") != ROLE_VOID if rows.has_void else np.ones(n_rows, dtype=np.bool_)
        for condition in sorted(self.conditions, key=lambda condition: condition.cost):
            if not chosen.any():
                break
            chosen &= condition.holds(rows, chosen)
        return chosen

    def describe(self) -> dict[str, Any]:
        """Return the filter as a small dict of JSON values, which ``restored`` reads: under 300 bytes.

        Long conditions are replaced by a hash. The medians that norms are multiples of are kept, 20 bytes each: they
        move when the dataset grows.
        """
        text = json.dumps([condition.to_json() for condition in self.conditions], separators=(",", ":"))
        where = text if len(text) <= _MAX_DESCRIPTION else f"sha256 {content_hash(text)}"
        medians = [condition.median for condition in self.conditions if isinstance(condition, NormIn)]
        return {"where": where, "medians": medians} if medians else {"where": where}

    def restored(self, description: Mapping[str, Any]) -> Self:
        """Return this filter with the medians of a saved description, so that it chooses the rows that it chose then.

        Raises ``BadInputError`` where the conditions are others.
        """
        here, medians = self.describe()["where"], list(description.get("medians", ()))
        norms = [condition for condition in self.conditions if isinstance(condition, NormIn)]
        if here != description.get("where") or len(medians) != len(norms):
            raise BadInputError(
                f"the state is of rows chosen by {description.get('where')}, this stream's by {here}; "
                "use the same conditions in where(...)"
            )
        then = iter(medians)
        conditions = tuple(replace(c, median=next(then)) if isinstance(c, NormIn) else c for c in self.conditions)
        return replace(self, conditions=conditions)

    def __repr__(self) -> str:
        return f"RowFilter({self.describe()['where']})"


def where(
    dataset: "ActivationDataset",
    *,
    position: IntRange | None = None,
    position_from_end: IntRange | None = None,
    role: str | int | Iterable[str | int] | None = None,
    token_id: int | Iterable[int] | None = None,
    token_ids: Iterable[int] | None = None,
    norm: Mapping[str, Range] | None = None,
    **labels: Label | Iterable[Label],
) -> RowFilter:
    """Return the filter of the rows that fulfil all of these; None sets no condition, but of ``labels``.

    Ranges are ``(low, high)``: from low on, below high, None is open. Of several values one is enough.

    Args:
        dataset: whose rows.
        position: place in the sequence as it was run; BOS is 0.
        position_from_end: how many tokens of the sequence come after it: ``(0, 8)`` are the last 8 tokens, rows or not.
        role: name or code of a role, or several.
        token_id: token, or several.
        token_ids: the same.
        norm: by hook point, the norm in multiples of the median norm there, e.g. ``{"layers.9.resid_post": (None,
            10.0)}``. The median is that of the rows that are committed now.
        labels: ``document``, ``source``, or a metadata field that the corpus keeps, e.g. ``category="jailbreak"``; None
            chooses the documents without one. A number or boolean is compared as its JSON text, as it is kept.

    Raises ``UnknownNameError`` for a field, label, role or hook point that does not exist, ``BadInputError`` for an
    empty range or list, or where nothing is asked. Labels and ends of sequences need the corpus: ``NotFoundError``
    where it is gone.
    """
    conditions: list[Condition] = []
    if position is not None:
        conditions.append(PositionIn(range=_int_range("position", position)))
    if position_from_end is not None:
        limits = _int_range("position_from_end", position_from_end)
        conditions.append(PositionIn(range=limits, from_end=True))
    if role is not None:
        conditions.append(OneOf(column="role", values=_roles(role)))
    given = [tokens for tokens in (token_id, token_ids) if tokens is not None]
    conditions.extend(OneOf(column="token_id", values=_integers("token_id", tokens)) for tokens in given)
    conditions.extend(_labelled(dataset, name, label) for name, label in labels.items())
    for point, edges in (norm or {}).items():
        multiples, median = _range(f"norm of {point}", edges), _median(dataset, point)
        conditions.append(NormIn(point=point, range=multiples, median=median))
    if not conditions:
        raise BadInputError("where() without a condition; give one, e.g. position=(4, None)")
    return RowFilter(dataset, tuple(conditions))


def _median(dataset: "ActivationDataset", point: str) -> float:
    found = dataset.statistics(point)
    if found.norm_histogram is None:
        # Stored by an earlier actlake, without norms.
        found = statistics_from_rows(dataset, point)
    return found.median_norm


# --- what users write ---


def _range(what: str, limits: Any) -> tuple[Any, Any]:
    """Check a range and return its ends, numbers or None; ``what`` names it."""
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise BadInputError(f"{what} = {limits!r} is no range; write (low, high), None for an open end, e.g. (4, None)")
    low, high = limits
    for value in (low, high):
        if value is not None and (isinstance(value, bool) or not _is_number(value)):
            raise BadInputError(f"{what} = {limits!r}: {value!r} is no number; write (low, high), None for an open end")
    if low is None and high is None:
        raise BadInputError(f"{what} = (None, None) chooses everything; leave it out, or give one end")
    if low is not None and high is not None and not low < high:
        raise BadInputError(f"{what} = ({low}, {high}) is empty: it goes from {low} on to below {high}")
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not math.isnan(value)


def _int_range(what: str, limits: Any) -> IntRange:
    low, high = _range(what, limits)
    if isinstance(low, float | np.floating) or isinstance(high, float | np.floating):
        raise BadInputError(f"{what} = {limits!r} must be of whole numbers, e.g. (4, None)")
    # From numpy's integers, which are no JSON.
    return None if low is None else int(low), None if high is None else int(high)


def _integers(what: str, given: Any) -> tuple[int, ...]:
    values = np.asarray([given] if np.ndim(given) == 0 else list(given))
    if len(values) == 0:
        raise BadInputError(f"{what} = {given!r} chooses nothing; name at least one")
    if values.dtype.kind not in "iu":
        raise BadInputError(f"{what} = {given!r} must be a whole number or several, e.g. [2, 106]")
    return tuple(np.unique(values).tolist())


def _roles(given: Any) -> tuple[int, ...]:
    several = [given] if isinstance(given, str) or np.ndim(given) == 0 else list(given)
    return _integers("role", [_role(role) for role in several])


def _role(role: Any) -> Any:
    if isinstance(role, str):
        if role not in ROLES:
            raise UnknownNameError(f"no role {role!r}{nearest(role, ROLES)}")
        role = ROLES[role]
    if role == ROLE_VOID:
        raise BadInputError("role = 'void' cannot be chosen: such rows have no activations")
    return role


def _labelled(dataset: "ActivationDataset", name: str, given: Any) -> Labelled:
    known = ("position", "position_from_end", "role", "token_id", "norm", *dataset.corpus.fields)
    if name not in known:
        raise UnknownNameError(
            f"no field {name!r} to choose rows by{nearest(name, known)}; a job's [corpus] metadata says which "
            "fields of the documents are kept"
        )
    several = [given] if given is None or isinstance(given, str | int | float) else list(given)
    if not several:
        raise BadInputError(f"{name} = {given!r} chooses nothing; name at least one value")
    values = {value if value is None or isinstance(value, str) else json.dumps(value) for value in several}
    dataset.corpus.require_values(name, values)
    return Labelled(field=name, values=tuple(sorted(values, key=str)))
