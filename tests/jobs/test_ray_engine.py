"""The Ray engine makes what the local one makes, and goes on where a worker or the whole driver died."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Recorder, contents, run_until

import actlake
from actlake.jobs.engines import ray_engine
from actlake.jobs.engines.events import RowsCaptured, ShardCommitted
from actlake.jobs.engines.ray_worker import RayWorker
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.storage.errors import BadInputError, ModelAccessError, ShardFailedError
from actlake.storage.records import commit_key

Write = Callable[..., Path]


@pytest.mark.usefixtures("ray_cluster")
def test_ray_makes_the_same_dataset_and_reports_rows(
    write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    listener = Recorder()
    report = ingest(read_job(write_job()), engine="ray", listener=listener)
    assert contents(tmp_path / "ds") == reference
    assert report.n_built == 8
    assert sum(isinstance(event, ShardCommitted) for event in listener.events) == 8
    # What was captured between the last look and the end of a shard is not reported apart.
    assert sum(event.n_rows for event in listener.events if isinstance(event, RowsCaptured)) <= 875


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_is_replaced(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "died"

    class DyingWorker(RayWorker):
        def build(self, task: Any) -> Any:
            import os

            if task.shard == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().build(task)

    monkeypatch.setattr(ray_engine, "RayWorker", DyingWorker)
    assert ingest(read_job(write_job()), engine="ray").n_built == 8
    assert marker.exists()
    assert contents(tmp_path / "ds") == reference


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_always_fails_is_named_and_the_others_are_built(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingWorker(RayWorker):
        def build(self, task: Any) -> Any:
            if task.shard == 1 and task.split == "train":
                raise OSError("planted: no space left")
            return super().build(task)

    monkeypatch.setattr(ray_engine, "RayWorker", FailingWorker)
    with pytest.raises(ShardFailedError, match=r"train shard 1, rows 128\.\.255: OSError: planted"):
        ingest(read_job(write_job()), engine="ray")
    assert actlake.open(tmp_path / "ds").missing_shards == [1]


def test_a_cluster_that_does_not_answer_is_named_before_anything_is_made(write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 "):
        ingest(read_job(write_job()), engine="ray", address="127.0.0.1:9")
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.slow
def test_the_whole_run_is_killed_and_resumed(write_job: Write, tmp_path: Path, reference: dict[str, Any]) -> None:
    """SIGKILL of the driver takes its Ray with it; the next run, with a Ray of its own, finishes the dataset."""
    job = write_job()
    assert run_until(job, "ray", (tmp_path / "ds" / commit_key(1)).exists) == -signal.SIGKILL
    ingest(read_job(job), engine="local")
    assert contents(tmp_path / "ds") == reference


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_cannot_start_ends_the_run_with_its_own_error(
    write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(RayWorker):
        def start(self) -> int:
            raise ModelAccessError("planted: other weights here")

    monkeypatch.setattr(ray_engine, "RayWorker", Unable)
    with pytest.raises(ModelAccessError, match="planted: other weights"):
        ingest(read_job(write_job()), engine="ray")


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_without_room_is_refused_with_the_numbers(write_job: Write) -> None:
    path = write_job()
    path.write_text(path.read_text().replace("threads = 1", "threads = 64"))
    with pytest.raises(BadInputError, match=r"wants 64 CPUs and 0 GPUs; the largest of 1 Ray nodes has 2 and 0"):
        ingest(read_job(path), engine="ray")
