"""What is fuzzed: for each kind of stored object its hostile versions, and what a user would do with such a dataset."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FormulaModel, make_corpus, make_spec, write_documents
from fuzz import hostile
from hypothesis import strategies as st

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.jobs.catalog import catalog
from actlake.shards.covariance import compute_covariance, read_covariance, write_covariance
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import open_damaged, verify
from actlake.storage.arrays import crc32c
from actlake.storage.corpus import Corpus
from actlake.storage.errors import ActlakeError
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest, write_root
from actlake.storage.manifest_files import group_bytes, group_key, to_table
from actlake.storage.records import GROUP_SHARDS, ObjectRecord, Provenance, ShardRecord, commit_key, stats_key
from actlake.storage.sealed import seal
from actlake.storage.stores import Store

POINTS = ("layers.0.attn_z", "layers.1.resid_post")


@dataclass
class World:
    """A sound dataset with its corpus, and one that is a compacted group alone; any object of them can be replaced."""

    root: Path
    sound: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def build(cls, root: Path) -> "World":
        source = write_documents(root / "texts", n_documents=25)
        corpus = make_corpus(Store(root / "corpus"), source)
        spec = make_spec(corpus)
        n_rows = min(300, corpus.row_index("train", spec.keep).n_rows)
        store = Store(root / "data")
        header = Header(spec=spec, n_rows=n_rows, corpus="../corpus")
        prepare(store, header)
        builder = ShardBuilder(store=store, corpus=corpus, forward=FormulaModel(spec.hook_points))
        for shard in range(builder.space.n_shards):
            builder.build(shard)
        manifest = Manifest.load(store)
        write_root(store, dataset_id=spec.dataset_id, n_rows=n_rows, manifest=manifest, groups=[])
        dataset = actlake.open(store.url)
        write_covariance(dataset, POINTS[1], compute_covariance(dataset, POINTS[1]))
        prepare(group := Store(root / "group"), Header(spec=spec, n_rows=GROUP_SHARDS * 64, corpus="../corpus"))
        (group.write(group_key(0), group_bytes(to_table(_records(spec.dataset_id, list(spec.arrays()))))))
        world = cls(root)
        world.sound = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        return world

    def one(self, pattern: str) -> str:
        """Return the first key that matches a pattern."""
        return min(str(path.relative_to(self.root)) for path in self.root.glob(pattern))

    @contextmanager
    def holding(self, objects: dict[str, bytes]) -> Iterator[None]:
        """Store other bytes, or none at all, for as long as the block lasts."""
        try:
            for key, data in objects.items():
                (self.root / key).write_bytes(data)
            yield
        finally:
            for key in objects:
                (self.root / key).write_bytes(self.sound[key])
            for left in set(map(str, self.root.rglob("rows/*/*.parquet"))) - {
                str(self.root / key) for key in self.sound
            }:
                os.unlink(left)


def _records(dataset_id: str, arrays: list[str]) -> Iterator[ShardRecord]:
    for shard in range(GROUP_SHARDS):
        yield ShardRecord(
            dataset_id=dataset_id,
            shard=shard,
            revision=0,
            first_row=64 * shard,
            n_rows=64,
            n_void=0,
            objects={name: ObjectRecord(nbytes=1000, crc32c=1, index_crc32c=2) for name in arrays},
            stats=ObjectRecord(nbytes=500, crc32c=shard),
            provenance=Provenance(attempt="a", software={"torch": "2"}),
        )


# --- what a user does ----------------------------------------------------------------------------------------------


class OtherError(Exception):
    """Something else than one of our errors was raised."""


def ours(act: Callable[[], Any]) -> Any:
    """Do something; our own errors are answers, None, and any other is not."""
    try:
        return act()
    except ActlakeError:
        return None


def use_dataset(url: str) -> None:
    """Open a dataset and look at all of it, as far as it lets us."""
    ours(lambda: catalog(url))
    ours(lambda: open_damaged(url))
    dataset = ours(lambda: actlake.open(url))
    if dataset is None:
        return
    looks: list[Callable[[], Any]] = [
        lambda: repr(dataset),
        lambda: dataset._repr_html_(),
        lambda: dataset.missing_shards,
        lambda: dataset.complete,
        lambda: dataset.manifest,
        lambda: dataset.reader.manifest.nbytes_by_array(),
        lambda: list(dataset.reader.manifest.records()),
        lambda: dataset.rows([0, 1, 70]),
        lambda: dataset.heldout,
        lambda: list(dataset.stream(dataset.hook_points[0], batch_size=16, buffer_bytes="1MiB")),
        lambda: verify(dataset),
        lambda: read_covariance(dataset, dataset.hook_points[-1]),
        lambda: dataset.context([0]),
        lambda: dataset.corpus.values("document", [0]),
    ]
    for name in dataset.hook_points[:3]:
        looks += point_looks(dataset, name)
    for look in looks:
        ours(look)


def point_looks(dataset: ActivationDataset, name: str) -> list[Callable[[], Any]]:
    return [
        lambda: dataset[name][:3],
        lambda: dataset[name][-1],
        lambda: dataset.statistics(name).median_norm,
        lambda: (dataset.statistics(name).outlier_channels(), dataset.statistics(name).unit_scale),
    ]


def use_corpus(url: str) -> None:
    ours(lambda: catalog(url))
    corpus = ours(lambda: Corpus.open(Store(url)))
    if corpus is None:
        return
    keep = make_spec(corpus).keep
    looks: list[Callable[[], Any]] = [
        lambda: corpus.sequences("train", 0, 3),
        lambda: corpus.columns("train", 0, ["document", "source"]),
        lambda: corpus.row_index("train", keep),
        lambda: corpus.row_index("heldout", keep),
        lambda: corpus.pieces(),
        lambda: corpus.verify(),
        lambda: corpus.holds(None),
    ]
    dataset = actlake.open(str(Path(url).parent / "data"))
    looks += [
        lambda: dataset.context([0, 70]),
        lambda: dataset.corpus.values("source", [0, 1]),
        lambda: dataset.where(source="x").n_rows,
        lambda: verify(dataset, corpus=corpus),
    ]
    for look in looks:
        ours(look)


# --- what is stored instead ----------------------------------------------------------------------------------------

Objects = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """Hostile objects, and what is then used."""

    objects: st.SearchStrategy[Objects]
    use: Callable[[str], None]
    url: str

    def run(self, world: World, objects: Objects) -> None:
        with world.holding(objects):
            self.use(str(world.root / self.url))


def targets(world: World) -> dict[str, Target]:
    """Return all targets by name."""

    def swap(key: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]]) -> st.SearchStrategy[Objects]:
        return strategy(world.sound[key]).map(lambda data: {key: data})

    def dataset(objects: st.SearchStrategy[Objects]) -> Target:
        return Target(objects, use_dataset, "data")

    def corpus(objects: st.SearchStrategy[Objects]) -> Target:
        return Target(objects, use_corpus, "corpus")

    def texts(sound: bytes) -> st.SearchStrategy[bytes]:
        return hostile.json_texts(sound, sealed)

    files = hostile.parquet_files
    return {
        "spec": dataset(specs(world)),
        "spec text": dataset(swap("data/spec.json", texts)),
        "root": dataset(swap("data/root.json", texts)),
        "zarr": dataset(swap("data/arrays/layers.0.attn_z/zarr.json", texts)),
        "commit": dataset(swap("data/" + commit_key(0), texts)),
        "index": dataset(swap(world.one("data/manifest/index-*"), files)),
        "statistics": dataset(recorded(world, "data/" + stats_key(0), files, "stats")),
        "covariance": dataset(swap(world.one("data/stats/covariance/*"), files)),
        "shard": dataset(recorded(world, "data/arrays/layers.0.attn_z/c/0/0", shard_objects, "layers.0.attn_z")),
        "column": dataset(recorded(world, "data/arrays/rows/sequence/c/0", shard_objects, "rows/sequence")),
        "group": Target(swap("group/manifest/00000000.parquet", files), use_dataset, "group"),
        "corpus": corpus(swap("corpus/corpus.json", texts)),
        "sequences": corpus(listed(world, world.one("corpus/sequences/train*"), files)),
        "vocabulary": corpus(listed(world, world.one("corpus/vocab*"), files)),
        "row index": corpus(swap(world.one("corpus/rows/*/train.parquet"), files)),
    }


def sealed(value: Any) -> bytes:
    """Return a JSON value as it is stored, with the checksum that an object has."""
    try:
        return json.dumps(seal(value)).encode()
    except (TypeError, ValueError, AttributeError):
        return json.dumps(value).encode()


def specs(world: World) -> st.SearchStrategy[Objects]:
    """Return changed specs that hash to their dataset_id, as who writes one would have it."""
    from actlake.storage.rowspace import content_hash

    def signed(value: Any) -> Objects:
        # Where there is nothing left to hash it stays as it is.
        with suppress(KeyError, TypeError, ValueError):
            value["dataset_id"] = content_hash({"format_version": value["format_version"], "spec": value["spec"]})
        return {"data/spec.json": sealed(value)}

    return hostile.json_values(json.loads(world.sound["data/spec.json"])).map(signed)


def recorded(
    world: World, key: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]], name: str
) -> st.SearchStrategy[Objects]:
    """Return hostile objects with a commit record that has their checksums."""
    commit = "data/" + commit_key(0)

    def with_record(data: bytes) -> Objects:
        record = json.loads(world.sound[commit])
        objects = record["content"]["objects"]
        entry = record["content"]["stats"] if name == "stats" else objects[name]
        index_crc = 0 if name == "stats" else int.from_bytes(data[-4:], "little")
        entry |= {"nbytes": len(data), "crc32c": crc32c(data), "index_crc32c": index_crc}
        return {key: data, commit: sealed(record)}

    return strategy(world.sound[key]).map(with_record)


def listed(world: World, key: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]]) -> st.SearchStrategy[Objects]:
    """Return hostile corpus files with a ``corpus.json`` that has their checksums."""

    def with_header(data: bytes) -> Objects:
        header = json.loads(world.sound["corpus/corpus.json"])
        header["files"][key.partition("/")[2]] |= {"nbytes": len(data), "crc32c": crc32c(data)}
        return {key: data, "corpus/corpus.json": json.dumps(header).encode()}

    return strategy(world.sound[key]).map(with_header)


def shard_objects(sound: bytes) -> st.SearchStrategy[bytes]:
    """Return shard objects whose index, chunks or both are changed, with sound checksums where that is possible."""
    n_words = 2 * (64 // 16)  # offsets and lengths of the chunks of ``make_spec``

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        body = bytearray(sound[: -8 * n_words - 4])
        table = np.frombuffer(sound[-8 * n_words - 4 : -4], dtype="<u8").copy()
        for _ in range(draw(st.integers(0, 2))):
            edges = (0, 1, 3, 4, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 - 5, len(body), len(sound))
            table[draw(st.integers(0, len(table) - 1))] = draw(st.sampled_from(edges))
        if draw(st.booleans()):
            # Of the first chunk: blosc's header and what follows, under its own checksum.
            place, value = draw(st.integers(0, 40)), draw(st.integers(0, 255))
            length = int(np.frombuffer(sound[-8 * n_words - 4 : -4], dtype="<u8")[1])
            body[min(place, length - 5)] = value
            body[length - 4 : length] = crc32c(bytes(body[: length - 4])).to_bytes(4, "little")
        index = table.tobytes()
        return bytes(body) + index + crc32c(index).to_bytes(4, "little")

    return st.one_of(changed(), changed(), hostile.torn(sound))
