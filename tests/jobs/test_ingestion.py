"""Whole runs of the driver on a tiny real model: complete, resumed, grown, refused, failed."""

import hashlib
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Recorder, contents, run_until

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.jobs import ingestion
from actlake.jobs.engines import ray_cluster
from actlake.jobs.engines.events import RowsCaptured, ShardAbandoned, ShardCommitted
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.jobs.plan.gather import plan_job
from actlake.storage.errors import (
    BadInputError,
    JobFileError,
    ModelAccessError,
    ShardFailedError,
    SpecMismatchError,
    StoreError,
    UnknownNameError,
)
from actlake.storage.records import commit_key, read_record
from actlake.storage.stores import Store

Write = Callable[..., Path]


def test_a_run_leaves_a_complete_dataset_with_its_held_out_split(write_job: Write, tmp_path: Path) -> None:
    report = ingest(read_job(write_job()), engine="local")
    ds = actlake.open(tmp_path / "ds")
    assert ds.complete
    assert ds.n_rows == 700
    assert ds.hook_points == ("layers.0.resid_post", "layers.1.attn_z", "layers.1.resid_post", "layers.2.resid_post")
    assert ds.heldout.complete
    assert ds.heldout.n_rows == 175  # 700 x 0.2 / 0.8
    assert report.n_rows == 875
    assert report.n_built == report.n_shards == 6 + 2
    assert report.raw_nbytes == 875 * ds.spec.nbytes_per_row
    ours = set(ds["rows/sequence"][:].tolist())
    assert len(ours) > 20
    assert Store(tmp_path / "ds").exists("root.json")


def test_a_second_run_builds_nothing(write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = read_job(write_job())
    ingest(job, engine="local")
    before = contents(tmp_path / "ds")
    monkeypatch.setattr(ShardBuilder, "build", lambda *_: pytest.fail("a shard was built again"))
    assert ingest(job, engine="local").n_built == 0
    assert contents(tmp_path / "ds") == before


def test_more_rows_add_shards_and_equal_a_run_from_scratch(
    write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    ingest(read_job(write_job(max_rows=300)), engine="local")
    first = actlake.open(tmp_path / "ds")["layers.1.attn_z"][:256]
    report = ingest(read_job(write_job(max_rows=700)), engine="local")
    assert report.n_built == 4 + 2  # The short third shard again and three more; both held-out shards.
    grown = contents(tmp_path / "ds")
    assert grown == reference
    revisions = {shard: read_record(Store(tmp_path / "ds"), shard).revision for shard in range(6)}
    assert revisions == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0}
    assert np.array_equal(first.view("u2"), actlake.open(tmp_path / "ds")["layers.1.attn_z"][:256].view("u2"))


def test_fewer_rows_change_nothing(write_job: Write, tmp_path: Path, reference: dict[str, Any]) -> None:
    ingest(read_job(write_job()), engine="local")
    assert ingest(read_job(write_job(max_rows=10)), engine="local").n_built == 0
    assert contents(tmp_path / "ds") == reference


def test_more_rows_than_the_corpus_has_build_all_of_it(write_job: Write, tmp_path: Path) -> None:
    listener = Recorder()
    ingest(read_job(write_job(max_rows=10**6)), engine="local", listener=listener)
    ds = actlake.open(tmp_path / "ds")
    assert ds.complete
    assert any(f"the corpus has {ds.n_rows:,} rows, max_rows asks for 1,000,000" in note for note in listener.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_shard": 256}, r"rows_per_shard: here 128, there 256"),
        ({"hook_points": '["layers.1.attn_z"]'}, r"hook_points\.layers\.0\.resid_post: here '32 wide"),
        ({"holdout": 0.3}, r"holdout: 0\.2 there, 0\.3 asked"),
    ],
)
def test_another_spec_at_the_url_is_refused_field_by_field(
    write_job: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    ingest(read_job(write_job(max_rows=100)), engine="local")
    before = contents(tmp_path)
    with pytest.raises(SpecMismatchError, match=message):
        ingest(read_job(write_job(max_rows=100, **changes)), engine="local")
    del before["job.toml"]
    after = contents(tmp_path)
    del after["job.toml"]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hook_points": '["layers.3.resid_post"]'},
            UnknownNameError,
            r"layer 3 is out of range; the layers are 0\.\.2",
        ),
        ({"hook_points": '["layers.1.resid_pots"]'}, UnknownNameError, r"did you mean 'layers\.1\.resid_post'"),
        ({"rows_per_shard": 100}, BadInputError, r"rows_per_chunk = 32 .* does not divide rows_per_shard = 100"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_made(
    write_job: Write, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ingest(read_job(write_job(**changes)), engine="local")
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


def test_a_context_longer_than_the_model_is_refused(write_job: Write, tmp_path: Path) -> None:
    path = write_job()
    path.write_text(path.read_text().replace("context_length = 32", "context_length = 512"))
    for check in (plan_job, partial(ingest, engine="local")):
        with pytest.raises(JobFileError, match=r"context_length = 512 is longer than .*'s 256"):
            check(read_job(path))


def test_a_shard_that_fails_is_named_after_all_others_are_done(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]
) -> None:
    build, tried = ShardBuilder.build, list[int]()

    def failing(self: ShardBuilder, shard: int, *rest: Any) -> Any:
        if shard == 2:
            tried.append(shard)
            raise OSError("planted: no space left")
        return build(self, shard, *rest)

    monkeypatch.setattr(ShardBuilder, "build", failing)
    with pytest.raises(ShardFailedError, match=r"1 of 8 shards.*\n.*train shard 2, rows 256\.\.383: OSError: planted"):
        ingest(read_job(write_job()), engine="local")
    assert len(tried) == 2  # run.attempts
    ds = actlake.open(tmp_path / "ds")
    assert ds.missing_shards == [2]
    assert not ds.complete
    monkeypatch.setattr(ShardBuilder, "build", build)
    assert ingest(read_job(write_job()), engine="local").n_built == 1
    assert contents(tmp_path / "ds") == reference


def test_shards_that_failed_are_named_even_where_the_summaries_cannot_be_written(
    write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise StoreError("planted: no space for root.json")

    build = ShardBuilder.build

    def failing(self: ShardBuilder, shard: int, *rest: Any) -> Any:
        if shard == 2:
            raise OSError("planted: no space left")
        return build(self, shard, *rest)

    monkeypatch.setattr(ingestion, "finish", full)
    monkeypatch.setattr(ShardBuilder, "build", failing)
    with pytest.raises(
        ShardFailedError, match=r"(?s)train shard 2, rows 256\.\.383.*not written either: planted: no space"
    ):
        ingest(read_job(write_job()), engine="local")
    monkeypatch.setattr(ShardBuilder, "build", build)
    with pytest.raises(StoreError, match=r"^planted: no space for root\.json$"):
        ingest(read_job(write_job()), engine="local")


def test_a_shard_whose_workers_fail_after_its_commit_is_built(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]
) -> None:
    build, tried = ShardBuilder.build, list[int]()

    def failing(self: ShardBuilder, shard: int, *rest: Any) -> Any:
        if shard != 2:
            return build(self, shard, *rest)
        tried.append(shard)
        if len(tried) == 1:
            build(self, shard, *rest)
        raise OSError("planted: lost on the way to the driver")

    monkeypatch.setattr(ShardBuilder, "build", failing)
    listener = Recorder()
    assert ingest(read_job(write_job()), engine="local", listener=listener).n_built == 8
    assert len(tried) == 2  # run.attempts
    assert not [event for event in listener.events if isinstance(event, ShardAbandoned)]
    assert contents(tmp_path / "ds") == reference


@pytest.mark.parametrize(
    "moment",
    ["corpora", "ds/spec.json", "ds/arrays/layers.1.attn_z/c/0/0", "ds/" + commit_key(0), "ds/" + commit_key(3)],
)
def test_after_sigkill_the_next_run_builds_just_what_is_missing(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], moment: str
) -> None:
    job = write_job()
    assert run_until(job, "local", (tmp_path / moment).exists) == -signal.SIGKILL
    # Shards overlap: the first one in order need not be the first one committed.
    committed = {int(path.stem) for path in (tmp_path / "ds").glob("commits/*/*.json")}
    attempts = {shard: read_record(Store(tmp_path / "ds"), shard).provenance.attempt for shard in committed}
    listener = Recorder()
    report = ingest(read_job(job), engine="local", listener=listener)
    built = [e.task.shard for e in listener.events if isinstance(e, ShardCommitted) and e.task.split == "train"]
    assert sorted(built) == sorted(set(range(6)) - committed)
    assert report.n_built == 8 - len(committed)
    assert contents(tmp_path / "ds") == reference
    for shard, attempt in attempts.items():
        assert read_record(Store(tmp_path / "ds"), shard).provenance.attempt == attempt


def test_totals_of_a_smaller_plan_do_not_hide_later_commits(write_job: Write, tmp_path: Path) -> None:
    ingest(read_job(write_job(max_rows=300)), engine="local")
    stale = (tmp_path / "ds/root.json").read_bytes()
    ingest(read_job(write_job(max_rows=700)), engine="local")
    # As if a driver with the smaller plan had ended last.
    (tmp_path / "ds/root.json").write_bytes(stale)
    assert actlake.open(tmp_path / "ds").n_rows == 700
    assert ingest(read_job(write_job(max_rows=700)), engine="local").n_built == 0


def test_workers_refuse_other_weights_than_were_planned(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ingestion._work_order
    monkeypatch.setattr(ingestion, "_work_order", lambda *a: replace(order(*a), fingerprint="0" * 64))
    with pytest.raises(ModelAccessError, match=r"has weights .* the job was planned with 000000000000"):
        ingest(read_job(write_job()), engine="local")
    assert not (tmp_path / "ds/commits").exists()


def test_a_corpus_that_was_removed_is_built_again(write_job: Write, tmp_path: Path, reference: dict[str, Any]) -> None:
    ingest(read_job(write_job(max_rows=300)), engine="local")
    shutil.rmtree(tmp_path / "corpora")
    ingest(read_job(write_job()), engine="local")
    assert contents(tmp_path / "ds") == reference


def test_a_lost_commit_is_a_missing_shard_even_where_the_totals_count_it(write_job: Write, tmp_path: Path) -> None:
    ingest(read_job(write_job()), engine="local")
    (tmp_path / "ds" / commit_key(2)).unlink()
    assert actlake.open(tmp_path / "ds").missing_shards == [2]
    assert ingest(read_job(write_job()), engine="local").n_built == 1


def test_a_run_on_another_file_system_leaves_the_same_objects(
    write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    ingest(read_job(write_job(dataset='"memory://lake/run/ds"')), engine="local")
    memory, found = Store("memory://lake/run/ds"), {}
    for key in reference:
        if "commits/" not in key:
            found[key] = hashlib.sha256(memory.read(key)).hexdigest()
    assert found == {key: value for key, value in reference.items() if "commits/" not in key}
    assert actlake.open("memory://lake/run/ds").heldout.complete


@pytest.mark.parametrize("dataset", ["gs://bucket", "s3://bucket/"])
def test_a_whole_bucket_is_no_place_for_a_dataset(write_job: Write, dataset: str) -> None:
    with pytest.raises(JobFileError, match="is a whole bucket; name a folder in it"):
        ingest(read_job(write_job(dataset=f'"{dataset}"')), engine="local")


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_made(write_job: Write, tmp_path: Path) -> None:
    path = write_job()
    path.write_text(path.read_text() + 'device = "cuda"\n')
    with pytest.raises(JobFileError, match=r"run\.device = 'cuda', but torch finds no GPU here"):
        ingest(read_job(path), engine="local")
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


def test_an_address_that_the_engine_has_no_use_for_is_refused(write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"--address head:6379 is a Ray cluster's, .* give --engine ray, or leave"):
        ingest(read_job(write_job()), engine="local", address="head:6379")
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


def test_the_gpus_of_a_cluster_are_not_left_idle_unless_the_job_says_so(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def make_ready(*_: Any, **__: Any) -> None:
        raise Begun

    gpus = [0.0, 8.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray_cluster, "cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray_cluster, "nodes", lambda: [{"Resources": {"CPU": 8.0, "GPU": n}} for n in gpus])
    monkeypatch.setattr(ingestion, "make_ready", make_ready)
    monkeypatch.setattr(ingestion, "_metered", lambda job, engine, hear, stack: hear)
    path = write_job()
    with pytest.raises(
        JobFileError, match=r"that has no GPU, while the cluster has 8: say 'cuda', with run\.workers, or"
    ):
        ingest(read_job(path), engine="ray", address="head:6379")
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]
    path.write_text(path.read_text() + 'device = "cpu"\n')
    with pytest.raises(Begun):
        ingest(read_job(path), engine="ray", address="head:6379")
    gpus[1] = 0.0
    with pytest.raises(Begun):
        ingest(read_job(write_job()), engine="ray", address="head:6379")


def test_progress_counts_every_row(write_job: Write) -> None:
    listener = Recorder()
    ingest(read_job(write_job()), engine="local", listener=listener)
    assert sum(event.n_rows for event in listener.events if isinstance(event, RowsCaptured)) == 875
