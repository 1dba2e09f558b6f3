"""``actlake cp``, ``rm`` and ``gc``: copying datasets between stores, removing them, and finding what is nobody's."""

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.cli.options import AsJson, Options, parse_options
from actlake.jobs.cli.progress import bars
from actlake.jobs.units import count_of, format_nbytes
from actlake.storage.errors import BadInputError, NotFoundError

if TYPE_CHECKING:
    # numpy and pyarrow would take most of the start of a command that needs neither.
    from actlake.jobs.litter import Findings, Litter
    from actlake.jobs.removal import Inventory
    from actlake.jobs.transfer import CopyReport, Selection
    from actlake.jobs.transfer_split import SplitReport
    from actlake.storage.stores import Store

#: Objects of one kind that ``gc`` names.
_SHOWN = 10

Url = Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset or a corpus.", show_default=False)]


@app.command()
def cp(
    source: Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset or a corpus.", show_default=False)],
    target: Annotated[str, typer.Argument(help="Where the copy shall lie.", show_default=False)],
    points: Annotated[
        list[str] | None,
        typer.Option("--points", "--point", help="Hook points or patterns to copy, e.g. 'layers.9.*'; default: all."),
    ] = None,
    shards: Annotated[str | None, typer.Option(metavar="A:B", help="Copy the shards from A to B - 1 alone.")] = None,
    heldout: Annotated[bool, typer.Option("--heldout/--no-heldout", help="Copy the held-out split too.")] = True,
    with_corpus: Annotated[bool, typer.Option("--with-corpus", help="Copy the corpus too.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Copy over shards that are committed there with other content.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that copy; default: by the stores.")] = None,
    options: Options = None,
    from_option: Annotated[
        list[str] | None, typer.Option(metavar="X", help="As -O, for the source's file system alone.")
    ] = None,
    to_option: Annotated[
        list[str] | None, typer.Option(metavar="X", help="As -O, for the target's file system alone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a dataset, or some of its hook points and shards, to another place; run it again to go on or to follow.

    Exit code 1 where the source lacks shards that were asked for, 2 where something is damaged or differs.
    """
    from actlake.jobs.transfer import Selection
    from actlake.storage.stores import Store

    start, stop = parse_shards(shards)
    selection = Selection(
        points=tuple(points or ()), start=start, stop=stop, heldout=heldout, corpus=with_corpus, replace=replace
    )
    both = parse_options(options)
    places = Store(source, both | parse_options(from_option)), Store(target, both | parse_options(to_option))
    report = _copy(*places, selection, workers)
    if as_json:
        typer.echo(json.dumps(_as_json(report), indent=1))
    else:
        _print_copy(report)
    if report.failures or report.n_missing:
        raise typer.Exit(2 if report.failures else 1)


def parse_shards(text: str | None) -> tuple[int, int | None]:
    """Return the ends of ``"A:B"``, either of which may be left out; raise ``BadInputError`` for anything else."""
    if text is None:
        return 0, None
    start, colon, stop = text.partition(":")
    ends = [int(end) if end.isdecimal() else None for end in (start, stop)]
    if not colon or any(end is None and word for end, word in zip(ends, (start, stop), strict=True)):
        raise BadInputError(f"--shards {text!r} is no range of shards; write e.g. 0:16, 16: or :16")
    return ends[0] or 0, ends[1]


def _copy(source: "Store", target: "Store", selection: "Selection", workers: int | None) -> "CopyReport":
    from actlake.jobs.catalog import explain
    from actlake.jobs.transfer import Progress, copy_any

    class Shown(Progress):
        """A bar for each part of a copy."""

        def begin(self, part: str, nbytes: int) -> None:
            self.task = shown.add_task("copy", total=nbytes, detail=part)

        def advance(self, nbytes: int) -> None:
            shown.advance(self.task, nbytes)

    with bars(ERRORS) as shown:
        try:
            return copy_any(source, target, selection, n_workers=workers, progress=Shown())
        except NotFoundError as error:
            if source.exists("spec.json") or (found := explain(source)) is None:
                raise
            raise NotFoundError(f"no dataset and no corpus at {source.url}: {found}") from error


def _as_json(report: "CopyReport") -> dict[str, Any]:
    return asdict(report) | {"complete": all(split.complete for split in report.splits)}


def _print_copy(report: "CopyReport") -> None:
    if report.corpus is not None:
        there = f", {report.corpus.n_present} were there" if report.corpus.n_present else ""
        OUT.print(
            f"corpus: {report.corpus.n_copied} files, {format_nbytes(report.corpus.nbytes)}, copied to "
            f"{report.corpus.target}{there}"
        )
    for split in report.splits:
        _print_split(split)
    if report.splits and report.corpus is None and report.corpus_url:
        OUT.print(f"the texts stay at {report.corpus_url}; --with-corpus brings them along")


def _print_split(split: "SplitReport") -> None:
    there = f", {split.n_present} were there" if split.n_present else ""
    OUT.print(
        f"{split.split}: {count_of(split.n_copied, 'shard')}, {format_nbytes(split.nbytes)}, copied to {split.target}"
        f"{there}; it is {'complete' if split.complete else 'not complete'}"
    )
    if split.missing_shards:
        shown = ", ".join(map(str, split.missing_shards[:10])) + (", ..." if split.missing_shards[10:] else "")
        ERRORS.print(
            f"{split.source} lacks {len(split.missing_shards)} of these shards: {shown}; 'actlake ingest' builds them, "
            "then copy again",
            style="yellow",
        )
    for failure in split.failures:
        ERRORS.print(f"not copied: {failure}", style="red")


# --- rm --------------------------------------------------------------------------------------------------------------


@app.command()
def rm(
    url: Url,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only say what would go.")] = False,
    corpus: Annotated[bool, typer.Option("--corpus", help="Remove the corpus of the dataset too.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Remove a corpus that datasets beside it are made from.")
    ] = False,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Remove a dataset, with its held-out split, or a corpus. Objects that are not actlake's stay, and are named.

    Exit code 2 without --yes, and where a corpus is still in use.
    """
    from actlake.jobs.removal import corpus_of, remove, survey, users_of
    from actlake.storage.stores import Store

    places = [Store(url, parse_options(options))]
    found = [survey(places[0])]
    if corpus and found[0].kind == "dataset" and (place := corpus_of(places[0])) is not None:
        places.append(place)
        found.append(survey(place))
    for place, inventory in zip(places, found, strict=True):
        users = [] if force or inventory.kind != "corpus" else [u for u in users_of(place) if u != places[0].url]
        if users:
            raise BadInputError(
                f"{place.url} is the corpus of {', '.join(users[:5])}{', ...' if users[5:] else ''}; remove these "
                "first, or say --force: their rows stay readable, their texts do not"
            )
    if not as_json:
        _print_inventories(found, yes)
    if yes:
        with bars(ERRORS) as progress:
            for place, inventory in zip(places, found, strict=True):
                task = progress.add_task("remove", total=inventory.n_objects, detail=inventory.kind)
                remove(place, partial(progress.advance, task))
    if as_json:
        typer.echo(json.dumps({"removed": yes, "places": [asdict(inventory) for inventory in found]}, indent=1))
    if not yes:
        raise BadInputError("nothing was removed; say --yes to remove it")


def _print_inventories(found: "list[Inventory]", yes: bool) -> None:
    for inventory in found:
        verb = "removing" if yes else "would remove"
        OUT.print(
            f"{verb} the {inventory.kind} {inventory.url}: {inventory.n_objects:,} objects, "
            f"{format_nbytes(inventory.nbytes)}"
        )
        if inventory.n_foreign:
            more = (
                f" and {inventory.n_foreign - len(inventory.foreign)} more"
                if inventory.n_foreign > len(inventory.foreign)
                else ""
            )
            ERRORS.print(f"not actlake's, so it stays: {', '.join(inventory.foreign)}{more}", style="yellow")


# --- gc --------------------------------------------------------------------------------------------------------------


@app.command()
def gc(
    url: Annotated[str, typer.Argument(help="Path or fsspec URL of a dataset or corpus, or of a folder of them.")],
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this, only list it.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Leave what is younger: a job may be at work on it. E.g. 90s, 30min, 2d.")
    ] = "1h",
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """List what killed runs left and no reader looks at, and objects that are not actlake's; delete the former.

    Deletes nothing without --delete, and never what is not actlake's.
    """
    from actlake.jobs.litter import delete_litter, find_litter
    from actlake.storage.stores import Store

    found, results = Store(url, parse_options(options)), []
    for findings in find_litter(found, older_than_s=parse_age(older_than)):
        deleted: list[Litter] = []
        if delete:
            delete_litter(findings, deleted.append)
        results.append(_result(findings, deleted))
        if not as_json:
            _print_findings(results[-1], delete, older_than)
    if as_json:
        typer.echo(json.dumps(results, indent=1))


def parse_age(text: str) -> float:
    """Return the seconds that ``"90s"``, ``"30min"``, ``"1h"`` or ``"2d"`` means; raise ``BadInputError`` else."""
    units = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]+)", text.strip())
    if match is None or match[2] not in units:
        raise BadInputError(f"--older-than {text!r} is no age; write e.g. 90s, 30min, 1h or 2d")
    return float(match[1]) * units[match[2]]


def _result(findings: "Findings", deleted: "list[Litter]") -> dict[str, Any]:
    gone = {item.key for item in deleted}
    items = [
        {
            "kind": item.kind,
            "key": item.key,
            "nbytes": item.nbytes,
            "modified": None if item.modified is None else datetime.fromtimestamp(item.modified, UTC).isoformat(),
            "young": item.young,
            "deleted": item.key in gone,
        }
        for item in findings.litter
    ]
    return {"url": findings.store.url, "kind": findings.kind, "litter": items}


def _print_findings(result: dict[str, Any], delete: bool, older_than: str) -> None:
    from actlake.jobs.litter import KINDS

    items = result["litter"]
    OUT.print(f"{result['kind']} {result['url']}: {'nothing to collect' if not items else ''}".rstrip(": "))
    for kind, meaning in KINDS.items():
        chosen = [item for item in items if item["kind"] == kind]
        if not chosen:
            continue
        young, gone = (sum(item[name] for item in chosen) for name in ("young", "deleted"))
        nbytes = sum(item["nbytes"] for item in chosen)
        state = f", {gone:,} deleted" if delete and kind != "foreign" else ""
        state += f", {young:,} younger than {older_than} stay" if young and kind != "foreign" else ""
        OUT.print(f"  {kind}: {len(chosen):,} objects, {format_nbytes(nbytes)}{state} ({meaning})")
        for item in chosen[:_SHOWN]:
            OUT.print(f"    {item['key']}")
        if chosen[_SHOWN:]:
            OUT.print(f"    ... and {len(chosen) - _SHOWN:,} more (--json lists all)")
    if not delete and any(item["kind"] != "foreign" and not item["young"] for item in items):
        OUT.print("nothing was deleted; --delete does it")
