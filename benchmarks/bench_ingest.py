"""What ingestion costs beside the bare forward pass: tokens/s, CPU seconds by part, and memory, on Gemma 3 270M.

    python benchmarks/bench_ingest.py [--rows 2048] [--shards 4] [--repeats 3]

For each selection of hook points, in a process of its own: the batches of all shards run bare (the inner text model, no
hooks, no logits), then through the shard builder as a worker drives it: one shard runs through the model while the one
before is encoded and stored in a local folder. Every selection needs the last layer, so that both run the whole depth.
The parts are timed apart, on one core, on the rows of one batch. Their CPU seconds and those of the forward pass on the
same cores give the bound: the tokens/s of a worker that does nothing else.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import Report, Row, leave_result, make_parser, n_cores, peak_rss, reset_peak_rss, run_child

from actlake.ingest.batch_feed import LaidBatch, batches_of
from actlake.ingest.build import ShardBuilder
from actlake.ingest.capture import Capture
from actlake.ingest.corpus import build_corpus
from actlake.ingest.cpu_bf16 import has_fast_bf16
from actlake.ingest.landing import scatter
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import load_tokenizer, model_shape, resolve_model, tokenizer_fingerprint
from actlake.ingest.shard_memory import carve, nbytes_of, uploads_of
from actlake.jobs.jobfile import CaptureOptions, CorpusOptions, Job, LayoutOptions
from actlake.jobs.plan.memory import worker_memory
from actlake.jobs.planning import plan_keep, plan_spec, special_ids
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.arrays import ArraySpec, crc32c
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.header import Header, prepare
from actlake.storage.moments import of_shard
from actlake.storage.records import ShardRecord
from actlake.storage.shard_rows import ShardRows
from actlake.storage.stores import Store

FOUR = ("attn_z", "mlp_in", "mlp_out", "resid_post")
#: Hook points of each selection, and the ratio to the bare forward pass that is wanted.
SELECTIONS = {
    "point": ("1 point of the last layer", ("layers.{last}.resid_post",), 0.95),
    "layer": ("4 streams of the last layer", tuple(f"layers.{{last}}.{stream}" for stream in FOUR), 0.95),
    "all": ("4 streams of all layers", tuple(f"layers.*.{stream}" for stream in FOUR), 0.65),
}
_SHARED = ("rows", "shards", "repeats", "model", "source", "context", "batch_tokens")
PARTS = ("copies", "statistics", "codec", "checksums", "write")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run over all shards."""

    seconds: float
    n_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def make_job(options: argparse.Namespace, points: tuple[str, ...]) -> Job:
    return Job(
        dataset="unused",
        model=options.model,
        hook_points=points,
        capture=CaptureOptions(batch_tokens=options.batch_tokens),
        corpus=CorpusOptions(sources=(options.source,), context_length=options.context),
        layout=LayoutOptions(rows_per_shard=options.rows, rows_per_chunk=min(1024, options.rows)),
    )


def prepare_all(options: argparse.Namespace, folder: Path) -> int:
    """Build the corpus, and an empty dataset for each selection and repeat; return the corpus's tokens."""
    ref, shape = resolve_model(options.model), model_shape(options.model)
    tokenizer = load_tokenizer(ref)
    about = CorpusSpec(
        sources=(options.source,),
        context_length=options.context,
        holdout=0.0,
        tokenizer=tokenizer_fingerprint(tokenizer),
        # A token is a row, but for the one at the head of each sequence.
        max_tokens=2 * options.rows * options.shards + 16 * options.context,
    )
    corpus = build_corpus(Store(folder / "corpus"), about, tokenizer)
    for name in options.only or SELECTIONS:
        points = tuple(pattern.format(last=shape.n_layers - 1) for pattern in SELECTIONS[name][1])
        job = make_job(options, points)
        keep = plan_keep(job, special_ids(tokenizer), shape.vocab_size)
        spec = plan_spec(job, model=ref, shape=shape, corpus_id=corpus.corpus_id, keep=keep, split="train")
        header = Header(spec=spec, n_rows=options.rows * options.shards, corpus="../corpus")
        for repeat in range(options.repeats):
            prepare(Store(folder / f"{name}{repeat}"), header)
    return corpus.splits["train"].n_tokens


def open_builder(folder: Path, model: LoadedModel, corpus: Corpus) -> ShardBuilder:
    forward = Capture(model, Header.read(Store(folder)).spec.point_names)
    return ShardBuilder(store=Store(folder), corpus=corpus, forward=forward, n_threads=torch.get_num_threads())


def laid_batches(builder: ShardBuilder, shard: int) -> list[LaidBatch]:
    """Return the batches that a shard runs."""
    rows = ShardRows.of(builder.corpus, builder.index, builder.header.spec, builder.space, shard)
    return [LaidBatch.of(batch, rows) for batch in batches_of(rows, builder.header.spec, builder.corpus)]


def run_bare(model: LoadedModel, builder: ShardBuilder) -> Run:
    """Run the batches of all shards through the text model alone."""
    batches = [batch for shard in range(builder.space.n_shards) for batch in laid_batches(builder, shard)]
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            positions = {} if batch.positions_BT is None else {"position_ids": batch.positions_BT}
            model.text(input_ids=batch.tokens_BT, use_cache=False, **positions)
    return Run(seconds=time.perf_counter() - start, n_tokens=sum(batch.n_run for batch in batches))


def run_builder(builder: ShardBuilder) -> tuple[Run, list[ShardRecord]]:
    """Build all shards, as many at once as a worker does."""
    start = time.perf_counter()
    with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as threads:
        records = list(threads.map(builder.build, range(builder.space.n_shards)))
    run = Run(seconds=time.perf_counter() - start, n_tokens=sum(record.provenance.n_tokens for record in records))
    return run, records


def cpu_s_by_part(builder: ShardBuilder, folder: Path) -> dict[str, float]:
    """Return the CPU seconds a raw GB of each part, alone on one core, over the rows of one batch."""
    batch, n_rows = laid_batches(builder, 0)[0], builder.space.rows_per_shard + 1
    arrays = [array for array in builder.header.spec.arrays().values() if array.width is not None]
    memory = carve(np.zeros(nbytes_of(arrays, n_rows), np.uint8), arrays, n_rows)
    acts = batch.run(builder.forward, builder.device)
    taken, nbytes = dict.fromkeys(PARTS, 0.0), 0
    for array in arrays:
        width = acts[array.name].shape[-1]
        for part, seconds in _parts_of(array, acts[array.name].reshape(-1, width), batch, memory[array.name], folder):
            taken[part] += seconds
        nbytes += len(batch.target_N) * array.nbytes_per_row
    return {part: seconds / nbytes * 1e9 for part, seconds in taken.items()}


def _parts_of(
    array: ArraySpec, acts: torch.Tensor, batch: LaidBatch, rows: npt.NDArray[Any], folder: Path
) -> Iterator[tuple[str, float]]:
    """Yield each part with the CPU seconds that it took of this thread."""
    start = time.thread_time()
    scatter(acts, batch.target_BT, rows)
    yield "copies", time.thread_time() - start
    values = np.ascontiguousarray(rows[batch.target_N.numpy()]).view(array.numpy_dtype)
    start = time.thread_time()
    of_shard(values)
    yield "statistics", time.thread_time() - start
    bits, size = values.view("<u2") if array.dtype == "bfloat16" else values, array.rows_per_chunk
    start = time.thread_time()
    encoded = [array.codec.encode(bits[i : i + size]) for i in range(0, len(bits), size)]
    yield "codec", time.thread_time() - start
    start = time.thread_time()
    for chunk in encoded:
        crc32c(crc32c(chunk).to_bytes(4, "little"), crc32c(chunk))  # its own, and the whole object's
    yield "checksums", time.thread_time() - start
    start = time.thread_time()
    Store(folder).write(array.name, *encoded)
    yield "write", time.thread_time() - start


def planned_memory(builder: ShardBuilder, model: LoadedModel, records: Sequence[ShardRecord]) -> int:
    """Return the bytes that a plan gives a worker like this one, which runs without Ray."""
    spec, n_threads = builder.header.spec, torch.get_num_threads()
    objects = sorted((item.nbytes for item in records[0].objects.values()), reverse=True)
    return worker_memory(
        spec,
        model.shape,
        shard_rows=spec.rows_per_shard,
        pass_nbytes=spec.rows_per_shard * spec.nbytes_per_row,
        encoded=sum(objects[: uploads_of(n_threads)]),
        context_length=builder.corpus.spec.context_length,
        on_gpu=False,
        widened=not has_fast_bf16(),
        n_shards=min(SHARDS_IN_FLIGHT, builder.space.n_shards),
        ray=False,
    ).host


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one selection in this process, in turns: bare and built, then built and bare."""
    name, _, target = SELECTIONS[options.only[0]]
    corpus, model = Corpus.open(Store(folder / "corpus")), load_model(resolve_model(options.model))
    bare, built, resident = [], [], 0
    for repeat in range(options.repeats):
        builder = open_builder(folder / f"{options.only[0]}{repeat}", model, corpus)
        if repeat % 2 == 0:
            bare.append(run_bare(model, builder))
        reset_peak_rss()
        run, records = run_builder(builder)
        resident = max(resident, peak_rss())
        built.append(run)
        if repeat % 2 == 1:
            bare.append(run_bare(model, builder))
    # blosc takes threads of its own in the main thread.
    with ThreadPoolExecutor(1) as thread:
        parts = thread.submit(cpu_s_by_part, builder, folder / "parts").result()
    raw = sum(record.n_rows for record in records) * builder.header.spec.nbytes_per_row
    rate = statistics.median(run.tokens_per_s for run in bare)
    forward = torch.get_num_threads() / rate  # CPU seconds a token
    bound = forward / (forward + sum(parts.values()) * raw / 1e9 / built[0].n_tokens)
    ratio = statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in zip(built, bare, strict=True))
    planned = planned_memory(builder, model, records)
    return {
        "speed": {
            "hook points": name,
            "kB a token": raw / 1e3 / built[0].n_tokens,
            "bare tokens/s": rate,
            "ingest tokens/s": statistics.median(run.tokens_per_s for run in built),
            "ratio": ratio,
            "wanted": target,
            "bound": bound,
            "of the bound": ratio / bound,
            "compression": raw / sum(record.nbytes for record in records),
        },
        "parts": {"hook points": name, "forward": forward * built[0].n_tokens / raw * 1e9} | parts,
        "memory": {
            "hook points": name,
            "shard GB": options.rows * builder.header.spec.nbytes_per_row / 1e9,
            "peak RSS GB": resident / 1e9,
            "planned GB": planned / 1e9,
            "peak over plan": resident / planned,
        },
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2048, help="rows of a shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="gemma-3-270m-gguf")
    parser.add_argument("--source", default="builtin:python-docs", help="text to run")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence at most")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--only", choices=list(SELECTIONS), action="append", help="leave the others out")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.child is not None:
        # A worker has no tokenizer in memory, which takes as much as a small model.
        if options.measure:
            leave_result(measure(options, options.child))
        else:
            leave_result(prepare_all(options, options.child))
        return
    names = options.only or list(SELECTIONS)
    shared = [f"--{name.replace('_', '-')}={vars(options)[name]}" for name in _SHARED]
    with tempfile.TemporaryDirectory() as folder, Report(options) as report:
        shared.append(f"--child={folder}")
        run_child(__file__, [*shared, *(f"--only={name}" for name in names)])
        found: list[dict[str, Row]] = [run_child(__file__, [*shared, "--measure", f"--only={name}"]) for name in names]
        report.table(
            f"{options.shards} shards of {options.rows:,} rows on {n_cores()} cores",
            [one["speed"] for one in found],
            "Ratios are medians of runs side by side; the bound is what the CPU seconds below leave of the bare rate.",
        )
        report.table("CPU seconds a raw GB", [one["parts"] for one in found], "The parts are timed alone on one core.")
        report.table("Memory of the worker's process", [one["memory"] for one in found])


if __name__ == "__main__":
    main()
