"""What the commands that look at datasets have in common: their arguments, how a dataset is opened, and tables."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import actlake
from actlake.storage.errors import BadInputError, NotFoundError

if TYPE_CHECKING:
    # numpy and pyarrow would take most of the start of a command that needs neither.
    from actlake.shards.dataset import ActivationDataset

Dataset = Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        "-O",
        help="KEY=VALUE or a JSON object for the file system; may be repeated.",
        metavar="X",
    ),
]


def parse_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """Return storage options from ``key=value`` (a value that is JSON is read as such) and JSON objects."""
    found: dict[str, Any] = {}
    for text in texts or ():
        if text.lstrip().startswith("{"):
            found |= _json_object(text)
            continue
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            # Not repeated: it may be a credential.
            raise BadInputError("a --storage-option is neither KEY=VALUE nor a JSON object")
        found[key.strip()] = _value(value)
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise BadInputError(f"a --storage-option is no JSON object ({error})") from None
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def open_dataset(url: str, options: Sequence[str] | None = None) -> "ActivationDataset":
    """Open a dataset; where there is none, say what else is there."""
    parsed = parse_options(options)
    with explaining(url, parsed):
        return actlake.open(url, parsed)


@contextmanager
def explaining(url: str, options: Mapping[str, Any] | None) -> Iterator[None]:
    """Add to the error of a URL without a dataset what is there."""
    try:
        yield
    except NotFoundError as error:
        from actlake.jobs.catalog import explain
        from actlake.storage.stores import Store

        if (found := explain(Store(url, options))) is None:
            raise
        raise NotFoundError(f"no dataset at {url}: {found}") from error


def print_table(names: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table in its natural width: nothing is cut, whatever reads it, and a terminal wraps long lines."""
    table = Table(*names, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    Console(width=100_000, highlight=False).print(table)
