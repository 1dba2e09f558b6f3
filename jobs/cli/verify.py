"""``actlake verify``: whether a dataset is whole, and un-committing what is not."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.text import Text

from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.cli.options import AsJson, Dataset, Options, explaining, parse_options
from actlake.jobs.cli.progress import bars
from actlake.jobs.units import count_of, format_nbytes
from actlake.storage.errors import BadInputError, DataError, NotFoundError

if TYPE_CHECKING:
    # numpy and pyarrow would take most of the start of a command that needs neither.
    from actlake.shards.dataset import ActivationDataset
    from actlake.shards.verify import Problem, VerifyReport
    from actlake.storage.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What ``verify`` is to do."""

    deep: bool = True
    sample: float = 1.0
    repair: bool = False
    rerun: int = 0
    model: str | None = None
    device: str = "cpu"
    address: str | None = None
    quiet: bool = False


@app.command()
def verify(
    dataset: Dataset,
    deep: Annotated[
        bool, typer.Option("--deep/--quick", help="Read every byte, or only records, sizes and shard indexes.")
    ] = True,
    sample: Annotated[str, typer.Option(help="The share of the shards that is read whole, e.g. 1%.")] = "100%",
    repair: Annotated[
        bool, typer.Option("--repair", help="Un-commit bad shards; the next ingest rebuilds them.")
    ] = False,
    rerun: Annotated[
        int, typer.Option(metavar="N", min=0, help="Run N random rows of each split through the model again.")
    ] = 0,
    model: Annotated[str | None, typer.Option(help="The model's folder for --rerun, if its name does not do.")] = None,
    device: Annotated[str, typer.Option(help="Where --rerun runs it.")] = "cpu",
    address: Annotated[str | None, typer.Option(help="Check on the Ray cluster at this address.")] = None,
    options: Options = [],  # noqa: B006 - never changed
    as_json: AsJson = False,
) -> None:
    """Check every object, chunk, row and statistic of a dataset and its held-out split, against its corpus too.

    Exit code 2 where anything is damaged.
    """
    checks = Checks(
        deep=deep,
        sample=parse_share(sample),
        repair=repair,
        rerun=rerun,
        model=model,
        device=device,
        address=address,
        quiet=as_json,
    )
    reports = verify_splits(dataset, checks, parse_options(options))
    if as_json:
        typer.echo(json.dumps(reports, indent=1))
    if any(report["problems"] for report in reports):
        raise typer.Exit(2)


def parse_share(text: str) -> float:
    """Return the share that ``"1%"`` or ``"0.01"`` means; raise ``BadInputError`` for anything else."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BadInputError(f"--sample {text!r} is no share of the shards; write e.g. 1% or 0.01")
    return share


def verify_splits(
    dataset: str, checks: Checks | None = None, options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Verify a dataset and its held-out split with a progress bar; print a verdict for each unless ``quiet``."""
    from actlake.shards.verify import merged, open_damaged, repair
    from actlake.storage.stores import Store

    checks = checks or Checks()
    say: Callable[..., None] = _mute if checks.quiet else _print_coloured
    places = [dataset]
    if (heldout := Store(dataset, options).child("heldout")).exists("spec.json"):
        places.append(heldout.url)
    with explaining(dataset, options):
        opened = [open_damaged(place, options) for place in places]
    corpus, of_corpus = _open_corpus(opened[0][0], checks, say)
    found = []
    for part, damage in opened:
        report = merged([damage, _run(part, corpus, checks)])
        found.append(replace(report, problems=(*of_corpus, *report.problems)))
        of_corpus = ()
    _rerun([part for part, _ in opened], found, corpus, checks)
    reports = []
    for (part, _), report in zip(opened, found, strict=True):
        reports.append({"url": part.url, "split": part.spec.split, **asdict(report)})
        _print_verdict(reports[-1], say)
        for shard in repair(part, report) if checks.repair else ():
            ERRORS.print(f"un-committed {part.spec.split} shard {shard}; 'actlake ingest' rebuilds it")
    return reports


def _open_corpus(
    ds: "ActivationDataset", checks: Checks, say: Callable[..., None]
) -> tuple["Corpus | None", tuple["Problem", ...]]:
    # A dataset is read without its corpus, so that one may be gone.
    from actlake.shards.verify_shard import Problem
    from actlake.storage.corpus import Corpus
    from actlake.storage.stores import resolve_url

    if not checks.deep:
        return None, ()
    try:
        corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
        say(f"verify: the corpus is whole: {corpus.verify()} files")
    except (NotFoundError, BadInputError) as error:
        say(f"verify: the corpus was not checked, nor the rows against it: {error}")
        return None, ()
    except DataError as error:
        return None, (Problem(kind="corpus", shard=None, message=str(error)),)
    if corpus.corpus_id != ds.spec.corpus_id:
        message = f"{corpus.store.url} is corpus {corpus.corpus_id[:12]}..., {ds.url} is made from another"
        return None, (Problem(kind="corpus", shard=None, message=message),)
    return corpus, ()


def _run(part: "ActivationDataset", corpus: "Corpus | None", checks: Checks) -> "VerifyReport":
    from actlake.shards.verify import verify as verify_here

    with bars(ERRORS) as progress:
        task = progress.add_task("verify", total=part.reader.manifest.nbytes, detail=part.spec.split)
        options: dict[str, Any] = {
            "deep": checks.deep,
            "sample": checks.sample,
            "corpus": corpus,
            "on_progress": partial(_advance, progress, task),
        }
        if checks.address is None:
            return verify_here(part, **options)
        from actlake.jobs.engines.ray_verify import verify_on_ray

        return verify_on_ray(part, address=checks.address, **options)


def _rerun(
    parts: list["ActivationDataset"], found: list["VerifyReport"], corpus: "Corpus | None", checks: Checks
) -> None:
    """Add to the reports what ``--rerun`` finds."""
    if not checks.rerun:
        return
    if corpus is None:
        raise BadInputError("--rerun needs the corpus, and --deep; build it again with 'actlake ingest'")
    from actlake.jobs.rerun import Rerun

    model = Rerun(parts[0].spec, model=checks.model, device=checks.device, threads=_threads(parts[0]))
    for place, part in enumerate(parts):
        sound = [shard for shard in part.reader.manifest.shards if shard not in found[place].bad_shards]
        with bars(ERRORS) as progress:
            task = progress.add_task("rerun", total=checks.rerun, detail=part.spec.split)
            problems = model.check(part, corpus, checks.rerun, shards=sound, on_rows=partial(_advance, progress, task))
        found[place] = replace(found[place], problems=(*found[place].problems, *problems))


def _threads(part: "ActivationDataset") -> int:
    for record in part.reader.manifest.records():
        return int(record.provenance.software.get("threads", 1))
    return 1


def _advance(progress: Progress, task: TaskID, n: int) -> None:
    progress.update(task, advance=n)


def _print_verdict(report: dict[str, Any], say: Callable[..., None]) -> None:
    for problem in report["problems"] if say is not _mute else ():
        ERRORS.print(f"{problem['kind']}: {problem['message']}", style="red")
    checked = (
        f"{count_of(report['n_shards'], 'shard')}, {report['n_objects']:,} objects, {report['n_chunks']:,} chunks, "
        f"{report['n_rows']:,} rows, {format_nbytes(report['nbytes'])}"
    )
    if report["n_deep"] < report["n_shards"]:
        checked += f", {report['n_deep']} shards of them read whole"
    if report["problems"]:
        say("verify: ", (f"{len(report['problems'])} problems", "red"), f" in {report['split']}: {checked} checked")
    elif report["missing_shards"]:
        n_missing = len(report["missing_shards"])
        say(
            f"verify: {report['split']} is ", ("incomplete", "yellow"), f": {n_missing} shards missing; {checked} whole"
        )
    else:
        say(f"verify: {report['split']} is ", ("whole", "green"), f": {checked}")


def _print_coloured(*parts: str | tuple[str, str]) -> None:
    OUT.print(Text.assemble(*parts))


def _mute(*parts: str | tuple[str, str]) -> None:
    """Print nothing: what is printed is JSON alone."""
