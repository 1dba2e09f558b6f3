"""``actlake submit``, ``status``, ``logs`` and ``stop``: jobs on a Ray cluster, through its Jobs API."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from actlake.jobs.cli.app import ERRORS, OUT, app, interrupted_code
from actlake.jobs.cli.options import AsJson, print_table
from actlake.jobs.progress import Progress, format_duration, parse
from actlake.jobs.ray_jobs import JobsApi, RayJob
from actlake.storage.errors import ActlakeError

_Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the head's dashboard, e.g. http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or "
        "this machine's.",
        show_default=False,
    ),
]
_JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that 'submit' printed.", show_default=False)]

#: Lines of a log that are searched for the last progress.
_LINES = 200

#: Of a job that was stopped, as of a process that SIGTERM ended.
_STOPPED = 143


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="Job file (TOML).", show_default=False)],
    address: _Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show its log until it ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it ends.")] = False,
    ship: Annotated[bool, typer.Option("--ship/--no-ship", help="Send the actlake that runs here.")] = True,
    wheel: Annotated[
        Path | None, typer.Option(help="Send this wheel of actlake instead of the one that runs.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job on a Ray cluster; with --follow or --wait its exit code is this command's."""
    from actlake.jobs.submit import prepare_submission
    from actlake.jobs.submit import submit as send
    from actlake.jobs.wheel import own_wheel, read_wheel

    prepared = prepare_submission(job)
    sent = (own_wheel() if wheel is None else read_wheel(wheel)) if ship else None
    api = _api(address)
    for note in prepared.notes:
        ERRORS.print(note)
    done = send(prepared, api, sent)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        OUT.print(
            f"submitted {done.job} to {done.address} (Ray {done.ray}); 'actlake status {done.job}' says how it goes"
        )
    if follow:
        _follow(api, done.job)
    if follow or wait:
        _end(api, done.job)


@app.command()
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="One job; default: all.", show_default=False)
    ] = None,
    address: _Address = None,
    as_json: AsJson = False,
) -> None:
    """Say how far the jobs of a cluster are: state, rows, shards, speed and the time left."""
    api = _api(address)
    found = [api.job(job)] if job is not None else api.jobs()
    known = [(item, _progress(api, item)) for item in found]
    if as_json:
        described = [_described(*pair) for pair in known]
        typer.echo(json.dumps(described[0] if job is not None else described, indent=1))
    elif job is None:
        _print_jobs(known, api.url)
    else:
        _print_job(*known[0], api)


@app.command()
def logs(
    job: _JobId,
    address: _Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its exit code.")
    ] = False,
) -> None:
    """Print what a job printed."""
    api = _api(address)
    api.job(job)
    if follow:
        _follow(api, job)
        _end(api, job)
    else:
        typer.echo(api.logs(job), nl=False)


@app.command()
def stop(
    job: _JobId,
    address: _Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for its end.", min=0)] = 60,
) -> None:
    """Stop a job and wait until it is stopped; submitted again, it builds what is missing."""
    api = _api(address)
    if api.job(job).over:
        OUT.print(f"{job} is over already: {api.job(job).state}")
        return
    api.stop(job)
    found = api.wait(job, timeout_s=timeout)
    if not found.over:
        raise ActlakeError(f"{job} is still {found.state} after {timeout:g} s; 'actlake logs {job}' says what it does")
    OUT.print(f"{job} is {found.state}; submit its job file again to build what is missing")


def _api(address: str | None) -> JobsApi:
    from actlake.jobs.engines.ray_address import jobs_url

    return JobsApi(jobs_url(address))


@contextmanager
def _watching(job: str) -> Iterator[None]:
    """Say, where the block is interrupted, that the job is not."""
    try:
        yield
    except KeyboardInterrupt as error:
        ERRORS.print(f"the job goes on; 'actlake logs {job} -f' shows it again, 'actlake stop {job}' ends it")
        raise typer.Exit(interrupted_code()) from error


def _follow(api: JobsApi, job: str) -> None:
    with _watching(job):
        for text in api.follow(job):
            typer.echo(text, nl=False)


def _end(api: JobsApi, job: str) -> None:
    """Wait for a job; leave with its exit code."""
    with _watching(job):
        found = api.wait(job)
    if found.state == "SUCCEEDED":
        return
    ERRORS.print(f"{job} is {found.state}{_cause(found)}")
    if found.state == "STOPPED":
        raise typer.Exit(_STOPPED)
    # A job whose process never began has none: what it was given could not be used.
    code = found.exit_code or 2
    # Of a process that a signal ended, as a shell says it.
    raise typer.Exit(code if code > 0 else 128 - code)


def _cause(job: RayJob) -> str:
    """Return why a job failed, where its machines are to blame and not its input."""
    if job.state != "FAILED":
        return ""
    if "No module named 'tomllib'" in job.message:
        return ": the cluster's Python is too old; actlake wants 3.11 or newer"
    if "No module named" in job.message and "actlake" not in job.message.partition("No module named")[2][:20]:
        missing = job.message.partition("No module named")[2].split()[0]
        return f": its machines lack {missing}; their image needs what 'actlake[ingest,ray]' brings"
    if "No module named" in job.message:
        return ": its machines lack actlake; leave --no-ship out"
    if job.exit_code is None:
        return f": {' '.join(job.message.split())}"
    return f" with exit code {job.exit_code}"


def _progress(api: JobsApi, job: RayJob) -> Progress | None:
    return None if job.started is None else parse(api.last_lines(job, _LINES))


def _elapsed(job: RayJob) -> float | None:
    return None if job.started is None else (job.ended or time.time()) - job.started


def _described(job: RayJob, progress: Progress | None) -> dict[str, Any]:
    return {
        "job": job.id,
        "state": job.state,
        "exit_code": job.exit_code,
        "dataset": job.metadata.get("dataset"),
        "started": job.started,
        "ended": job.ended,
        "progress": None if progress is None else asdict(progress),
    }


def _print_jobs(known: Iterable[tuple[RayJob, Progress | None]], url: str) -> None:
    rows = []
    for job, now in known:
        shards = "" if now is None else f"{now.n_committed}/{now.n_shards}"
        done = "" if now is None else f"{now.n_rows_done:,}/{now.n_rows:,}"
        speed = "" if now is None or now.rows_per_s is None or job.over else f"{now.rows_per_s:,.0f}"
        left = "" if now is None or now.left_s is None or job.over else format_duration(now.left_s)
        elapsed = "" if (seconds := _elapsed(job)) is None else format_duration(seconds)
        rows.append([job.id, job.state, shards, done, speed, elapsed, left, job.metadata.get("dataset", "")])
    if not rows:
        OUT.print(f"no jobs at {url}; 'actlake submit job.toml' starts one")
        return
    print_table(["job", "state", "shards", "rows", "rows/s", "running for", "left", "dataset"], rows)


def _print_job(job: RayJob, progress: Progress | None, api: JobsApi) -> None:
    elapsed = "" if (seconds := _elapsed(job)) is None else f" for {format_duration(seconds)}"
    OUT.print(f"{job.id}: {job.state}{elapsed if not job.over else _cause(job)}")
    if dataset := job.metadata.get("dataset"):
        OUT.print(f"dataset: {dataset}")
    if progress is not None:
        OUT.print(progress.line(left=not job.over))
    elif last := api.last_lines(job, 1).strip():
        OUT.print(f"last line: {last}")
