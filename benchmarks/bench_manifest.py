"""What a manifest of 1.35M shards costs to open and to ask: ``python benchmarks/bench_manifest.py``.

A dataset of Gemma 3 4B, four streams of 34 layers: 136 hook points and the four row columns. It is generated as the
driver leaves it: header, full groups of 1,024 commits, the commits of the last and short group, the index and
``root.json``; without arrays and the commits of full groups, since neither is read here. Each figure is the best of
three processes on two cores, files in page cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import actlake
from actlake.storage.codecs import Codec
from actlake.storage.header import Header, prepare
from actlake.storage.hookpoints import HookPoint
from actlake.storage.manifest import SCHEMA, Manifest, group_key, write_root
from actlake.storage.manifest_files import group_bytes, to_records
from actlake.storage.manifest_parts import GroupFile, Rows
from actlake.storage.records import GROUP_SHARDS, commit
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec
from actlake.storage.stores import Store

LAYERS, STREAMS, WIDTH = 34, ("attn_z", "mlp_in", "mlp_out", "resid_post"), 2560
LAYER = "layers.17."


def make_spec() -> DatasetSpec:
    """Return a spec of 136 hook points, 8,192 rows a shard."""
    names = [str(HookPoint(layer, stream)) for layer in range(LAYERS) for stream in STREAMS]
    return DatasetSpec(
        model="google/gemma-3-4b-pt",
        model_revision=None,
        model_fingerprint="0" * 64,
        architecture="Gemma3ForConditionalGeneration",
        corpus_id="1" * 64,
        split="train",
        keep=KeepRule(exclude=(0, 1, 2)),
        hook_points=tuple(PointSpec(name=name, width=WIDTH, rows_per_chunk=512) for name in names),
        dtype="bfloat16",
        seed=0,
        order="shuffled",
        rows_per_shard=8192,
        rows_per_block=8192,
        batch_tokens=16384,
        codec=Codec(),
    )


def group_table(spec: DatasetSpec, shards: range, rng: np.random.Generator) -> pa.Table:
    """Return commits of shards with sizes that vary by 0.1 % and random checksums."""
    arrays, n = sorted(spec.arrays().values(), key=lambda array: array.name), len(shards)
    typical = np.array([array.nbytes_per_row * spec.rows_per_shard / 1.45 for array in arrays])
    nbytes = (typical * (1 + 0.001 * rng.standard_normal((n, len(arrays))))).astype(np.int64)

    def checksums(count: int) -> npt.NDArray[np.uint32]:
        return rng.integers(0, 2**32, count, dtype=np.uint32)

    names = pa.array([array.name for array in arrays])
    objects = pa.StructArray.from_arrays(
        [names.take(pa.array(np.tile(np.arange(len(arrays)), n))), nbytes.ravel(), *map(checksums, [nbytes.size] * 2)],
        names=["array", "nbytes", "crc32c", "index_crc32c"],
    )
    seconds = np.asarray(shards) * 7 + np.datetime64("2026-01-01T00:00:00", "s")
    columns: dict[str, Any] = {
        "shard": np.asarray(shards),
        "revision": np.zeros(n, np.int32),
        "first_row": np.asarray(shards) * spec.rows_per_shard,
        "n_rows": np.full(n, spec.rows_per_shard),
        "n_void": np.zeros(n, np.int64),
        "nbytes": nbytes.sum(axis=1),
        "dataset_id": [spec.dataset_id] * n,
        "objects": pa.ListArray.from_arrays(np.arange(0, nbytes.size + 1, len(arrays), dtype=np.int32), objects),
        "stats_nbytes": np.full(n, 5_600_000),
        "stats_crc32c": checksums(n),
        "attempt": [rng.bytes(16).hex() for _ in shards],
        "host": [f"node-{worker:04d}" for worker in rng.integers(0, 512, n)],
        "device": ["NVIDIA H100 80GB HBM3"] * n,
        "software": [json.dumps({"actlake": "0.1.0", "torch": "2.13.0"})] * n,
        "started": np.datetime_as_string(seconds),
        "finished": np.datetime_as_string(seconds + 60),
        "n_tokens": rng.integers(8192, 9000, n),
        **{name: rng.random(n) * 30 for name in ("forward_s", "encode_s", "write_s")},
    }
    return pa.table(columns).cast(SCHEMA)


def generate(url: str, n_shards: int) -> dict[str, float]:
    """Write the metadata of a finished dataset; return the seconds that the driver needs for the index."""
    store, spec, rng = Store(url), make_spec(), np.random.default_rng(0)
    prepare(store, Header(spec=spec, n_rows=n_shards * spec.rows_per_shard, corpus="../corpus"))
    n_groups = n_shards // GROUP_SHARDS
    for group in range(n_groups):
        first = group * GROUP_SHARDS
        store.write(group_key(group), group_bytes(group_table(spec, range(first, first + GROUP_SHARDS), rng)))
    rest = group_table(spec, range(n_groups * GROUP_SHARDS, n_shards), rng)
    for record in to_records(rest):
        commit(store, record)
    begun = time.perf_counter()
    manifest = Manifest([*(GroupFile(store, group) for group in range(n_groups)), Rows(n_groups, rest)])
    opened = time.perf_counter() - begun
    write_root(
        store,
        dataset_id=spec.dataset_id,
        n_rows=n_shards * spec.rows_per_shard,
        manifest=manifest,
        groups=list(range(n_groups)),
    )
    return {"open by groups": opened, "write the index": time.perf_counter() - begun - opened}


# --- What is measured, each in a process of its own ----------------------------------------------------------------


def open_it(url: str) -> str:
    """Open, and know what is missing."""
    return f"{actlake.open(url).n_rows:,} rows"


def coverage(url: str) -> str:
    """Rows and bytes of each layer."""
    ds = actlake.open(url)
    nbytes: dict[int, int] = {}
    for name, stored in ds.reader.manifest.nbytes_by_array().items():
        if not name.startswith("rows/"):
            layer = HookPoint.parse(name).layer
            nbytes[layer] = nbytes.get(layer, 0) + stored
    missing = ds.reader.manifest.missing(ds.spec.row_space(ds.n_rows_planned))
    return f"{len(nbytes)} layers, {sum(nbytes.values()) / 1e12:.1f} TB, {len(missing)} shards missing"


def shards_of_a_layer(url: str) -> str:
    """The shards of one layer with the bytes of its four objects."""
    ds = actlake.open(url)
    table = ds.reader.manifest.sizes(*(LAYER + stream for stream in STREAMS))
    nbytes = sum(pc.sum(column).as_py() for column in table.columns[1:])
    return f"{len(table):,} shards, {nbytes / 1e12:.1f} TB"


def provenance(url: str) -> str:
    """Tokens and seconds by host."""
    table = actlake.open(url).reader.manifest.columns("host", "n_tokens", "forward_s")
    return f"{len(table.group_by('host').aggregate([('forward_s', 'sum')]))} hosts"


def listed(url: str) -> str:
    """Open by listing, as a dataset in the making is opened."""
    return f"{len(Manifest.load_listed(Store(url))):,} shards"


def sizes_of_all(url: str) -> str:
    """The sizes of all objects, ten arrays at a time."""
    manifest = actlake.open(url).reader.manifest
    names = list(manifest.nbytes_by_array())
    count = 0
    for start in range(0, len(names), 10):
        count += sum(len(column) for column in manifest.sizes(*names[start : start + 10]).columns[1:])
    return f"{count:,} objects"


MEASURES: dict[str, tuple[Callable[[str], str], str]] = {
    "open": (open_it, "1 s"),
    "coverage by layer": (coverage, "2 s"),
    "one layer's shard list": (shards_of_a_layer, "0.5 s"),
    "time by host": (provenance, ""),
    "sizes of all objects": (sizes_of_all, ""),
    "open by listing": (listed, ""),
}


def measure(name: str, url: str) -> None:
    """Print seconds after the start and after the opening, calls and peak memory of this process."""
    if len(os.sched_getaffinity(0)) > 2:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    listings: list[str] = []
    names = Store.names

    def counted(self: Store, key: str = "") -> list[str]:
        listings.append(key)
        return names(self, key)

    Store.names = counted  # type: ignore[method-assign]
    actlake.open  # noqa: B018  (imports it, which is not measured)
    begun, used = time.perf_counter(), time.process_time()
    found = MEASURES[name][0](url)
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": seconds, "cpu": used, "mib": memory, "listings": len(listings), "found": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_350_000)
    parser.add_argument("--at", help="keep the dataset in this folder, and use the one that is there")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        url = options.at or f"{folder}/dataset"
        if not Path(url, "root.json").exists():
            begun = time.perf_counter()
            made = generate(url, options.shards)
            seconds = ", ".join(f"{what} {value:.1f} s" for what, value in made.items())
            print(f"generated in {time.perf_counter() - begun:.0f} s; of it {seconds}")
        report(url)


def report(url: str) -> None:
    """Print the table of all measures."""
    print(json.dumps(harness.conditions()))
    nbytes = {file.name: file.stat().st_size / 1e6 for file in Path(url, "manifest").iterdir()}
    index = [size for name, size in nbytes.items() if name.startswith("index")]
    print(
        f"manifest/: {sum(nbytes.values()):,.0f} MB in {len(nbytes)} files; index: {sum(index):,.0f} MB in {len(index)}"
    )
    print("| question | s | CPU s | wanted | memory MiB | list calls | answer |\n|---|---|---|---|---|---|---|")
    for name, (_, wanted) in MEASURES.items():
        command = [sys.executable, __file__, "--measure", name, url]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
        best = min((json.loads(run.stdout) for run in runs), key=lambda run: run["s"])
        figures = (
            f"{best['s']:.2f}",
            f"{best['cpu']:.2f}",
            wanted,
            f"{best['mib']:.0f}",
            best["listings"],
            best["found"],
        )
        print(f"| {name} |", " | ".join(map(str, figures)), "|", flush=True)


if __name__ == "__main__":
    main()
