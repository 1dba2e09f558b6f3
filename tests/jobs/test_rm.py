"""`actlake rm`: what goes and what stays, and that a removal cut short anywhere leaves nothing that seems whole."""

import json
from pathlib import Path

import pytest
from fakes import make_corpus, write_documents
from formula_dataset import Made, make_spec
from servers import Servers
from stored import failing, keys, make_whole
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import store  # noqa: F401 - registers the command
from actlake.jobs.cli.app import app
from actlake.jobs.removal import remove, survey, users_of
from actlake.jobs.transfer import copy_dataset
from actlake.shards.verify import verify as verify_dataset
from actlake.storage.corpus import Corpus
from actlake.storage.errors import NotFoundError
from actlake.storage.header import Header, prepare
from actlake.storage.stores import Store


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(Store(tmp_path / "data/corpora/words"), write_documents(tmp_path / "texts"))


def use(corpus: Corpus, place: Store, url: str) -> None:
    prepare(place, Header(spec=make_spec(corpus_id=corpus.corpus_id), n_rows=64, corpus=url))


def test_nothing_is_left(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "data/demo"))
    (tmp_path / "data/demo/arrays/.actlake-0").write_text("half a file")
    n_objects = len(keys(made.store))
    result = run("rm", made.url, "--yes")
    assert result.exit_code == 0
    assert f"removing the dataset {made.url}: {n_objects} objects, " in result.stdout
    assert list((tmp_path / "data").iterdir()) == []


def test_nothing_is_left_in_an_object_store(tmp_path: Path, servers: Servers) -> None:
    place = servers.folder("s3")
    copy_dataset(Made(str(tmp_path / "demo"), 10).build(0).store, place.child("demo"))
    place.write("demo/notes.txt", b"mine")
    place.write("demo-2/spec.json", b"{}")
    remove(place.child("demo"))
    assert keys(place) == {"demo/notes.txt", "demo-2/spec.json"}


def test_without_yes_it_says_what_would_go(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    before = {key: made.store.read(key) for key in keys(made.store)}
    result = run("rm", made.url)
    assert result.exit_code == 2
    assert f"would remove the dataset {made.url}: {len(before)} objects, " in result.stdout
    assert "nothing was removed; say --yes" in result.stderr
    assert {key: made.store.read(key) for key in keys(made.store)} == before
    shown = json.loads(run("rm", made.url, "--json").stdout)
    assert shown["removed"] is False
    assert shown["places"][0]["nbytes"] == sum(map(len, before.values()))


def test_what_is_not_ours_stays_and_is_named(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    foreign = {
        "notes.txt",
        "commits/00000000/README",
        "commits/00000001/0000000000.json",
        "arrays/layers.3.resid_post/c/01/0",
        "arrays/layers.3.other/c/0/0",
        "arrays/rows/other/c/0",
        "heldout/mine/data.bin",
        "manifest/index.parquet",
        "stats/0.parquet",
    }
    for key in foreign:
        made.store.write(key, b"mine")
    assert set(survey(made.store).foreign) == foreign
    result = run("rm", made.url, "--yes")
    assert result.exit_code == 0
    assert f"not actlake's, so it stays: {survey_line(foreign)}" in sorted_names(result.stderr)
    assert keys(made.store) == foreign


def survey_line(names: set[str]) -> str:
    return ", ".join(sorted(names))


def sorted_names(text: str) -> str:
    head, _, names = text.strip().partition(": ")
    return f"{head}: {', '.join(sorted(names.split(', ')))}"


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "zarr.json").write_text("mine")
    (elsewhere / "00000001.parquet").write_text("mine")
    (tmp_path / "demo/arrays/layers.7.mlp_out").symlink_to(elsewhere)
    (tmp_path / "demo/heldout/manifest").rename(tmp_path / "moved")
    (tmp_path / "demo/heldout/manifest").symlink_to(elsewhere)
    remove(made.store)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["00000001.parquet", "zarr.json"]
    assert keys(made.store) == {"arrays/layers.7.mlp_out", "heldout/manifest"}


@pytest.mark.parametrize("content", ["", "notes.txt", "spec/spec.json", "arrays/mine/data.npy"])
def test_what_is_no_dataset_is_left_alone(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if content:
        Store(folder).write(content, b"mine")
    result = run("rm", folder, "--yes")
    assert result.exit_code == 2
    assert f"neither a dataset nor a corpus at {folder}" in result.stderr
    assert keys(Store(folder)) == ({content} if content else set())
    with pytest.raises(NotFoundError):
        remove(Store(tmp_path / "absent"))


def test_a_removal_that_dies_at_any_delete_leaves_nothing_that_seems_whole(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actlake.jobs.removal.thread_count", lambda local: 2)
    model = make_whole(f"{memory}/model", n_rows=100)
    objects = {key: model.store.read(key) for key in keys(model.store)}
    number = 0
    while True:
        place = Store(f"{memory}/{number}")
        for key, data in objects.items():
            place.write(key, data)
        with failing(monkeypatch, "delete", number) as deleted:
            try:
                remove(place)
                break
            except OSError:
                pass
        assert place.exists("spec.json"), deleted
        gone = set(objects) - keys(place)
        for split in ("", "heldout/"):
            if not place.exists(f"{split}spec.json"):
                continue
            ds = actlake.open(f"{place.url}/{split}".rstrip("/"))
            # What a reader sees is really there, and it is whole only as long as no object is gone.
            broken = [item for item in verify_dataset(ds, n_threads=1).problems if item.shard is not None]
            assert broken == [], deleted
            assert not ds.complete or not any("/c/" in key for key in gone if key.startswith(f"{split}arrays"))
        remove(place)
        assert keys(place) == set()
        number += 1
    assert number > len(objects)


def test_other_readers_of_zarr_never_see_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_whole(str(tmp_path / "demo"), n_rows=100)
    with failing(monkeypatch, "delete", 10**6) as deleted:
        remove(made.store)
    objects = [place for place, key in enumerate(deleted) if "/c/" in key]
    metadata = [place for place, key in enumerate(deleted) if key.endswith("zarr.json")]
    assert max(metadata) < min(objects)


# --- corpora ---


def test_a_corpus_goes_and_nothing_else(corpus: Corpus) -> None:
    corpus.store.write("notes.txt", b"mine")
    corpus.store.write("building/0123456789abcdef/runs/0", b"spill")
    result = run("rm", corpus.store.url, "--yes")
    assert result.exit_code == 0
    assert keys(corpus.store) == {"notes.txt"}


def test_a_corpus_in_use_is_refused_without_force(corpus: Corpus, tmp_path: Path) -> None:
    first, second = Store(tmp_path / "data/demo"), Store(tmp_path / "data/runs/demo")
    use(corpus, first, "../corpora/words")
    use(corpus, second, corpus.store.url)
    use(corpus, Store(tmp_path / "data/other"), "../corpora/others")
    assert sorted(users_of(corpus.store)) == sorted([first.url, second.url])
    result = run("rm", corpus.store.url, "--yes")
    assert result.exit_code == 2
    assert f"{corpus.store.url} is the corpus of " in result.stderr
    assert Corpus.open(corpus.store).verify() == 3
    assert run("rm", corpus.store.url, "--yes", "--force").exit_code == 0
    assert not (tmp_path / "data/corpora/words").exists()
    assert Header.read(first).n_rows == 64


def test_a_dataset_goes_with_its_corpus_if_no_other_has_it(corpus: Corpus, tmp_path: Path) -> None:
    first, second = Store(tmp_path / "data/demo"), Store(tmp_path / "data/other")
    for place in (first, second):
        use(corpus, place, "../corpora/words")
    before = keys(Store(tmp_path / "data"))
    refused = run("rm", first.url, "--yes", "--corpus")
    assert f"is the corpus of {second.url}; remove these first" in refused.stderr
    assert keys(Store(tmp_path / "data")) == before
    remove(second)
    result = run("rm", first.url, "--yes", "--corpus", "--json")
    assert [place["kind"] for place in json.loads(result.stdout)["places"]] == ["dataset", "corpus"]
    assert keys(Store(tmp_path / "data")) == set()


def test_a_corpus_that_is_half_removed_or_half_built_is_none_and_can_be_removed(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actlake.jobs.removal.thread_count", lambda local: 1)
    objects = {key: corpus.store.read(key) for key in keys(corpus.store)}
    number = 1
    while True:
        place = Store(tmp_path / str(number))
        for key, data in objects.items():
            place.write(key, data)
        with failing(monkeypatch, "delete", number):
            try:
                remove(place)
                break
            except OSError:
                pass
        with pytest.raises(NotFoundError):
            Corpus.open(place)
        remove(place)
        assert not Path(place.root).exists()
        number += 1
    assert number > len(objects)
