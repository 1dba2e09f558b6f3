"""Flipped bits in every kind of stored object: is each of them found, or provably harmless?

    python benchmarks/bench_flips.py --flips 10000

A small dataset, and the manifest of one with a full group, lie in memory. One bit of one object is flipped, everything
that a reader looks at is read again, and the bit is flipped back. A flip is *found* where our error is raised,
*harmless* where all that is read is what it was, *missed* where something else is read: that must not happen, nor any
error but ours (*crashed*).
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, make_parser
from tiling import make_spec, write_dataset

import actlake
from actlake.shards.verify_layout import layout_problems
from actlake.storage.errors import ActlakeError, MissingObjectError
from actlake.storage.manifest import Manifest, compact, write_root
from actlake.storage.records import GROUP_SHARDS, ObjectRecord, Provenance, ShardRecord, commit
from actlake.storage.rowspace import RowSpace
from actlake.storage.stores import Store

POINTS = ("layers.3.mlp_out", "layers.3.resid_post")


@dataclass(kw_only=True)
class Target:
    """Objects of one store, and all that is read of them as something that compares."""

    store: Store
    observe: Callable[[Store], Any]
    kinds: dict[str, list[str]]
    wanted: Any = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = self.observe(self.store)

    def flip(self, key: str, bit: int) -> str:
        """Flip one bit of an object, look, and flip it back; say how it ended."""
        stored = self.store.read(key)
        damaged = bytearray(stored)
        bit %= 8 * len(damaged)
        damaged[bit // 8] ^= 1 << bit % 8
        self.store.write(key, bytes(damaged))
        try:
            return "harmless" if self.observe(self.store) == self.wanted else "missed"
        except ActlakeError:
            return "found"
        except Exception as error:  # noqa: BLE001 - counted and shown: any error but ours is a defect
            print(f"crashed: bit {bit} of {key}: {type(error).__name__}: {error}")
            return "crashed"
        finally:
            self.store.write(key, stored)


def kind_of(key: str) -> str:
    """Return the kind of an object of a dataset, by its key."""
    if key.endswith("zarr.json"):
        return "zarr.json"
    if key.startswith("arrays/"):
        return "shard objects"
    return {"commits": "commit records", "stats": "statistics", "manifest": "manifest"}.get(key.split("/")[0], key)


def _keys(store: Store, folder: str = "") -> Iterator[str]:
    folders = set(store.folders(folder))
    for name in store.names(folder):
        key = f"{folder}/{name}".lstrip("/")
        yield from _keys(store, key) if name in folders else [key]


def _by_kind(store: Store) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in _keys(store):
        found.setdefault(kind_of(key), []).append(key)
    return found


# --- a whole dataset ---


def observe_dataset(store: Store) -> Any:
    """Return all that is read of a dataset: header, manifest, rows, statistics, and what verify says of its layout."""
    ds = actlake.open(store.url)
    rows = [
        ds[name][:].tobytes() for name in (*ds.hook_points, *(n for n in ds.spec.arrays() if n.startswith("rows/")))
    ]
    moments = [ds.statistics(point) for point in ds.hook_points]
    values = [(m.count, m.mean.tobytes(), m.m2.tobytes(), m.norm_mean) for m in moments]
    if problems := list(layout_problems(store)):
        raise MissingObjectError(problems[0].message)
    return ds.header, ds.manifest.to_pylist(), rows, values


def make_dataset(url: str) -> Target:
    """Write a dataset of three shards, the last of them short, below a URL."""
    spec = make_spec(POINTS, width=8, rows_per_shard=64, rows_per_chunk=16)
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:

        def values(array: Any, rows: Any) -> Any:
            return noise.integers(-50, 50, array.shape(len(rows))).astype(array.numpy_dtype)

        made = write_dataset(Path(folder) / "ds", spec, 150, values)
        sizes = made.reader.manifest.n_rows_by_shard()
        dataset_id = spec.dataset_id
        write_root(made.store, dataset_id=dataset_id, n_rows=150, manifest=made.reader.manifest, groups=[])
        assert len(sizes) == 3
        store = Store(url)
        for key in _keys(made.store):
            store.write(key, made.store.read(key))
    return Target(store=store, observe=observe_dataset, kinds=_by_kind(store))


# --- the manifest of a large one ---

SPACE = RowSpace(n_rows=8 * GROUP_SHARDS, rows_per_shard=8, rows_per_block=8, seed=0, order="shuffled")


def observe_manifest(store: Store) -> Any:
    """Return all columns of a manifest, as opening and queries read them."""
    manifest = Manifest.load(store, GROUP_SHARDS * 8)
    return manifest.shards, manifest.table, manifest.sizes(POINTS[0]), manifest.nbytes_by_array()


def make_manifest(url: str) -> Target:
    """Write the commits of one full group, compacted, with index and totals."""
    store = Store(url)
    for shard in range(GROUP_SHARDS):
        objects = {
            name: ObjectRecord(nbytes=1000 + shard % 7 + place, crc32c=shard * 7919 + place, index_crc32c=shard * 31)
            for place, name in enumerate(POINTS)
        }
        record = ShardRecord(
            dataset_id="d" * 64,
            shard=shard,
            revision=0,
            first_row=8 * shard,
            n_rows=8,
            n_void=0,
            objects=objects,
            stats=ObjectRecord(nbytes=500, crc32c=shard),
            provenance=Provenance(attempt=f"{shard:032x}", started="2026-11-22T10:00:00.000+00:00", n_tokens=9),
        )
        commit(store, record)
    manifest = Manifest.load_listed(store)
    groups = compact(store, manifest, SPACE)
    write_root(store, dataset_id="d" * 64, n_rows=8 * GROUP_SHARDS, manifest=manifest, groups=groups)
    keys = [f"manifest/{name}" for name in store.names("manifest")]
    return Target(store=store, observe=observe_manifest, kinds={"manifest": keys, "root.json": ["root.json"]})


# --- flips ---


def run(targets: Sequence[Target], n_flips: int, seed: int) -> dict[str, Counter[str]]:
    """Flip bits, equally many of each kind of object; return how each kind's ended.

    Half of those of an object lie in its last 2 kB: indexes, footers and checksums are there.
    """
    chance = random.Random(seed)
    kinds = [(target, kind) for target in targets for kind in target.kinds]
    found: dict[str, Counter[str]] = {}
    for number in range(n_flips):
        target, kind = kinds[number % len(kinds)]
        key = chance.choice(target.kinds[kind])
        n_bits = 8 * target.store.nbytes(key)
        bit = chance.randrange(n_bits) if chance.random() < 0.5 else chance.randrange(max(0, n_bits - 16_384), n_bits)
        outcome = target.flip(key, bit)
        found.setdefault(kind, Counter())[outcome] += 1
        if outcome == "missed":
            print(f"missed: bit {bit} of {n_bits} of {key}")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    targets = [make_dataset("memory://flips/dataset"), make_manifest("memory://flips/manifest")]
    found = run(targets, options.flips, options.seed)
    with Report(options) as report:
        outcomes = ("found", "harmless", "missed", "crashed")
        rows = [{"object": kind} | {name: count[name] for name in outcomes} for kind, count in found.items()]
        total = {name: sum(count[name] for count in found.values()) for name in outcomes}
        report.table("Flipped bits", [*rows, {"object": "all"} | total], f"seed {options.seed}")
    if n_bad := total["missed"] + total["crashed"]:
        raise SystemExit(f"{n_bad} flips were missed, or ended in an error that is not ours")


if __name__ == "__main__":
    main()
