"""Ingestion through the real shard builder, as a worker drives it, and how fast it is once it is under way."""

import json
import queue
import resource
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actlake.ingest.build import ShardBuilder
from actlake.ingest.capture import Capture
from actlake.ingest.corpus import build_corpus
from actlake.ingest.loading import LoadedModel
from actlake.ingest.workshop import Workshop
from actlake.jobs.planning import default_chunk
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import uncommit
from actlake.storage.records import ShardRecord
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec
from actlake.storage.stores import Store

#: Shards of a dataset, built again and again: more than are in flight at once.
N_SHARDS = SHARDS_IN_FLIGHT + 1
#: Shards that warm up: each buffer is touched for the first time.
_N_WARM = SHARDS_IN_FLIGHT
_FOUR = ("attn_z", "mlp_in", "mlp_out", "resid_post")
ONE, SIXTEEN, EVERYTHING = SELECTIONS = ("1 point", "4 streams x 4 layers", "4 streams x all layers")


class Numbers:
    """A tokenizer whose words are the decimal numbers of their tokens."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 2, 1, 0, 3

    def __init__(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> Mapping[str, Any]:
        return {"input_ids": [[int(word) for word in one.split()] for one in text]}

    def __len__(self) -> int:
        return self._n_tokens

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return [str(number) for number in ids]


class NullStore(Store):
    """A folder that drops what shards write and keeps the rest: no disk, no copy, and all work before them."""

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        """Store metadata; forget an object, the statistics or the commit of a shard."""
        if "/c/" not in key and not key.startswith(("stats/", "commits/")):
            super().write(key, *parts)


def make_corpus(folder: Store, n_tokens: int, context: int, vocab_size: int) -> Corpus:
    """Build a corpus of at least so many random tokens, in sequences of the full context."""
    random = np.random.default_rng(0)
    n_documents = -(-n_tokens // (context - 1))
    ids = random.integers(10, vocab_size, size=(n_documents, context - 1))
    lines = [json.dumps({"text": " ".join(map(str, document))}) for document in ids.tolist()]
    folder.write("text.jsonl", "\n".join(lines).encode())
    spec = CorpusSpec(
        sources=(f"{folder.url}/text.jsonl",),
        context_length=context,
        holdout=0.0,
        tokenizer=f"numbers below {vocab_size}",
    )
    return build_corpus(folder.child("corpus"), spec, Numbers(vocab_size))


def points_of(selection: str, model: LoadedModel) -> tuple[str, ...]:
    """Return a selection's hook points; the last layer is in each, so that all run the whole depth."""
    n_layers = model.shape.n_layers
    if selection == ONE:
        return (f"layers.{n_layers - 1}.resid_post",)
    layers = range(n_layers) if selection == EVERYTHING else [n_layers * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    return tuple(f"layers.{layer}.{stream}" for layer in layers for stream in _FOUR)


def make_spec(
    points: Sequence[str], model: LoadedModel, corpus: Corpus, *, codec: str, rows_per_shard: int, batch_tokens: int
) -> DatasetSpec:
    """Return the spec that a job of these hook points would have."""
    widths = model.shape.widths()
    return DatasetSpec(
        model="random weights",
        model_revision=None,
        model_fingerprint=f"{zlib.crc32(repr(model.shape).encode()):064x}",
        architecture=model.shape.architecture,
        corpus_id=corpus.corpus_id,
        split="train",
        keep=KeepRule(exclude=(0, 1, 2)),
        hook_points=tuple(
            PointSpec(
                name=point, width=widths[point], rows_per_chunk=min(rows_per_shard, default_chunk(2 * widths[point]))
            )
            for point in points
        ),
        dtype="bfloat16",
        seed=0,
        order="shuffled",
        rows_per_shard=rows_per_shard,
        rows_per_block=rows_per_shard,
        batch_tokens=batch_tokens,
        codec=Codec(name=codec),
    )


def make_builder(
    store: Store, spec: DatasetSpec, model: LoadedModel, corpus: Corpus, workshop: Workshop
) -> ShardBuilder:
    """Prepare a dataset of a few shards; return its builder, made as a worker makes it."""
    prepare(store, Header(spec=spec, n_rows=N_SHARDS * spec.rows_per_shard, corpus=corpus.store.url))
    forward = Capture(model, spec.point_names)
    return ShardBuilder(store=store, corpus=corpus, forward=forward, device=str(model.device), workshop=workshop)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A shard that is stored, and the clocks at that moment."""

    record: ShardRecord
    wall_s: float
    cpu_s: float
    landed_s: float


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """What was done between two commits, of each of which as much other work was in flight."""

    records: tuple[ShardRecord, ...]
    seconds: float
    cpu_s: float
    landed_s: float

    @property
    def n_tokens(self) -> int:
        return sum(record.provenance.n_tokens for record in self.records)

    @property
    def n_rows(self) -> int:
        return sum(record.n_rows for record in self.records)

    @property
    def nbytes(self) -> int:
        """Bytes as they are stored."""
        return sum(record.nbytes for record in self.records)

    @property
    def points_nbytes(self) -> int:
        """Those of the hook points, without the row columns."""
        return sum(
            stored.nbytes
            for record in self.records
            for name, stored in record.objects.items()
            if not name.startswith("rows/")
        )

    def mean_s(self, name: str) -> float:
        """Return the mean over the shards of one of the provenance's seconds."""
        return float(np.mean([getattr(record.provenance, name) for record in self.records]))


@dataclass
class Driver:
    """Builds shards one after another from as many threads as a worker does, until its time is up."""

    builder: ShardBuilder
    seconds: float
    n_least: int = _N_WARM + 3
    _commits: list[Commit] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _n_begun: int = 0

    def run(self) -> Sustained:
        """Return what was done from the end of the warm-up to the last commit with another shard behind it."""
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for shard in range(N_SHARDS):
            self._free.put(shard)
        self._end = time.perf_counter() + self.seconds
        with ThreadPoolExecutor(SHARDS_IN_FLIGHT, thread_name_prefix="bench-worker") as pool:
            for worker in [pool.submit(self._work) for _ in range(SHARDS_IN_FLIGHT)]:
                worker.result()
        first, last = self._commits[_N_WARM - 1], self._commits[-SHARDS_IN_FLIGHT]
        return Sustained(
            records=tuple(commit.record for commit in self._commits[_N_WARM : 1 - SHARDS_IN_FLIGHT or None]),
            seconds=last.wall_s - first.wall_s,
            cpu_s=last.cpu_s - first.cpu_s,
            landed_s=last.landed_s - first.landed_s,
        )

    def _work(self) -> None:
        try:
            self._build_shards()
        except BaseException:
            # The other thread ends with the shard that it has begun.
            self.n_least, self._end = 0, 0.0
            raise

    def _build_shards(self) -> None:
        while self._takes_another():
            shard = self._free.get()
            # Built again, under the same names: the disk holds a few shards at most.
            uncommit(self.builder.store, shard)
            record = self.builder.build(shard)
            with self._lock:
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                landed_s = self.builder.workshop.lander.landed_s
                self._commits.append(Commit(record=record, wall_s=wall_s, cpu_s=cpu_s, landed_s=landed_s))
            self._free.put(shard)

    def _takes_another(self) -> bool:
        with self._lock:
            if self._n_begun >= self.n_least and time.perf_counter() >= self._end:
                return False
            self._n_begun += 1
            return True


def peak_host_gib() -> float:
    """Return the most host memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_device_gib(device: str) -> float | None:
    """Return the most GPU memory that was taken since the last call, in GiB; None where there is no GPU."""
    if not device.startswith("cuda"):
        return None
    found = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return found
