"""The plan of bench_gpu: what is measured for each size of model, in which shards, and the tables of it."""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product

import torch
from gpu_capture import (
    EVERYTHING,
    N_SHARDS,
    ONE,
    SELECTIONS,
    SIXTEEN,
    Driver,
    NullStore,
    make_builder,
    make_corpus,
    make_spec,
    peak_device_gib,
    peak_host_gib,
    points_of,
)
from gpu_limits import Piece, ProcessorLimit, copy_gb_per_s, disk_gb_per_s, processor_limit, sample, slowest
from gpu_model import (
    BATCH_TOKENS,
    SIZES,
    Peak,
    bare_tokens_per_s,
    flops_per_token,
    peak_of,
    product_tflops,
    random_model,
)
from harness import Report, Row

from actlake.ingest.capture import Capture
from actlake.ingest.loading import LoadedModel
from actlake.ingest.workshop import Workshop
from actlake.jobs.work import SHARDS_IN_FLIGHT
from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError
from actlake.storage.records import Provenance
from actlake.storage.sizes import parse_nbytes
from actlake.storage.stores import Store

CODECS = ("none", "blosc")
PLACES = ("null", "disk")

#: Shares of what bounds a capture, wanted of an H100 or H200 with 16 cores: by selection and codec, to the null store.
TARGETS = {(ONE, "none"): (0.95, "forward"), (SIXTEEN, "none"): (0.90, "forward")}
_OF_SLOWEST = (0.90, "slowest")
#: Parts of a shape's time: everything is ten times as many bytes.
_WEIGHTS = {ONE: 1.0, SIXTEEN: 1.0, EVERYTHING: 3.0}
#: A capture's time is for so many shards, and a shard for so many sequences at least, as memory allows.
_SHARDS_IN_TIME, _LEAST_SEQUENCES = 8, 8
#: Of the memory that may be used, one shard: two are in flight, and what is encoded of them.
_MEMORY_OF_SHARD = 0.25
_FLOPS_NOTE = (
    "FLOP per token: 2 x weights of the linear layers + 4 x heads x head size x keys seen, summed over the layers, at "
    "the mean over the positions of a full sequence. GB/s of the processor: all threads, uncompressed bytes."
)
_CAPTURE_NOTE = (
    "Rates are between two commits after the warm-up, in tokens that go through the model. Seconds are means over "
    "shards: `shard` is what one adds to the whole; its parts overlap, and `encode` and `write` are sums over objects, "
    "several of which are handled at once; `copy` is from the GPU and to the rows' places. `processor` is statistics "
    "and encoding alone, with all threads. The targets are for an H100 or H200 with 16 cores."
)
#: Clocks fall when a GPU gets warm: the forward pass alone is timed at the end too, for so long.
_AGAIN_S = 0.5
_PARTS = tuple(field.name for field in fields(Provenance) if field.name.endswith("_s"))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What does not depend on the model: GB/s to pinned memory and to the disk, and the GPU's peak."""

    device: str
    copy: float | None
    disk: float
    product: float
    peak: Peak


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all captures share."""

    options: argparse.Namespace
    machine: Machine
    store: Store
    corpus: Corpus
    workshop: Workshop
    report: Report


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model to capture from, and what bounds that: tokens/s of the forward pass, the processor by codec."""

    setting: Setting
    model: LoadedModel
    batch_tokens: int
    forward: float
    processor: Mapping[str, ProcessorLimit]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One capture to measure."""

    selection: str
    codec: str
    to: str

    def __str__(self) -> str:
        return f"{self.selection}, codec {self.codec}, {self.to}"


def run(options: argparse.Namespace, report: Report, folder: str) -> list[str]:
    """Measure every shape; return what failed."""
    end, store = time.perf_counter() + 60 * options.minutes, Store(folder)
    machine = measure_machine(options, store)
    report.table("Machine", [_machine_row(machine, options)])
    setting = Setting(
        options=options,
        machine=machine,
        store=store,
        corpus=_corpus(options, store),
        # One for all captures: fresh memory costs up to a CPU second per GB.
        workshop=Workshop(options.threads, n_shards=SHARDS_IN_FLIGHT),
        report=report,
    )
    failed: list[str] = []
    for number, name in enumerate(options.shapes):
        seconds = (end - time.perf_counter()) / (len(options.shapes) - number)
        failed += [f"{name}, {why}" for why in measure_shape(name, seconds, setting)]
        # The model is no longer held: its memory is for the next one.
        gc.collect()
        if machine.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return failed


def measure_machine(options: argparse.Namespace, store: Store) -> Machine:
    """Measure what every model meets."""
    found = product_tflops(options.device, min(1.0, options.minutes))
    return Machine(
        device=options.device,
        copy=copy_gb_per_s(options.device),
        disk=disk_gb_per_s(store, min(4.0, 2 * options.minutes)),
        product=found,
        peak=peak_of(options.device, options.peak_tflops, found),
    )


def _machine_row(machine: Machine, options: argparse.Namespace) -> Row:
    on_gpu = machine.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else machine.device,
        "peak, TFLOP/s": machine.peak.tflops,
        "from": machine.peak.source,
        "square bf16 product, TFLOP/s": machine.product,
        "copies to pinned memory, GB/s": machine.copy,
        "writes to disk, GB/s": machine.disk,
        "threads": options.threads,
    }


def _corpus(options: argparse.Namespace, store: Store) -> Corpus:
    vocabulary = min(SIZES[name].vocab_size for name in options.shapes)
    # A sequence has one row fewer than tokens: BOS is none.
    n_tokens = (N_SHARDS * options.max_rows) * options.context // (options.context - 1) + 2 * options.context
    return make_corpus(store, n_tokens, options.context, vocabulary)


def measure_shape(name: str, seconds: float, setting: Setting) -> list[str]:
    """Measure one size of model alone and captured; return what failed."""
    options, end = setting.options, time.perf_counter() + seconds
    batch_tokens = options.batch_tokens or BATCH_TOKENS[name]
    model = random_model(SIZES[name], options.device)
    bench = Bench(
        setting=setting,
        model=model,
        batch_tokens=batch_tokens,
        forward=bare_tokens_per_s(model, batch_tokens, options.context, 0.03 * seconds),
        processor={
            codec: processor_limit(_pieces(codec, model, batch_tokens, setting), options.threads, 0.03 * seconds)
            for codec in CODECS
        },
    )
    setting.report.table(f"Gemma 3 {name} alone", [_alone_row(name, bench)], _FLOPS_NOTE)
    return _measure_cases(name, bench, end)


def _pieces(codec: str, model: LoadedModel, batch_tokens: int, setting: Setting) -> list[Piece]:
    points = points_of(EVERYTHING, model)
    spec = make_spec(points, model, setting.corpus, codec=codec, rows_per_shard=1024, batch_tokens=batch_tokens)
    return sample(Capture(model, points), spec, batch_tokens, setting.options.context)


def _alone_row(name: str, bench: Bench) -> Row:
    flops = flops_per_token(SIZES[name], bench.setting.options.context)
    return {
        "batch, tokens": bench.batch_tokens,
        "context": bench.setting.options.context,
        "forward, tokens/s": bench.forward,
        "GFLOP/token": flops / 1e9,
        "MFU": bench.forward * flops / bench.setting.machine.peak.tflops / 1e12,
        "statistics, GB/s": bench.processor["none"].statistics,
        "encode none, GB/s": bench.processor["none"].encode,
        "encode blosc, GB/s": bench.processor["blosc"].encode,
        "both none, GB/s": bench.processor["none"].both,
        "both blosc, GB/s": bench.processor["blosc"].both,
    }


def _measure_cases(name: str, bench: Bench, end: float) -> list[str]:
    cases = [Case(selection=s, codec=c, to=t) for s, c, t in product(SELECTIONS, CODECS, PLACES)]
    rows: list[Row] = []
    failed: list[str] = []
    for number, case in enumerate(cases):
        weights = [_WEIGHTS[one.selection] for one in cases[number:]]
        seconds = (end - time.perf_counter()) * weights[0] / sum(weights)
        try:
            rows.append(_case_row(case, bench, seconds))
            print(f"{name}, {case}: {_in_short(rows[-1])}", file=sys.stderr, flush=True)
        except (torch.OutOfMemoryError, MemoryError, ActlakeError) as error:
            # The other captures are still worth their time on a machine that is lent.
            failed.append(f"{case}: {type(error).__name__}: {error}")
    again = bare_tokens_per_s(bench.model, bench.batch_tokens, bench.setting.options.context, _AGAIN_S)
    note = f"{_CAPTURE_NOTE} The forward pass alone, again at the end: {again:,.0f} tokens/s."
    bench.setting.report.table(f"Gemma 3 {name} captured", rows, note)
    return failed


def _in_short(row: Row) -> str:
    return f"{row['tokens/s']:,.0f} tokens/s, {row['of slowest']:.2f} of the slowest limit, {row['slowest']}"


def _case_row(case: Case, bench: Bench, seconds: float) -> Row:
    place = bench.setting.store.child("captured")
    store = place if case.to == "disk" else NullStore(place.url)
    try:
        found = _capture(case, bench, store, seconds)
    finally:
        shutil.rmtree(place.root, ignore_errors=True)
    return found


def _capture(case: Case, bench: Bench, store: Store, seconds: float) -> Row:
    points, setting = points_of(case.selection, bench.model), bench.setting
    row_nbytes = 2 * sum(bench.model.shape.widths()[point] for point in points)
    spec = make_spec(
        points,
        bench.model,
        setting.corpus,
        codec=case.codec,
        rows_per_shard=rows_per_shard(case, bench, row_nbytes, seconds),
        batch_tokens=bench.batch_tokens,
    )
    peak_device_gib(setting.machine.device)
    builder = make_builder(store, spec, bench.model, setting.corpus, setting.workshop)
    done = Driver(builder, seconds=seconds).run()
    raw = row_nbytes * done.n_rows
    limits = limits_of(case, bench, raw / done.n_tokens, done.nbytes / done.n_tokens)
    rate, (name, bound) = done.n_tokens / done.seconds, slowest(limits)
    least, of = TARGETS.get((case.selection, case.codec), _OF_SLOWEST) if case.to == "null" else _OF_SLOWEST
    share = rate / (bench.forward if of == "forward" else bound)
    return {
        "hook points": case.selection,
        "codec": case.codec,
        "to": case.to,
        "tokens/s": rate,
        "raw GB/s": raw / done.seconds / 1e9,
        "of forward": rate / bench.forward,
        "slowest": name,
        "of slowest": rate / bound,
        "target": f"{least:.2f} of {of}",
        "met": "yes" if share >= least else "no",
        "shard, rows": spec.rows_per_shard,
        "shards": len(done.records),
        "shard, s": done.seconds / len(done.records),
        "copy, s": done.landed_s / len(done.records),
        **{f"{part.removesuffix('_s')}, s": done.mean_s(part) for part in _PARTS},
        "CPU s per raw GB": done.cpu_s / raw * 1e9,
        "raw / stored": raw / done.points_nbytes,
        "GPU, GiB": peak_device_gib(setting.machine.device),
        "host so far, GiB": peak_host_gib(),
    }


def rows_per_shard(case: Case, bench: Bench, row_nbytes: int, seconds: float) -> int:
    """Return the power of two of rows whose shard takes its part of the seconds and fits memory and disk."""
    options = bench.setting.options
    limits = limits_of(case, bench, row_nbytes, row_nbytes)
    in_time = seconds / _SHARDS_IN_TIME / sum(1 / rate for rate in limits.values() if rate is not None)
    wanted = max(int(in_time), _LEAST_SEQUENCES * options.context)
    fitting = int(_MEMORY_OF_SHARD * parse_nbytes(options.memory)) // row_nbytes
    if case.to == "disk":
        fitting = min(fitting, shutil.disk_usage(bench.setting.store.root).free // (2 * N_SHARDS * row_nbytes))
    n_rows: int = max(64, min(wanted, fitting, options.max_rows))
    return 1 << (n_rows.bit_length() - 1)


def limits_of(case: Case, bench: Bench, raw_nbytes: float, stored_nbytes: float) -> dict[str, float | None]:
    """Return what bounds a capture of so many bytes a token, in tokens/s."""
    machine = bench.setting.machine
    return {
        "forward": bench.forward,
        "PCIe": None if machine.copy is None else machine.copy * 1e9 / raw_nbytes,
        "processor": bench.processor[case.codec].both * 1e9 / raw_nbytes,
        "disk": machine.disk * 1e9 / stored_nbytes if case.to == "disk" else None,
    }
