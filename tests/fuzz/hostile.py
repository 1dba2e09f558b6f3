"""Values and bytes that somebody hostile would store, as Hypothesis strategies over what is sound."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

#: What a field may be instead. Numbers at the edges of types, names that leave their folder, wrong types, deep nesting.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        255,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        -(2**63),
    ),
    *(0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 1e30),
    *("", "0", "x", "train", "heldout", "a\0b", "..", "../..", "../../../../etc", "/etc/passwd", "\\\\host\\share"),
    *(
        "\uff0e\uff0e\uff0fetc",
        "\u2215etc",
        "%2e%2e%2fetc",
        "\ud800",
        "\u202egnp",
        "layers.0.attn_z",
        "layers.1.resid_post",
    ),
    *("file:///etc", "http://127.0.0.1:9/x", "s3://other/x", "gs://other/x", "memory://x", "simplecache::http://h/x"),
    *("bfloat16", "float32", "none", "blosc", "__class__", "{0.__class__}", "x" * 10_000),
    *([], [[]], [None], [1, 2, 3], ["a"], {}, {"a": 1}, {"": {}}, [2**63] * 3, ["layers.0.attn_z"] * 2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON tree, the whole first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = copy.deepcopy(value)
    at(made, path[:-1])[path[-1]] = new
    return made


def without(value: Any, path: tuple[Any, ...]) -> Any:
    made = copy.deepcopy(value)
    del at(made, path[:-1])[path[-1]]
    return made


def json_values(sound: Any) -> st.SearchStrategy[Any]:
    """Return JSON trees that differ from a sound one in one to three places."""
    paths = list(places(sound))

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        value = sound
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths))
            try:
                old = at(value, path)
            except (KeyError, IndexError, TypeError):
                continue  # An earlier change took it away.
            if path and not isinstance(at(value, path[:-1]), dict | list):
                continue  # An earlier change put a text there, whose characters have places too.
            how = draw(st.integers(0, 5))
            if how == 0 and path:
                value = without(value, path)
            elif how == 1 and isinstance(old, int) and not isinstance(old, bool):
                value = replaced(value, path, old + draw(st.sampled_from((-1, 1, 2**16, 2**40, -(2**40)))))
            elif how == 2:
                value = replaced(value, path, at(sound, draw(st.sampled_from(paths))))
            elif how == 3 and isinstance(old, dict):
                value = replaced(value, path, old | {draw(st.sampled_from(("x", "", "__proto__", "name"))): 1})
            else:
                value = replaced(value, path, draw(st.sampled_from(VALUES)))
        return value

    return changed()


def json_texts(sound: bytes, encode: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """Return what may be stored instead of a sound JSON object: other values, other text, other bytes."""
    values = json_values(json.loads(sound)).map(encode)
    return st.one_of(values, values, values, _odd_texts(sound), torn(sound))


def _odd_texts(sound: bytes) -> st.SearchStrategy[bytes]:
    text = sound.decode()
    first = text.index('"')
    last = text.rindex("}")
    odd = (
        b"",
        b"null",
        b"{}",
        b"[]",
        b"\xef\xbb\xbf" + sound,
        text.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        (text[:last] + ',"deep":' + "[" * 5_000 + "]" * 5_000 + "}").encode(),
        (text[:last] + ',"n_rows": ' + "9" * 5_000 + "}").encode(),
        (text[:last] + ',"n_rows": 1, "n_rows": 2}').encode(),
        (text[:first] + text[first:].replace("1", "NaN", 1)).encode(),
        (text[:last] + ',"x": "' + "y" * 1_000_000 + '"}').encode(),
        b"\0" * 1000,
        b" " * 5_000_000,
    )
    return st.sampled_from(odd)


def torn(sound: bytes) -> st.SearchStrategy[bytes]:
    """Return bytes that are cut short, changed in places, or have others put in."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        data = bytearray(sound)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(0, len(data) - 1)))
            how = draw(st.integers(0, 4))
            if how == 0:
                del data[place:]
            elif how == 1:
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            elif data:
                data[place] = draw(st.integers(0, 255))
        return bytes(data)

    return changed()


# --- Parquet -------------------------------------------------------------------------------------------------------

#: Of one column, another that has its name.
Column = Callable[[pa.ChunkedArray], pa.Array | pa.ChunkedArray]

_COLUMNS: tuple[Column, ...] = (
    lambda column: pa.nulls(len(column), column.type),
    lambda column: pa.nulls(len(column)),
    lambda column: pa.array(["x"] * len(column)),
    lambda column: pa.array([-1] * len(column), pa.int64()),
    lambda column: pa.array([2**63 - 1] * len(column), pa.int64()),
    lambda column: pa.array([-(2**63)] * len(column), pa.int64()),
    lambda column: pa.array([float("nan")] * len(column)),
    lambda column: pa.array([[1.0] * 3] * len(column), pa.list_(pa.float64())),
    lambda column: pa.array([[]] * len(column), pa.list_(pa.float64())),
    lambda column: pa.chunked_array([column.take(pa.array(range(len(column))[::-1], pa.int64()))]),
    lambda column: column.take(pa.array([0] * len(column))) if len(column) else column,
)
#: Kept at the column's own type: what only the values tell.
_VALUES: tuple[Any, ...] = (
    -1,
    0,
    1,
    2**31 - 1,
    2**62,
    -(2**62),
    float("nan"),
    float("inf"),
    "..",
    "/x",
    "x" * 100,
    [],
    None,
)


def parquet_files(sound: bytes) -> st.SearchStrategy[bytes]:
    """Return what may be stored instead of a sound Parquet object: other columns, other rows, other bytes."""
    table = pq.read_table(pa.BufferReader(sound))
    return st.one_of(_other_tables(table), _other_tables(table), torn(sound), st.sampled_from(_odd_files(table)))


def _other_tables(table: pa.Table) -> st.SearchStrategy[bytes]:
    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        made = table
        for _ in range(draw(st.integers(1, 2))):
            if not made.num_columns:
                break
            place = draw(st.integers(0, made.num_columns - 1))
            name, column = made.column_names[place], made.column(place)
            how = draw(st.integers(0, 5))
            if how == 0:
                made = made.drop_columns([name])
            elif how == 1:
                made = pa.concat_tables([made] * draw(st.integers(2, 4)))
            elif how == 2:
                made = made.slice(0, draw(st.integers(0, max(0, len(made) - 1))))
            elif how == 3:
                made = made.set_column(place, name, draw(st.sampled_from(_COLUMNS))(column))
            else:
                made = made.set_column(place, name, _with_value(draw, column))
        return encode(made)

    return changed()


def _with_value(draw: st.DrawFn, column: pa.ChunkedArray) -> Any:
    values = column.to_pylist()
    if not values:
        return column
    place = draw(st.integers(0, len(values) - 1))
    value = draw(st.sampled_from(_VALUES))
    if isinstance(values[place], list) and not isinstance(value, list):
        inner = list(values[place])
        value = [*inner[:-1], value, value][: draw(st.integers(0, len(inner) + 1))]
    values[place] = value
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return column  # No value of that type.


def _odd_files(table: pa.Table) -> tuple[bytes, ...]:
    # A million equal rows are a few hundred bytes: what a reader makes of them is not.
    many = pa.concat_tables([table.slice(0, 1)] * 1000) if len(table) else table
    return (
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PAR1\xff\xff\xff\x7fPAR1",
        encode(table.slice(0, 0)),
        encode(pa.table({"x": [1]})),
        encode(many),
        encode(table.replace_schema_metadata({"x" * 1000: "y" * 100_000})),
    )


def encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
