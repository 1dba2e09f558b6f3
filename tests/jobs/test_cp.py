"""`actlake cp`: whole datasets and parts of them, between all kinds of store, cut short at any write, and damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FormulaModel, make_corpus, write_documents
from fakes import make_spec as make_corpus_spec
from formula_dataset import NARROW, WIDE, Made, bits, make_spec
from servers import Servers
from stored import contents, failing, is_committed, keys, make_whole
from typer.testing import CliRunner, Result

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.ingest.corpus_redact import redact_corpus
from actlake.jobs.cli import store, verify  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.transfer import Selection, copy_corpus, copy_dataset
from actlake.jobs.transfer_objects import Budget, fetch
from actlake.shards.covariance import compute_covariance, read_covariance, write_covariance
from actlake.shards.verify import verify as verify_dataset
from actlake.storage.arrays import crc32c
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, CorruptObjectError, NotFoundError, SpecMismatchError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import uncommit
from actlake.storage.records import ObjectRecord, read_record, stats_key
from actlake.storage.stores import Store


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def assert_whole(url: str) -> None:
    for place in (url, f"{url}/heldout"):
        ds = actlake.open(place)
        assert ds.complete
        assert verify_dataset(ds).problems == ()


# --- whole ---


@pytest.mark.parametrize("way", ["file to memory", "memory to file"])
def test_a_copy_is_the_same_dataset(way: str, tmp_path: Path, memory: str) -> None:
    places = [str(tmp_path), memory] if way == "file to memory" else [memory, str(tmp_path)]
    made = make_whole(f"{places[0]}/demo")
    target = Store(f"{places[1]}/there/demo")
    report = copy_dataset(made.store, target)
    assert [(split.split, split.n_copied, split.n_present, split.complete) for split in report.splits] == [
        ("train", 4, 0, True),
        ("heldout", 1, 0, True),
    ]
    mine, theirs = contents(made.store), contents(target)
    for key in ("spec.json", "heldout/spec.json"):
        one, other = (json.loads(side.pop(key)) for side in (mine, theirs))
        # Another file system: where the texts are is an absolute URL.
        assert {name for name in one if one[name] != other[name]} <= {"corpus", "crc32c"}
    assert mine == theirs
    assert target.read("root.json") == made.store.read("root.json")
    assert_whole(target.url)


def test_a_record_says_where_it_was_copied_from_and_who_built_it(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    target = Store(tmp_path / "copy")
    copy_dataset(made.store, target)
    mine, theirs = read_record(made.store, 2), read_record(target, 2)
    assert b"copied_from" not in made.store.read("commits/00000000/0000000002.json")
    assert theirs == replace(mine, provenance=replace(mine.provenance, copied_from=made.url))


def test_there_and_back_through_object_stores(tmp_path: Path, servers: Servers) -> None:
    made = Made(str(tmp_path / "demo"), 100, spec=make_spec(rows_per_shard=64, rows_per_block=32)).build_all()
    google, amazon = (servers.folder(kind).child("there/demo") for kind in ("gs", "s3"))
    places = [made.store, google, amazon, Store(tmp_path / "back")]
    for source, target in pairwise(places):
        assert copy_dataset(source, target).splits[0].complete
    assert copy_dataset(google, amazon).splits[0].n_present == 2
    mine, theirs = contents(made.store), contents(places[-1])
    del mine["spec.json"], theirs["spec.json"]
    assert mine == theirs
    assert verify_dataset(actlake.open(tmp_path / "back")).problems == ()


# --- some hook points ---


@pytest.mark.parametrize("point", [NARROW, WIDE])
def test_some_hook_points_are_the_dataset_that_a_build_of_these_makes(point: str, tmp_path: Path) -> None:
    points = sorted(make_spec().hook_points, key=lambda item: item.name != point)
    chosen, voids = tuple(points[:1]), frozenset({3, 70})
    made = make_whole(str(tmp_path / "demo"), hook_points=tuple(points), voids=voids)
    direct = make_whole(str(tmp_path / "direct"), hook_points=chosen, voids=voids)
    target = Store(tmp_path / "copy")
    copy_dataset(made.store, target, Selection(points=("layers.3." + point.rpartition(".")[2],)))
    # The row columns too, whose chunks follow those of the hook points.
    assert direct.spec.arrays()["rows/role"].rows_per_chunk == chosen[0].rows_per_chunk
    mine, theirs = contents(direct.store), contents(target)
    assert mine == theirs
    copy = actlake.open(target.url)
    assert copy.spec.row_space_id == made.spec.row_space_id
    assert copy.spec.dataset_id != made.spec.dataset_id
    assert np.array_equal(bits(copy[point][:200]), bits(made.open()[point][:200]))
    assert_whole(target.url)


def test_copies_of_parts_line_up_with_their_source(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    copy_dataset(made.store, Store(tmp_path / "narrow"), Selection(points=(NARROW,), heldout=False))
    # It raises where rows do not line up.
    actlake.align(part=actlake.open(tmp_path / "narrow"), whole=made.open())
    assert not (tmp_path / "narrow/heldout").exists()


def test_an_unknown_hook_point_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    with pytest.raises(BadInputError, match=r"layer 5 is out of range; the layers are 3\.\.3"):
        copy_dataset(made.store, Store(tmp_path / "copy"), Selection(points=("layers.5.*",)))
    assert not (tmp_path / "copy").exists()


# --- some shards ---


def test_shards_are_copied_bit_by_bit_and_the_rest_later(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    target = Store(tmp_path / "copy")
    report = copy_dataset(made.store, target, Selection(start=1, stop=3))
    assert (report.splits[0].n_copied, report.splits[0].complete, report.n_missing) == (2, False, 0)
    assert actlake.open(target.url).missing_shards == [0, 3]
    rest = copy_dataset(made.store, target)
    assert (rest.splits[0].n_copied, rest.splits[0].n_present, rest.splits[0].complete) == (2, 2, True)
    assert_whole(target.url)


@pytest.mark.parametrize("text", ["4:", "2:2", "3:1"])
def test_a_range_of_no_shard_is_refused(text: str, tmp_path: Path) -> None:
    make_whole(str(tmp_path / "demo"))
    result = run("cp", tmp_path / "demo", tmp_path / "copy", "--shards", text)
    assert result.exit_code == 2
    assert f"--shards {text} selects nothing; the shards are 0:4" in result.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("text", ["1", "a:b", "1:2:3", "-1:2", ""])
def test_what_is_no_range_is_refused(text: str, tmp_path: Path) -> None:
    make_whole(str(tmp_path / "demo"))
    result = run("cp", tmp_path / "demo", tmp_path / "copy", f"--shards={text}")
    assert result.exit_code == 2
    assert "is no range of shards; write e.g. 0:16" in result.stderr


# --- again ---


def test_a_copy_that_dies_at_any_write_shows_whole_shards_alone_and_goes_on(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(f"{memory}/demo", 100, spec=make_spec(rows_per_shard=64, rows_per_block=32)).build_all()
    whole = Store(f"{memory}/whole")
    with failing(monkeypatch, "write", 10**6) as writes:
        copy_dataset(made.store, whole, n_workers=1)
    expected, total = contents(whole), len(writes)
    assert total > 24
    for number in range(total):
        target = Store(f"{memory}/copy-{number}")
        with failing(monkeypatch, "write", number), pytest.raises(OSError, match="fails on purpose"):
            copy_dataset(made.store, target, n_workers=1)
        committed = [shard for shard in (0, 1) if is_committed(target, shard)]
        if target.exists("spec.json"):
            ds = actlake.open(target.url)
            assert [shard for shard in (0, 1) if shard not in ds.missing_shards] == committed
            assert verify_dataset(ds, n_threads=1).problems == ()
        assert copy_dataset(made.store, target, n_workers=1).splits[0].n_present == len(committed)
        assert contents(target) == expected
        assert actlake.open(target.url).complete


def test_what_is_there_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_whole(str(tmp_path / "demo"))
    target = Store(tmp_path / "copy")
    copy_dataset(made.store, target)
    with failing(monkeypatch, "read_into", 0), failing(monkeypatch, "write", 0):
        report = copy_dataset(made.store, target)
    assert [(split.n_copied, split.n_present, split.nbytes) for split in report.splits] == [(0, 4, 0), (0, 1, 0)]


def test_a_source_that_grows_is_followed(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "demo"), 100, spec=make_spec(rows_per_shard=64, rows_per_block=32)).build(0)
    target = Store(tmp_path / "copy")
    result = run("cp", made.url, target.url)
    assert result.exit_code == 1
    assert f"{made.url} lacks 1 of these shards: 1; 'actlake ingest' builds them" in result.stderr
    made.build(1)
    assert run("cp", made.url, target.url).exit_code == 0
    assert actlake.open(target.url).complete
    grown = Made(made.url, 200, spec=made.spec)
    grown.build(1, revision=1).build(2, 3)
    report = copy_dataset(grown.store, target)
    assert (report.splits[0].n_copied, report.splits[0].n_present, report.splits[0].complete) == (3, 1, True)
    assert read_record(target, 1).revision == 1
    assert np.array_equal(bits(actlake.open(target.url)[WIDE][:200]), bits(grown.open()[WIDE][:200]))


def test_a_shard_that_was_repaired_at_the_source_is_the_one_that_is_there(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "demo"), 200, spec=make_spec(rows_per_shard=64, rows_per_block=32))
    made.build(0, 2, 3).build(1, revision=1)
    target = Store(tmp_path / "copy")
    copy_dataset(made.store, target)
    before = contents(target)
    uncommit(made.store, 1)
    made.build(1)
    assert run("cp", made.url, target.url).exit_code == 0
    assert contents(target) == before


def test_other_content_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    other = make_whole(str(tmp_path / "copy"))
    Made(other.url, 200, spec=made.spec, offset=0.5).build(2)
    before = contents(other.store)
    result = run("cp", made.url, other.url)
    assert result.exit_code == 2
    assert f"{other.url}: shard 2 is committed with other content than in {made.url}; --replace" in result.stderr
    assert contents(other.store) == before
    assert run("cp", made.url, other.url, "--replace").exit_code == 0
    assert contents(other.store) == contents(made.store)
    assert_whole(other.url)


def test_a_shard_that_is_replaced_is_invisible_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_whole(str(tmp_path / "demo"))
    other = make_whole(str(tmp_path / "copy"))
    Made(other.url, 200, spec=made.spec, offset=0.5).build(2)
    seen = []
    original = Store.write

    def watching(place: Store, key: str, *parts: Any) -> None:
        if key.startswith("arrays/") and "/c/2" in key and place.url == other.url:
            seen.append(is_committed(other.store, 2) or other.store.exists("root.json"))
        original(place, key, *parts)

    monkeypatch.setattr(Store, "write", watching)
    copy_dataset(made.store, other.store, Selection(replace=True))
    assert seen == [False] * 6


# --- damage ---


def flip(made: Made) -> str:
    made.flip(WIDE, 1, 40)
    return f"shard 1, {WIDE}: "


def flip_index(made: Made) -> str:
    made.flip(NARROW, 1, -10)
    return f"shard 1, {NARROW}"


def flip_column(made: Made) -> str:
    made.flip("rows/role", 1, 3)
    return "shard 1, rows/role"


def cut(made: Made) -> str:
    made.store.write(made.key(WIDE, 1), made.store.read(made.key(WIDE, 1))[:-7])
    return f"shard 1, {WIDE}: "


def lengthen(made: Made) -> str:
    made.store.write(made.key(WIDE, 1), made.store.read(made.key(WIDE, 1)) + b"\0")
    return f"shard 1, {WIDE}: "


def lose(made: Made) -> str:
    made.store.delete(made.key(WIDE, 1))
    return f"shard 1, {WIDE}: the shard is committed, but the object is not there"


def exchange(made: Made) -> str:
    other = replace(made, url=made.url + "-other", offset=0.25).build(1)
    made.store.write(made.key(WIDE, 1), other.store.read(made.key(WIDE, 1)))
    return f"shard 1, {WIDE}: "


def statistics(made: Made) -> str:
    data = bytearray(made.store.read(stats_key(1)))
    data[len(data) // 2] ^= 1
    made.store.write(stats_key(1), bytes(data))
    return "shard 1, statistics: "


@pytest.mark.parametrize("damage", [flip, flip_index, flip_column, cut, lengthen, lose, exchange, statistics])
def test_a_damaged_object_is_named_and_the_other_shards_are_copied(
    damage: Callable[[Made], str], tmp_path: Path
) -> None:
    made = make_whole(str(tmp_path / "demo"))
    message = damage(made)
    target = Store(tmp_path / "copy")
    (failure,) = copy_dataset(made.store, target).failures
    assert failure.startswith(f"{made.url}: {message}")
    assert "verify --repair" in failure
    ds = actlake.open(target.url)
    assert ds.missing_shards == [1]
    assert verify_dataset(ds).problems == ()
    uncommit(made.store, 1)
    made.build(1)
    assert copy_dataset(made.store, target).splits[0].n_copied == 1
    assert_whole(target.url)


def test_a_damaged_column_is_found_where_it_is_encoded_anew(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"), codec=Codec(name="none"))
    message = flip_column(made)
    (failure,) = copy_dataset(made.store, Store(tmp_path / "copy"), Selection(points=(WIDE,))).failures
    assert message in failure


def test_damage_is_exit_code_2_and_json_has_all_of_it(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    message = flip(made)
    result = run("cp", made.url, tmp_path / "copy", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert message in found["splits"][0]["failures"][0]
    assert (found["complete"], found["splits"][1]["complete"]) == (False, True)


# --- where to ---


def test_another_spec_is_refused_field_by_field(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    other = make_whole(str(tmp_path / "copy"), seed=3, batch_tokens=1024)
    before = contents(other.store)
    with pytest.raises(SpecMismatchError) as caught:
        copy_dataset(made.store, other.store)
    assert "batch_tokens: here 1024, there 512" in str(caught.value)
    assert "seed: here 3, there 0" in str(caught.value)
    assert str(caught.value).count(": here") == 2
    assert contents(other.store) == before


def test_another_spec_of_the_held_out_split_is_found_before_anything_is_written(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    other = make_spec(rows_per_shard=64, rows_per_block=32, split="heldout", seed=1)
    prepare(Store(tmp_path / "copy/heldout"), Header(spec=other, n_rows=40, corpus="../corpus"))
    before = contents(Store(tmp_path / "copy"))
    with pytest.raises(SpecMismatchError, match="seed: here 1, there 0"):
        copy_dataset(made.store, Store(tmp_path / "copy"))
    assert contents(Store(tmp_path / "copy")) == before


@pytest.mark.parametrize("target", ["demo", "demo/arrays/copy", "."])
def test_a_place_inside_the_other_is_refused(target: str, tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    with pytest.raises(BadInputError, match="lie in each other"):
        copy_dataset(made.store, Store(tmp_path / target))


def test_a_folder_of_other_things_and_a_bucket_and_a_hub_are_refused(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(
        BadInputError, match=r"holds other things \(notes.txt\).*name a folder of its own, e.g. .*/demo"
    ):
        copy_dataset(made.store, Store(tmp_path / "mine"))
    for url, reason in (("gs://bucket", "is a whole bucket"), ("hf://datasets/a/b", "cannot be written to")):
        with pytest.raises(BadInputError, match=reason):
            copy_dataset(made.store, Store(url))


def test_what_is_no_dataset_is_explained(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    result = run("cp", f"{made.url}/arrays", tmp_path / "copy")
    assert result.exit_code == 2
    assert f"it is arrays of the dataset {made.url}" in result.stderr
    assert run("cp", tmp_path / "nothing", tmp_path / "copy").exit_code == 2
    assert not (tmp_path / "copy").exists()


# --- the corpus, and what else belongs to a dataset ---


@pytest.fixture
def with_corpus(tmp_path: Path) -> Store:
    """A small dataset of both splits with its corpus, as an ingestion leaves them."""
    corpus = make_corpus(Store(tmp_path / "here/corpora/words"), write_documents(tmp_path / "texts"))
    spec = make_corpus_spec(corpus)
    dataset = Store(tmp_path / "here/demo")
    for split, place, url in (("train", dataset, ".."), ("heldout", dataset.child("heldout"), "../..")):
        own = replace(spec, split=split)
        header = Header(spec=own, n_rows=corpus.row_index(split, own.keep).n_rows, corpus=f"{url}/corpora/words")
        prepare(place, header)
        builder = ShardBuilder(store=place, corpus=corpus, forward=FormulaModel(own.hook_points))
        for shard in range(builder.space.n_shards):
            builder.build(shard)
        finish(place, header)
    return dataset


def test_the_corpus_comes_along(with_corpus: Store, tmp_path: Path) -> None:
    result = run("cp", with_corpus.url, tmp_path / "there/demo", "--with-corpus")
    assert result.exit_code == 0, result.stderr
    assert contents(Store(tmp_path / "there/demo")) == contents(with_corpus)
    mine, theirs = Store(tmp_path / "here/corpora/words"), Store(tmp_path / "there/corpora/words")
    assert {key: theirs.read(key) for key in keys(theirs)} == {
        key: mine.read(key) for key in keys(mine) if not key.startswith("cuts/")
    }
    checked = run("verify", tmp_path / "there/demo")
    assert checked.exit_code == 0
    assert "the corpus is whole" in checked.stdout
    again = copy_dataset(with_corpus, Store(tmp_path / "there/demo"), Selection(corpus=True))
    assert again.corpus is not None
    assert (again.corpus.n_copied, again.corpus.n_present, again.corpus.nbytes) == (0, 3, 0)


def test_without_it_the_copy_knows_where_the_texts_are(with_corpus: Store, tmp_path: Path, memory: str) -> None:
    place = with_corpus.url.removesuffix("/demo") + "/corpora/words"
    sibling, far = Store(tmp_path / "here/copy"), Store(f"{memory}/copy")
    for target, expected in ((sibling, "../corpora/words"), (far, place)):
        result = run("cp", with_corpus.url, target.url)
        assert f"the texts stay at {place}; --with-corpus brings them along" in result.stdout
        assert Header.read(target).corpus == expected
    assert Header.read(sibling.child("heldout")).corpus == "../../corpora/words"
    # Brought along later, it is used, and stays so.
    for selection in (Selection(corpus=True), Selection()):
        copy_dataset(with_corpus, far, selection)
        assert Header.read(far).corpus == "../corpora/words"
        assert Header.read(far.child("heldout")).corpus == "../../corpora/words"


def test_a_damaged_corpus_is_copied_whole_or_not_at_all(with_corpus: Store, tmp_path: Path) -> None:
    corpus = Corpus.open(Store(tmp_path / "here/corpora/words"))
    key = next(key for key in corpus.files if key.startswith("sequences/heldout"))
    corpus.store.write(key, corpus.store.read(key)[:-1] + b"x")
    result = run("cp", with_corpus.url, tmp_path / "there/demo", "--with-corpus")
    assert result.exit_code == 2
    assert f"{corpus.store.url}/{key}" in result.stderr
    assert not (tmp_path / "there/corpora/words/corpus.json").exists()


def test_a_corpus_is_copied_alone_and_a_larger_cut_stays(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "texts")
    small = make_corpus(Store(tmp_path / "small"), source, max_tokens=100)
    large = make_corpus(Store(tmp_path / "large"), source)
    there = Store(tmp_path / "there")
    assert run("cp", small.store.url, there.url).exit_code == 0
    assert Corpus.open(there).verify() == 3
    copy_corpus(large.store, there, 2)
    assert Corpus.open(there).splits == large.splits
    report = copy_corpus(small.store, there, 2)
    assert report.n_copied == 0
    assert Corpus.open(there).splits == large.splits
    assert Corpus.open(there).verify() == 3
    other = make_corpus(Store(tmp_path / "other"), source, seed=1)
    with pytest.raises(SpecMismatchError, match=f"holds corpus {large.corpus_id[:12]}"):
        copy_corpus(other.store, there, 2)
    refused = run("cp", small.store.url, tmp_path / "b", "--points", WIDE)
    assert "is a corpus, which is copied whole" in refused.stderr


def test_a_redaction_follows_and_is_not_undone(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "texts")
    mine, theirs = (make_corpus(Store(tmp_path / name), source) for name in ("mine", "theirs"))
    there = Store(tmp_path / "there")
    copy_corpus(mine.store, there, 2)
    before = keys(there)
    redact_corpus(mine.store, [mine.sequences("train", 0, 1)[0].document])
    copy_corpus(mine.store, there, 2)
    copied = Corpus.open(there)
    assert copied.redactions == Corpus.open(mine.store).redactions != {}
    assert copied.verify() == 3
    assert len(keys(there)) == len(before)
    assert [key for key in before - keys(there) if key.startswith("sequences/train")] != []
    with pytest.raises(SpecMismatchError, match=r"1 documents are redacted in .*there and not in .*theirs"):
        copy_corpus(theirs.store, there, 2)


def test_a_shard_that_was_redacted_there_does_not_come_back(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    other = make_whole(str(tmp_path / "copy"))
    Made(other.url, 200, spec=made.spec, voids=frozenset({130})).build(2)
    made.build(2, revision=1)
    (failure,) = copy_dataset(made.store, other.store).failures
    assert "shard 2 is committed with other content" in failure
    assert read_record(other.store, 2).n_void == 1


def test_covariances_come_along_under_the_name_of_the_copy(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    ds = made.open()
    found = compute_covariance(ds, WIDE, n_rows=100)
    write_covariance(ds, WIDE, found)
    write_covariance(ds, NARROW, compute_covariance(ds, NARROW, n_rows=100))
    copy_dataset(made.store, Store(tmp_path / "copy"), Selection(points=(WIDE,)))
    copied = read_covariance(actlake.open(tmp_path / "copy"), WIDE)
    assert np.array_equal(copied.covariance, found.covariance)
    assert Store(tmp_path / "copy").names("stats/covariance") == [f"{WIDE}.parquet"]


# --- memory ---


def test_a_budget_lets_in_what_fits_and_what_never_would_alone() -> None:
    budget, order = Budget(100), []
    with budget.holding(60), budget.holding(40):
        order.append("both")
    with budget.holding(1000):
        order.append("alone")
    with budget.holding(100):
        order.append("again")
    assert order == ["both", "alone", "again"]


def test_a_copy_holds_no_more_than_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_whole(str(tmp_path / "demo"))
    held: list[int] = []
    original = Budget.holding

    def noting(budget: Budget, nbytes: int) -> Any:
        held.append(nbytes)
        return original(budget, nbytes)

    monkeypatch.setattr(Budget, "holding", noting)
    copy_dataset(made.store, Store(tmp_path / "copy"), memory_nbytes=1, n_workers=4)
    records = [read_record(made.store, shard) for shard in range(4)] + [read_record(made.store.child("heldout"), 0)]
    assert sorted(held) == sorted(
        2 * item.nbytes for record in records for item in (*record.objects.values(), record.stats)
    )
    assert_whole(str(tmp_path / "copy"))


def test_large_objects_are_read_by_ranges(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, data = Store(memory), np.arange(5000, dtype=np.int32).tobytes()
    place.write("big", data)
    monkeypatch.setattr("actlake.jobs.transfer_objects._RANGE_NBYTES", 1000)
    record = ObjectRecord(nbytes=len(data), crc32c=crc32c(data))
    with failing(monkeypatch, "read_into", 10**6) as reads:
        assert bytes(fetch(place, "big", record, "big")) == data
    # 20,000 bytes and the one that must not be there.
    assert len(reads) == 20
    for wrong in (replace(record, nbytes=19_000), replace(record, nbytes=21_000), replace(record, crc32c=1)):
        with pytest.raises(CorruptObjectError):
            fetch(place, "big", wrong, "big")
    with pytest.raises(NotFoundError):
        place.read("small")
