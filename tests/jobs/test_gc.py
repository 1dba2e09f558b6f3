"""`actlake gc`: what killed runs leave is found, all of it and nothing else, and only old litter goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import make_corpus, write_documents
from formula_dataset import NARROW, WIDE, Made, make_spec
from servers import Servers
from stored import contents, keys, make_whole
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import store  # noqa: F401 - registers the command
from actlake.jobs.cli.app import app
from actlake.jobs.litter import KINDS, Litter, delete_litter, find_litter
from actlake.jobs.transfer import copy_dataset
from actlake.shards.verify import verify as verify_dataset
from actlake.storage.corpus import Corpus
from actlake.storage.errors import NotFoundError
from actlake.storage.finish import finish
from actlake.storage.listing import list_uploads
from actlake.storage.manifest import uncommit
from actlake.storage.manifest_files import index_key
from actlake.storage.records import commit_key
from actlake.storage.stores import Store

HOUR = 3600.0

#: Where a corpus build keeps what it sorts.
BUILDING = "building/0123456789abcdef"

#: Copies a dataset, and is killed while the row columns of shard 1 are written: one file has no name yet.
KILLED = """
import os, signal, stat, sys
from actlake.jobs.transfer import copy_dataset
from actlake.storage.stores import Store

real = os.fsync

def dying(handle):
    if os.path.exists(sys.argv[2] + "/arrays/layers.3.resid_post/c/1/0") and stat.S_ISREG(os.fstat(handle).st_mode):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)

os.fsync = dying
copy_dataset(Store(sys.argv[1]), Store(sys.argv[2]), n_workers=1)
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def litter(place: Store, *, age_s: float = 2 * HOUR) -> dict[str, str]:
    """The kind of everything that is found, by key, as if so much time had passed."""
    (found,) = find_litter(place, older_than_s=HOUR, now=time.time() + age_s)
    assert all(item.young == (age_s < HOUR) for item in found.litter)
    return {item.key: item.kind for item in found.litter}


def collect(place: Store, *, age_s: float = 2 * HOUR) -> list[Litter]:
    (found,) = find_litter(place, older_than_s=HOUR, now=time.time() + age_s)
    deleted: list[Litter] = []
    delete_litter(found, deleted.append)
    return deleted


def test_a_whole_dataset_has_no_litter(tmp_path: Path, memory: str) -> None:
    for url in (str(tmp_path / "demo"), f"{memory}/demo"):
        assert litter(make_whole(url).store) == {}


def test_what_a_killed_run_leaves_is_found_and_nothing_else(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    target = Store(tmp_path / "copy")
    ended = subprocess.run([sys.executable, "-c", KILLED, made.url, target.url], timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    found = litter(target)
    (unfinished,) = (key for key, kind in found.items() if kind == "temporary")
    assert unfinished.startswith("arrays/rows/token_id/c/.actlake-")
    of_shard_1 = {f"arrays/{NARROW}/c/1/0", f"arrays/{WIDE}/c/1/0"}
    assert found == {unfinished: "temporary"} | dict.fromkeys(of_shard_1, "uncommitted")
    assert litter(target, age_s=0) == found
    before = contents(target)
    assert [item.key for item in collect(target, age_s=0)] == []
    assert {item.key for item in collect(target)} == set(found)
    assert contents(target) == {key: data for key, data in before.items() if key not in found}
    assert not (tmp_path / f"copy/arrays/{WIDE}/c/1").exists()
    copy_dataset(made.store, target)
    assert litter(target) == {}
    assert actlake.open(target.url).complete


def test_every_kind_is_told_and_foreign_objects_stay(tmp_path: Path, memory: str) -> None:
    for url in (str(tmp_path / "demo"), f"{memory}/demo"):
        made = make_whole(url)
        uncommit(made.store, 2)
        planted = {
            "arrays/layers.4.mlp_out/zarr.json": "unknown array",
            "arrays/layers.4.mlp_out/c/0/0": "unknown array",
            "stats/covariance/layers.4.mlp_out.parquet": "unknown array",
            f"arrays/{WIDE}/c/2048/0": "uncommitted",
            "heldout/stats/0000000001.parquet": "uncommitted",
            "manifest/00000000.parquet": "outdated",
            "manifest/00000007.parquet": "outdated",
            "notes.txt": "foreign",
            f"arrays/{WIDE}/c/02/0": "foreign",
            "heldout/notes.txt": "foreign",
            "commits/00000003/0000000000.json": "foreign",
        }
        for key in planted:
            made.store.write(key, b"litter")
        if made.store.local:
            planted["arrays/.actlake-00"] = "temporary"
            Path(url, "arrays/.actlake-00").write_bytes(b"half")
        found = litter(made.store)
        planted["manifest/index-00000000-00004.parquet"] = "outdated"
        # While a summary counts shard 2, readers see it: its objects are no litter yet.
        assert found == planted
        collect(made.store)
        of_shard_2 = {made.key(name, 2) for name in made.spec.arrays()} | {"stats/0000000002.parquet"}
        left = {key: kind for key, kind in planted.items() if kind == "foreign"}
        assert litter(made.store) == left | dict.fromkeys(of_shard_2, "uncommitted")
        collect(made.store)
        assert litter(made.store) == left
        ds = made.open()
        assert ds.missing_shards == [2]
        assert {problem.kind for problem in verify_dataset(ds).problems} == {"foreign"}
        made.build(2)
        finish(made.store, made.open().header)
        assert litter(made.store) == left
    assert set(KINDS) == {*planted.values(), "temporary", "unlisted", "upload"}


def test_a_shard_without_record_that_a_summary_counts_is_no_litter(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    made.store.delete(commit_key(1))
    assert litter(made.store) == {"root.json": "outdated"}
    collect(made.store)
    index = index_key(0, 4)
    assert {kind for key, kind in litter(made.store).items() if key != index} == {"uncommitted"}
    assert litter(made.store)[index] == "outdated"


def test_a_shard_whose_redaction_was_interrupted_is_no_litter(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    for shard in (1, 2):
        record = made.store.read(commit_key(shard))
        uncommit(made.store, shard)
    made.store.write("redacting/0000000001.json", record)
    collect(made.store)
    # Its objects are all that there is of it.
    left = {key for key in keys(made.store) if "/c/1" in key}
    assert left == {made.key(name, 1) for name in made.spec.arrays()}
    assert litter(made.store) == {}


def test_totals_of_a_smaller_plan_are_outdated(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"), n_rows=100)
    root = made.store.read("root.json")
    Made(made.url, 200, spec=made.spec)
    made.store.write("root.json", root)
    assert litter(made.store) == {"root.json": "outdated", index_key(0, 2): "outdated"}


# --- what must not go ---


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_shard_in_the_making_stays_whole_while_its_newest_object_is_young(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "demo"), 868).build(0, 1)
    for shard in (0, 1):
        made.store.delete(commit_key(shard))
    for key in keys(made.store):
        aged(tmp_path / "demo" / key, 2 * HOUR)
    aged(tmp_path / "demo" / made.key(WIDE, 1), 0.5 * HOUR)
    (found,) = find_litter(made.store, older_than_s=HOUR)
    assert {item.shard for item in found.litter if item.young} == {1}
    assert {item.shard for item in found.litter if not item.young} == {0}
    delete_litter(found)
    assert {item.shard for item in next(find_litter(made.store, older_than_s=HOUR)).litter} == {1}


def test_what_was_committed_or_written_since_it_was_found_stays(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "demo"), 868).build(0, 1, 2, 3)
    record = made.store.read(commit_key(3))
    for shard in range(4):
        made.store.delete(commit_key(shard))
    (found,) = find_litter(made.store, older_than_s=HOUR, now=time.time() + 2 * HOUR)
    made.build(0).store.write(commit_key(3), record)
    made.store.write(made.key(WIDE, 1), made.store.read(made.key(WIDE, 1)))
    delete_litter(found)
    assert {key for key in keys(made.store) if "/c/" in key} == {
        *(made.key(name, shard) for name in made.spec.arrays() for shard in (0, 3)),
        made.key(WIDE, 1),
    }
    assert verify_dataset(made.open()).problems == ()


def test_an_age_that_is_not_known_is_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    made = make_whole(f"{memory}/demo")
    uncommit(made.store, 0)
    monkeypatch.setattr("actlake.storage.listing._modified", lambda info: None)
    (found,) = find_litter(made.store, older_than_s=0, now=time.time() + HOUR)
    assert len(found.litter) > 3
    assert all(item.young for item in found.litter)


# --- corpora ---


def test_a_whole_corpus_has_no_litter(tmp_path: Path) -> None:
    corpus = make_corpus(Store(tmp_path / "words"), write_documents(tmp_path / "texts"))
    corpus.row_index("train", make_spec().keep)
    assert litter(corpus.store) == {}


def test_what_corpus_builds_leave_is_found(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "texts")
    large = make_corpus(Store(tmp_path / "large"), source)
    small = make_corpus(Store(tmp_path / "small"), source, max_tokens=100)
    place, expected = large.store, {}
    for key in keys(small.store) - keys(place):
        place.write(key, small.store.read(key))
        expected[key] = "unlisted"
    place.write(f"{BUILDING}/runs/0", b"spill")
    place.write("building/notes.txt", b"mine")
    expected |= {f"{BUILDING}/runs/0": "unlisted", "building/notes.txt": "foreign"}
    assert len(expected) >= 4
    assert litter(place) == expected
    collect(place)
    assert litter(place) == {"building/notes.txt": "foreign"}
    assert Corpus.open(place).verify() == 3


def test_a_build_at_work_keeps_all_that_it_wrote(tmp_path: Path) -> None:
    place = Store(tmp_path / "words")
    for key in (f"{BUILDING}/runs/a", f"{BUILDING}/runs/b", "sequences/train-0000000000-00000000.parquet"):
        place.write(key, b"spill")
        aged(tmp_path / "words" / key, 2 * HOUR)
    (found,) = find_litter(place, older_than_s=HOUR)
    assert [item.young for item in found.litter] == [False] * 3
    aged(tmp_path / "words" / BUILDING / "runs/b", 0.5 * HOUR)
    (found,) = find_litter(place, older_than_s=HOUR)
    assert [item.young for item in found.litter] == [True] * 3


def test_the_files_of_a_larger_cut_that_is_about_to_be_published_stay(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "texts")
    large = make_corpus(Store(tmp_path / "large"), source)
    place = make_corpus(Store(tmp_path / "small"), source, max_tokens=100).store
    for key in keys(large.store) - {"corpus.json"}:
        place.write(key, large.store.read(key))
    assert litter(place) == {}


# --- object stores ---


def test_uploads_that_were_not_completed_are_found_and_aborted(tmp_path: Path, servers: Servers) -> None:
    folder = servers.folder("s3")
    place = folder.child("demo")
    copy_dataset(Made(str(tmp_path / "demo"), 10).build(0).store, place)
    bucket, _, prefix = place.root.partition("/")
    for key in (f"{prefix}/arrays/{WIDE}/c/0/0", f"{prefix}-2/other"):
        place.call(key, "call_s3", "create_multipart_upload", Bucket=bucket, Key=key)
    place.write("stats/0000000001.parquet", b"litter")
    assert litter(place) == {f"arrays/{WIDE}/c/0/0": "upload", "stats/0000000001.parquet": "uncommitted"}
    # This server says of every upload that it began in 2010.
    (found,) = find_litter(place, older_than_s=100 * 365 * 24 * HOUR)
    delete_litter(found)
    assert len(list(list_uploads(place))) == 1
    assert {item.kind for item in collect(place)} == {"upload", "uncommitted"}
    assert list(list_uploads(place)) == []
    assert len(list(list_uploads(folder.child("demo-2")))) == 1
    assert verify_dataset(actlake.open(place.url, place.options)).problems == ()


def test_litter_in_a_bucket_goes_by_its_age(tmp_path: Path, servers: Servers) -> None:
    place = servers.folder("gs").child("demo")
    copy_dataset(Made(str(tmp_path / "demo"), 10).build(0).store, place)
    place.write("stats/0000000001.parquet", b"litter")
    assert collect(place, age_s=0) == []
    assert [(item.kind, item.nbytes) for item in collect(place)] == [("uncommitted", 6)]
    assert litter(place) == {}


# --- the command ---


def test_the_command_lists_and_deletes_below_a_folder(tmp_path: Path) -> None:
    corpus = make_corpus(Store(tmp_path / "data/corpora/words"), write_documents(tmp_path / "texts"))
    made = make_whole(str(tmp_path / "data/demo"))
    made.store.write("notes.txt", b"mine")
    made.store.write("stats/0000000012.parquet", b"litter")
    before = keys(made.store)
    shown = run("gc", tmp_path / "data", "--older-than", "1 h")
    assert shown.exit_code == 0
    assert f"corpus {corpus.store.url}: nothing to collect" in shown.stdout
    assert "uncommitted: 1 objects, 6 B, 1 younger than 1 h stay (of a shard without a commit record)" in shown.stdout
    assert "foreign: 1 objects, 4 B (of no name that actlake gives; never deleted)" in shown.stdout
    listed = run("gc", tmp_path / "data", "--older-than", "0s")
    assert "nothing was deleted; --delete does it" in listed.stdout
    assert keys(made.store) == before
    done = json.loads(run("gc", tmp_path / "data", "--older-than", "0s", "--delete", "--json").stdout)
    (dataset,) = (place for place in done if place["kind"] == "dataset")
    assert {item["key"]: item["deleted"] for item in dataset["litter"]} == {
        "notes.txt": False,
        "stats/0000000012.parquet": True,
    }
    assert keys(made.store) == before - {"stats/0000000012.parquet"}


@pytest.mark.parametrize("text", ["1", "an hour", "-1h", "1y"])
def test_what_is_no_age_is_refused(text: str, tmp_path: Path) -> None:
    result = run("gc", tmp_path, f"--older-than={text}")
    assert result.exit_code == 2
    assert f"--older-than {text!r} is no age; write e.g. 90s, 30min, 1h or 2d" in result.stderr


def test_where_nothing_is_there_is_nothing_to_collect(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotFoundError, match="neither a dataset nor a corpus"):
        list(find_litter(Store(tmp_path), older_than_s=0))
