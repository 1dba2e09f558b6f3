"""Releases that are known by their numbers: what they hold by model and stream, and what actlake would store."""

from dataclasses import dataclass

from actlake.ingest.gemma3 import GEMMA_3
from actlake.ingest.models import ModelRef, model_shape
from actlake.jobs.jobfile import CaptureOptions, CorpusOptions, Job, LayoutOptions
from actlake.jobs.plan.estimate import Estimate, Setting, estimate
from actlake.jobs.plan.machine import choose_machine
from actlake.jobs.plan.options import PlanOptions
from actlake.jobs.plan.rates import Rates
from actlake.jobs.plan.workload import assumed
from actlake.jobs.planning import plan_spec
from actlake.storage.errors import BadInputError, JobFileError, UnknownNameError, nearest
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DTYPES

#: Releases: the preset of their hook points and their models, base then chat.
RELEASES = {
    "gemma-scope-2": (
        "gemma-scope-2",
        tuple(name for name in GEMMA_3 if not name.endswith("-it")),
        tuple(name for name in GEMMA_3 if name.endswith("-it")),
    )
}

_ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class ReleaseRow:
    """One stream of one model: ``nbytes_per_token`` and ``nbytes`` in the release's dtype, ``stored`` by actlake."""

    model: str
    stream: str
    n_points: int
    width: int
    nbytes_per_token: int
    n_tokens: int
    nbytes: int
    stored: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """A whole release: its rows by model and stream, and the plan of each model with actlake's defaults."""

    name: str
    dtype: str
    rows: tuple[ReleaseRow, ...]
    plans: tuple[Estimate, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all activations in the release's dtype, uncompressed."""
        return sum(row.nbytes for row in self.rows)

    @property
    def stored(self) -> int:
        """Bytes that actlake's defaults would store, row columns included."""
        return sum(plan.sizes.nbytes for plan in self.plans)


def plan_release(
    name: str,
    *,
    tokens_base: int,
    tokens_chat: int,
    dtype: str,
    options: PlanOptions,
    rates: Rates,
    layout: LayoutOptions | None = None,
) -> Release:
    """Plan every model of a release; every token but BOS is a row, in sequences of 1,024, on Google Cloud.

    Raises ``UnknownNameError`` for another release, ``BadInputError`` for another dtype or a negative number.
    """
    if name not in RELEASES:
        raise UnknownNameError(f"no release {name!r}{nearest(name, RELEASES)}")
    if dtype not in DTYPES:
        raise BadInputError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if min(tokens_base, tokens_chat) < 0 or tokens_base + tokens_chat == 0:
        raise BadInputError(
            f"--tokens-base {tokens_base} and --tokens-chat {tokens_chat}: give one above 0, none below"
        )
    preset, base, chat = RELEASES[name]
    pairs = [(model, tokens_base) for model in base] + [(model, tokens_chat) for model in chat]
    plans = tuple(_plan(model, n, preset, options, layout or LayoutOptions(), rates) for model, n in pairs if n)
    rows = tuple(row for plan in plans for row in _rows(plan, dtype))
    return Release(name=name, dtype=dtype, rows=rows, plans=plans)


def check_release(found: Release) -> None:
    """Raise ``JobFileError`` with the models whose workers take more memory than their machine has."""
    over = [plan for plan in found.plans if plan.host_memory > plan.setting.machine.memory]
    if over:
        machine = over[0].setting.machine
        listed = (
            f"{plan.job.model}: {plan.n_workers} worker(s) would take {plan.host_memory / 2**30:,.1f} GiB"
            for plan in over
        )
        raise JobFileError(
            f"the release does not fit {machine.name}, which has {machine.memory / 2**30:,.1f} GiB; lower "
            "--shard-memory or take another --machine:\n  " + "\n  ".join(listed)
        )


def _plan(
    model: str, n_tokens: int, preset: str, options: PlanOptions, layout: LayoutOptions, rates: Rates
) -> Estimate:
    job = Job(
        dataset=f"gs://release/{model.rpartition('/')[2]}",
        model=model,
        preset=preset,
        max_rows=n_tokens,
        capture=CaptureOptions(),
        layout=layout,
        corpus=CorpusOptions(sources=("release",), context_length=1024, holdout=0.0),
        plan=options,
    )
    shape = model_shape(model)
    ref = ModelRef(name=model, revision=None, path="", fingerprint="")
    spec = plan_spec(job, model=ref, shape=shape, corpus_id="", keep=KeepRule(), split="train")
    workload = assumed(job, spec, n_text_tokens=None, document_tokens=1023, known_from="the release's tokens")
    setting = Setting(
        machine=choose_machine(options, rates),
        store_name="gcs",
        rates=rates,
        ratios={},
        ratios_from=rates.sources["ratios.bfloat16"],
        tokens_per_s=options.tokens_per_s,
        tokens_from=None if options.tokens_per_s is None else "plan.tokens_per_s",
    )
    return estimate(job, spec, shape, workload, setting)


def _rows(plan: Estimate, dtype: str) -> list[ReleaseRow]:
    n_tokens, itemsize = plan.sizes.total_rows, _ITEMSIZE[dtype]
    found = []
    for stream in dict.fromkeys(point.stream for point in plan.sizes.points):
        points = [point for point in plan.sizes.points if point.stream == stream]
        per_token = sum(point.width for point in points) * itemsize
        found.append(
            ReleaseRow(
                model=plan.job.model,
                stream=stream,
                n_points=len(points),
                width=points[0].width,
                nbytes_per_token=per_token,
                n_tokens=n_tokens,
                nbytes=per_token * n_tokens,
                stored=sum(point.nbytes for point in points),
            )
        )
    return found
