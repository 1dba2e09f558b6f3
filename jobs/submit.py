"""Sends a job to a Ray cluster: what is checked before, what travels, and how it goes there.

Two packages travel: the wheel of the actlake that runs here, and a folder with the job file alone. Both are named by
their content, and Ray unpacks them onto the path, and into the folder, of the driver and of every worker. The wheel
goes as the zip file that it is: Ray would hand a ``.whl`` to pip, which fetches all its dependencies again from a
package index, on every machine. They are the image's.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import actlake
from actlake.ingest.models import model_shape
from actlake.jobs.jobfile import Job, read_job
from actlake.jobs.plan.budget import check
from actlake.jobs.plan.gather import plan_job
from actlake.jobs.plan.machine import HERE
from actlake.jobs.ray_jobs import JobsApi
from actlake.jobs.units import count_of, format_nbytes
from actlake.jobs.wheel import Wheel, packed
from actlake.storage.errors import BadInputError, JobFileError, MissingExtraError, ModelAccessError
from actlake.storage.secrets import secret_names

#: The job file's name on the cluster.
_JOB = "job.toml"

#: What runs there; without a shell in between signals reach it.
ENTRYPOINT = f"exec python -m actlake.jobs.cli ingest {_JOB} --address auto"

#: Seconds from SIGTERM to SIGKILL of a job that is stopped; Ray's 3 are too few to abandon a shard in order.
STOP_S = 30

#: Characters of a job file's name that an id keeps.
_NAME = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that is ready to go: nothing of it is wrong as far as can be told without a cluster."""

    id: str
    job: Job
    text: bytes
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that the cluster has."""

    job: str
    address: str
    dataset: str
    ray: str
    package: str | None


def prepare_submission(path: Path) -> Submission:
    """Read and check a job file; looks at no store and no cluster.

    Raises ``JobFileError`` for a file that is wrong, for places that mean nothing on another machine, for credentials,
    and for what cannot fit.
    """
    job, text = read_job(path), path.read_bytes()
    notes = [*_check_places(job, path), *_check_plan(job)]
    if found := secret_names(job.storage_options):
        raise JobFileError(
            f"{path}: storage_options.{found[0]} may be a credential, and a cluster keeps the files of its jobs where "
            "others can read them; give its machines an identity that may use the store, or the store's environment "
            "variables (docs/cluster.md), and leave it out"
        )
    stem = _NAME.sub("-", path.stem).strip("-") or "job"
    return Submission(id=f"{stem}-{secrets.token_hex(4)}", job=job, text=text, notes=tuple(notes))


def submit(submission: Submission, api: JobsApi, wheel: Wheel | None) -> Submitted:
    """Send a job and start it; ``wheel`` None: the machines of the cluster have actlake.

    Raises ``BadInputError`` where the cluster does not answer or cannot run it, or where a job is at work on the same
    dataset.
    """
    version = api.check()
    for other in api.jobs():
        if not other.over and other.metadata.get("dataset") == submission.job.dataset:
            raise BadInputError(
                f"the job {other.id} is building {submission.job.dataset} already: 'actlake logs {other.id} -f' shows "
                f"it, 'actlake stop {other.id}' ends it"
            )
    folder = packed({_JOB: submission.text})
    name = f"actlake-job-{hashlib.sha256(folder).hexdigest()[:16]}.zip"
    environment: dict[str, Any] = {
        "working_dir": api.upload(name, folder),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
    }
    if wheel is not None:
        environment["py_modules"] = [api.upload(wheel.package, wheel.data)]
    metadata = {"actlake": actlake.__version__, "dataset": submission.job.dataset, "model": submission.job.model}
    api.submit(submission.id, ENTRYPOINT, environment, metadata)
    return Submitted(
        job=submission.id,
        address=api.url,
        dataset=submission.job.dataset,
        ray=version,
        package=None if wheel is None else wheel.package,
    )


# --- Places -------------------------------------------------------------------------------------------------------


def _check_places(job: Job, path: Path) -> Iterator[str]:
    """Yield notes on local paths; raise ``JobFileError`` for places that another machine would not find."""
    for key, place in _places(job):
        if "://" in place:
            if place.startswith("memory://"):
                raise JobFileError(f"{path}: {key} = {place!r} is in the memory of one process; give a store's URL")
        elif not Path(place).is_absolute():
            here = str(Path(place).expanduser().absolute())
            raise JobFileError(
                f"{path}: {key} = {place!r} means another place on every machine; give a URL (gs://, s3://, hf://), or "
                f"the absolute path on a file system that all machines share, e.g. {here!r}"
            )
        else:
            yield f"{key} = {place!r} is a path: the same files must be there on every machine of the cluster"


def _places(job: Job) -> Iterator[tuple[str, str]]:
    yield "dataset", job.dataset
    if job.model.startswith((".", "/", "~")) or Path(job.model).is_dir():
        yield "model", job.model
    for source in job.corpus.sources:
        if not source.startswith("builtin:"):
            yield "corpus.sources", source
    if job.corpus.url is not None:
        yield "corpus.url", job.corpus.url


# --- Plan ---------------------------------------------------------------------------------------------------------


def _check_plan(job: Job) -> Iterator[str]:
    """Yield what the plan says of a job; raise ``JobFileError`` where it cannot fit, as ``actlake ingest`` would."""
    if Path(job.model).is_absolute() and not Path(job.model).exists():
        yield f"model = {job.model!r} is not on this machine: hook points and sizes are checked by the job itself"
        return
    try:
        model_shape(job.model, revision=job.revision)
    except (ModelAccessError, MissingExtraError) as error:
        if Path(job.model).is_dir():
            raise
        yield f"hook points and sizes are checked by the job itself: {error}"
        return
    if job.max_rows is None and job.corpus.max_tokens is None:
        # Any number will do: it is the hook points and the shard that are checked.
        plan_job(replace(job, max_rows=1), offline=True)
        yield "neither max_rows nor corpus.max_tokens says how much there is: the job itself checks [budget]"
        return
    found = plan_job(job, offline=True)
    check(found, memory=job.plan.machine != HERE)
    sizes = found.sizes
    shards, stored = count_of(sizes.n_shards, "shard"), format_nbytes(sizes.nbytes)
    yield f"{sizes.total_rows:,} rows in {shards}, about {stored} stored"
