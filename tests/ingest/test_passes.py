"""Shards whose hook points do not fit the memory of a shard: captured in passes, stored as if they had been one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FormulaModel, make_corpus, make_spec, write_documents

from actlake.ingest.batch_feed import ForwardPass
from actlake.ingest.build import ShardBuilder
from actlake.ingest.passes import plan_passes
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, DataError, NotFoundError
from actlake.storage.header import Header, prepare
from actlake.storage.records import commit_key, read_record
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store

#: Token ids at which a hook point is not finite.
Bad = Mapping[str, Sequence[int]]

#: Not in the order of the computation, which the passes follow all the same.
WIDTHS = {"layers.1.resid_post": 4, "layers.0.attn_z": 6, "layers.0.mlp_in": 4, "layers.2.mlp_in": 5}
POINTS = tuple(PointSpec(name=name, width=width, rows_per_chunk=16) for name, width in WIDTHS.items())
COLUMNS = 17  # bytes of the row columns
ROOM = {
    # Bytes of 64 rows: 4, 6, 4 and 5 numbers of two bytes, and the row columns.
    "one pass": 64 * (2 * 19 + COLUMNS),
    "two passes": 64 * (2 * 10 + COLUMNS),
    "four passes": 64 * (2 * 6 + COLUMNS),
}


class Narrowing(FormulaModel):
    """A formula model that can be narrowed; notes what it is asked for, and is not finite where ``bad`` says so."""

    def __init__(self, points: Sequence[PointSpec], bad: Bad) -> None:
        super().__init__(points)
        self.asked, self.bad = list[tuple[str, ...]](), bad

    def narrow(self, points: Sequence[str]) -> ForwardPass:
        def forward(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, /) -> dict[str, torch.Tensor]:
            self.asked.append(tuple(points))
            found = self(input_ids, position_ids)
            for name in points:
                for token in self.bad.get(name, ()):
                    found[name][input_ids == token] = float("nan")
            return {name: found[name] for name in points}

        return forward


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "texts"))


def make_builder(
    path: Path, corpus: Corpus, room: str, model: Narrowing | None = None, n_rows: int = 150, **options: Any
) -> ShardBuilder:
    spec, model = make_spec(corpus, hook_points=POINTS), model or Narrowing(POINTS, {})
    prepare(Store(path), Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    return ShardBuilder(
        store=Store(path),
        corpus=corpus,
        forward=model.narrow(spec.point_names),
        narrow=model.narrow,
        shard_memory=ROOM[room],
        n_threads=2,
        **options,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Return all files but the commit records, which tell of time."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("commits/")}


@pytest.mark.parametrize("room", ["two passes", "four passes"])
def test_passes_store_the_bytes_of_one_pass_and_commit_once(tmp_path: Path, corpus: Corpus, room: str) -> None:
    whole = make_builder(tmp_path / "whole", corpus, "one pass")
    parts = make_builder(tmp_path / "parts", corpus, room)
    assert [len(whole.passes), len(parts.passes)] == [1, {"two passes": 2, "four passes": 4}[room]]
    for shard in (2, 0, 1):
        one, other = whole.build(shard), parts.build(shard)
        assert one.content == other.content
        assert other.provenance.n_tokens == len(parts.passes) * one.provenance.n_tokens
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_passes_go_from_the_deepest_hook_points_and_the_shallow_one_is_the_least_full(corpus: Corpus) -> None:
    spec = make_spec(corpus, hook_points=POINTS)
    assert plan_passes(spec, 64) == (spec.point_names,)
    assert plan_passes(spec, 64, ROOM["one pass"]) == (spec.point_names,)
    assert plan_passes(spec, 64, ROOM["one pass"] - 1) == (
        ("layers.1.resid_post", "layers.0.mlp_in", "layers.2.mlp_in"),
        ("layers.0.attn_z",),
    )
    assert plan_passes(spec, 64, ROOM["two passes"]) == (
        ("layers.1.resid_post", "layers.2.mlp_in"),
        ("layers.0.attn_z", "layers.0.mlp_in"),
    )
    assert list(plan_passes(spec, 64, ROOM["four passes"])) == [
        ("layers.2.mlp_in",),
        ("layers.1.resid_post",),
        ("layers.0.mlp_in",),
        ("layers.0.attn_z",),
    ]
    with pytest.raises(BadInputError, match=r"layers.0.attn_z alone takes 768 bytes .*rows_per_shard = 32, or raise"):
        plan_passes(spec, 64, ROOM["four passes"] - 1)


def test_each_pass_captures_its_hook_points_alone_and_rows_are_heard_of_once(tmp_path: Path, corpus: Corpus) -> None:
    model, heard = Narrowing(POINTS, {}), list[int]()
    builder = make_builder(tmp_path / "ds", corpus, "two passes", model)
    builder.build(0, lambda n_rows, forward_s: heard.append(n_rows))
    assert sum(heard) == 64
    assert tuple(dict.fromkeys(model.asked)) == builder.passes


def tokens_of(corpus: Corpus) -> tuple[int, int]:
    """Return two token ids that are rows of shard 0."""
    tokens = corpus.sequences("train", 0, 1)[0].tokens
    return int(tokens[1]), int(tokens[2])


def test_a_value_that_is_not_finite_in_a_later_pass_commits_nothing(tmp_path: Path, corpus: Corpus) -> None:
    model = Narrowing(POINTS, {"layers.0.mlp_in": tokens_of(corpus)})
    with pytest.raises(DataError, match=r"shard 0, layers\.0\.mlp_in: \d+ of 64 rows hold non-finite values"):
        make_builder(tmp_path / "ds", corpus, "two passes", model).build(0)
    assert not Store(tmp_path / "ds").exists(commit_key(0))
    sound = make_builder(tmp_path / "ds", corpus, "two passes")
    assert sound.build(0).content == make_builder(tmp_path / "other", corpus, "one pass").build(0).content


@pytest.mark.parametrize(("shallow", "deep"), [(1, 0), (0, 1), (1, 1), (2, 1), (1, 2)])
def test_rows_that_any_pass_finds_are_void_in_all(tmp_path: Path, corpus: Corpus, shallow: int, deep: int) -> None:
    tokens = tokens_of(corpus)
    bad = {"layers.0.mlp_in": tokens[:shallow], "layers.2.mlp_in": tokens[:deep]}
    one, two = (
        make_builder(tmp_path / room, corpus, room, Narrowing(POINTS, bad), void_nonfinite=True).build(0)
        for room in ("one pass", "two passes")
    )
    assert one.n_void > 0
    assert one.content == two.content
    assert files(tmp_path / "one pass") == files(tmp_path / "two passes")


def test_a_shard_that_grows_is_uncommitted_before_its_first_pass_is_stored(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_builder(tmp_path / "ds", corpus, "two passes", n_rows=40).build(0)
    large, write = make_builder(tmp_path / "ds", corpus, "two passes"), Store.write

    def watching(store: Store, key: str, *parts: bytes) -> None:
        if key.startswith("arrays/"):
            with pytest.raises(NotFoundError):
                read_record(store, 0)
        write(store, key, *parts)

    monkeypatch.setattr(Store, "write", watching)
    assert (large.build(0).n_rows, large.build(0).revision) == (64, 1)
