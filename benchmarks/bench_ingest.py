"""What ingestion costs beside the bare forward pass: tokens/s and ratios on the real Gemma 3 270M, in one process.

    python benchmarks/bench_ingest.py [--rows 8192] [--repeats 2]

For each selection of hook points, the same batches are run bare (the inner text model, no hooks, no logits) and
through the shard builder (forward, capture, statistics, encode, write to a local folder, commit), in turns. Every
selection needs the last layer, so that both run the whole depth.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import conditions

from actlake.ingest.batching import plan_batches
from actlake.ingest.build import ShardBuilder
from actlake.ingest.capture import Capture
from actlake.ingest.corpus import build_corpus
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import load_tokenizer, resolve_model, tokenizer_fingerprint
from actlake.jobs.jobfile import CaptureOptions, CorpusOptions, Job, LayoutOptions
from actlake.jobs.planning import plan_keep, plan_spec, special_ids
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.header import Header, prepare
from actlake.storage.records import ShardRecord
from actlake.storage.stores import Store

FOUR = ("attn_z", "mlp_in", "mlp_out", "resid_post")
SELECTIONS = {
    "1 point (layers.17.resid_post)": ("layers.17.resid_post",),
    "4 streams of layer 17": tuple(f"layers.17.{stream}" for stream in FOUR),
    "all 18 layers x 4 streams": tuple(f"layers.*.{stream}" for stream in FOUR),
}
MODEL = "gemma-3-270m-gguf"


@dataclass
class Sample:
    """One timed run."""

    seconds: float
    cpu_s: float
    n_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


class Timer:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> "Timer":
        self._wall, self._cpu = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_s = time.perf_counter() - self._wall, _cpu_s() - self._cpu


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_job(points: tuple[str, ...], rows: int) -> Job:
    return Job(
        dataset="unused",
        model=MODEL,
        hook_points=points,
        capture=CaptureOptions(),
        corpus=CorpusOptions(sources=("builtin:python-docs",), context_length=512),
        layout=LayoutOptions(rows_per_shard=rows, rows_per_chunk=1024),
    )


def make_corpus(folder: Path) -> Corpus:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    job = make_job(("layers.9.resid_post",), 1024)
    spec = CorpusSpec(
        sources=job.corpus.sources, context_length=512, holdout=0.0, tokenizer=tokenizer_fingerprint(tokenizer)
    )
    return build_corpus(Store(folder / "corpus"), spec, tokenizer)


def make_builder(folder: Path, model: LoadedModel, corpus: Corpus, points: tuple[str, ...], rows: int) -> ShardBuilder:
    ref, job = resolve_model(MODEL), make_job(points, rows)
    keep = plan_keep(job, special_ids(load_tokenizer(ref)), model.shape.vocab_size)
    spec = plan_spec(job, model=ref, shape=model.shape, corpus_id=corpus.corpus_id, keep=keep, split="train")
    store = Store(folder)
    prepare(store, Header(spec=spec, n_rows=rows, corpus="../corpus"))
    forward = Capture(model, spec.point_names)
    return ShardBuilder(store=store, corpus=corpus, forward=forward, n_threads=torch.get_num_threads())


def run_bare(model: LoadedModel, builder: ShardBuilder) -> Sample:
    """Run the batches of the builder's only shard through the text model alone."""
    chosen = builder.index.sequences_of(builder.space.rows_of(0))
    sequences = builder.corpus.sequences("train", chosen.start, chosen.stop)
    lengths = [len(sequence.tokens) for sequence in sequences]
    batches = plan_batches(lengths, builder.header.spec.batch_tokens, builder.corpus.spec.context_length)
    n_tokens = 0
    with Timer() as timer, torch.inference_mode():
        for batch in batches:
            tokens = torch.zeros(len(batch.members), batch.n_tokens, dtype=torch.int64)
            for place, member in enumerate(batch.members):
                tokens[place, : len(sequences[member].tokens)] = torch.from_numpy(sequences[member].tokens.copy())
            model.text(input_ids=tokens, use_cache=False)
            n_tokens += tokens.numel()
    return Sample(timer.seconds, timer.cpu_s, n_tokens)


def run_builder(builder: ShardBuilder) -> tuple[Sample, ShardRecord]:
    with Timer() as timer:
        record = builder.build(0)
    return Sample(timer.seconds, timer.cpu_s, record.provenance.n_tokens), record


def measure(name: str, model: LoadedModel, corpus: Corpus, rows: int, repeats: int) -> dict[str, object]:
    bare, full, parts = [], [], []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            builder = make_builder(Path(folder) / "dataset", model, corpus, SELECTIONS[name], rows)
            if repeat % 2 == 0:
                bare.append(run_bare(model, builder))
            sample, record = run_builder(builder)
            full.append(sample)
            parts.append(record)
            if repeat % 2 == 1:
                bare.append(run_bare(model, builder))
    record = parts[-1]
    raw = record.n_rows * builder.header.spec.nbytes_per_row
    return {
        "hook points": name,
        "bare tokens/s": statistics.median(s.tokens_per_s for s in bare),
        "ingest tokens/s": statistics.median(s.tokens_per_s for s in full),
        "ratio": statistics.median(f.tokens_per_s / b.tokens_per_s for f, b in zip(full, bare, strict=True)),
        "extra CPU s per raw GB": statistics.median(
            (f.cpu_s - b.cpu_s) / raw * 1e9 for f, b in zip(full, bare, strict=True)
        ),
        "forward s": record.provenance.forward_s,
        "encode s": record.provenance.encode_s,
        "write s": record.provenance.write_s,
        "raw GB": raw / 1e9,
        "compression": raw / record.nbytes,
        "peak RSS GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the one shard that is built")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=list(SELECTIONS), action="append", help="leave the others out")
    arguments = parser.parse_args()
    model = load_model(resolve_model(MODEL))
    print(json.dumps(conditions() | dict(model.describe()), indent=1))
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        for name in arguments.only or SELECTIONS:
            result = measure(name, model, corpus, arguments.rows, arguments.repeats)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}), flush=True)


if __name__ == "__main__":
    main()
