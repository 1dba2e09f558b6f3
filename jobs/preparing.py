"""Everything of a job that comes before its shards, made where there is a network, so that workers need none."""

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from actlake.jobs.jobfile import Job
from actlake.jobs.readiness import Listener, check_device, check_engine, make_ready


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What is ready: places, ids, and how much there is to build.

    ``weights`` is the folder that every compute node must see too; ``n_tokens`` are those of the corpus.
    """

    dataset: str
    model: str
    revision: str | None
    weights: str
    corpus: str
    n_tokens: int
    n_rows: int
    n_shards: int
    n_missing: int


def prepare(
    job: Job, *, engine: str = "local", address: str | None = None, listener: Listener | None = None
) -> PrepareReport:
    """Fetch and convert the weights, build the corpus and its row indexes, write specs and array metadata.

    Needs no GPU, unless the job's model writes replies for the corpus. Raises as ``ingestion.ingest`` does before the
    first shard; done again, it changes nothing.
    """
    with ExitStack() as stack:
        check_engine(engine, address, stack)
        if job.corpus.replies is not None:
            check_device(job, address)
        ready = make_ready(job, engine, address, listener or Listener(), here=False)
    return PrepareReport(
        dataset=ready.store.url,
        model=ready.model.name,
        revision=ready.model.revision,
        weights=str(Path(ready.model.path).resolve()),
        corpus=ready.corpus.store.url,
        n_tokens=sum(split.n_tokens for split in ready.corpus.splits.values()),
        n_rows=ready.plan.n_rows,
        n_shards=ready.plan.n_shards,
        n_missing=len(ready.plan.missing),
    )


def compute_command(job_file: Path) -> str:
    """Return what a compute node runs: a slice of the job, without a network."""
    return (
        f"HF_HUB_OFFLINE=1 actlake ingest {shlex.quote(str(job_file))} --engine local "
        "--slice $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    )
