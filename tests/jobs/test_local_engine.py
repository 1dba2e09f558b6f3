"""The local engine with several workers: real processes, which fail, die, and end with the one that started them."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import held, plant, plant_worker, tries
from runs import Recorder, alive, contents, wait_for

from actlake.jobs.engines import local, local_worker
from actlake.jobs.engines.events import (
    Event,
    RowsCaptured,
    ShardAbandoned,
    ShardCommitted,
    ShardRetried,
    ShardStarted,
    WorkersReady,
)
from actlake.jobs.engines.local_processes import gpu_groups
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.jobs.work import Task, WorkOrder
from actlake.storage.errors import ActlakeError, JobFileError, ModelAccessError

TASKS = [Task(split="train", shard=shard, n_rows=100) for shard in range(6)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder whose code the worker processes of this test run first."""
    monkeypatch.syspath_prepend(tmp_path / "planted")
    return tmp_path / "planted"


def order(**changes: Any) -> WorkOrder:
    """Return an order of a job that nobody can do."""
    values: dict[str, Any] = {"model": "m", "revision": None, "fingerprint": "f", "dtype": "bfloat16", "device": "cpu"}
    places: dict[str, Any] = {"dataset": "d", "corpus": "c", "points": (), "n_threads": 1}
    return WorkOrder(**values | places | changes)


def run(attempts: int = 2, **changes: Any) -> list[Event]:
    return list(local.run(order(**changes), TASKS, attempts=attempts, workers=2))


def shards(events: list[Event], kind: type[Any]) -> list[int]:
    return sorted(event.task.shard for event in events if isinstance(event, kind))


def test_several_workers_build_what_one_does(
    write_job: Callable[..., Path], tmp_path: Path, reference: dict[str, Any], folder: Path
) -> None:
    job, listener = write_job(), Recorder()
    job.write_text(job.read_text() + "workers = 2\n")
    plant(
        folder,
        "def planted(shard, n_before, build):\n"
        "    if shard == 1 and n_before == 0:\n"
        "        die()\n"
        "    return build()\n",
    )
    report = ingest(read_job(job), engine="local", listener=listener)
    assert report.n_built == report.n_committed == 8
    assert contents(tmp_path / "ds") == reference
    committed = [(e.task.split, e.task.shard) for e in listener.events if isinstance(e, ShardCommitted)]
    assert sorted(committed) == [("heldout", 0), ("heldout", 1), *(("train", shard) for shard in range(6))]
    assert os.getpid() not in {pid for shard in range(6) for pid in tries(folder, shard)}


def test_every_shard_is_started_and_committed_once_and_its_rows_are_counted(folder: Path) -> None:
    plant_worker(folder)
    events = run()
    assert shards(events, ShardStarted) == shards(events, ShardCommitted) == list(range(6))
    captured = [event for event in events if isinstance(event, RowsCaptured)]
    assert (sum(event.n_rows for event in captured), sum(event.forward_s for event in captured)) == (600, 3.0)
    ready = [event for event in events if isinstance(event, WorkersReady)]
    assert ready == [WorkersReady(n_ready=1, n_wanted=2), WorkersReady(n_ready=2, n_wanted=2)]


def test_a_shard_that_fails_is_tried_by_another_worker_then_given_up(folder: Path) -> None:
    plant_worker(
        folder,
        "def planted(shard, n_before, build):\n"
        "    if shard == 4 or shard == 3 and n_before == 0:\n"
        "        raise OSError(f'planted: a bad disk, {n_before} tries before')\n",
    )
    events = run()
    assert shards(events, ShardCommitted) == [0, 1, 2, 3, 5]
    assert shards(events, ShardRetried) == [3, 4]
    (given_up,) = [event for event in events if isinstance(event, ShardAbandoned)]
    assert (given_up.task, str(given_up.error)) == (TASKS[4], "planted: a bad disk, 0 tries before")
    for shard in (3, 4):
        first, second = tries(folder, shard)
        assert first != second


def test_a_worker_that_dies_is_replaced_and_its_shards_are_built(folder: Path) -> None:
    plant_worker(
        folder, "def planted(shard, n_before, build):\n    return die() if shard == 1 and n_before == 0 else build()\n"
    )
    events = run(attempts=1)
    assert shards(events, ShardCommitted) == list(range(6))
    errors = {event.task.shard: str(event.error) for event in events if isinstance(event, ShardRetried)}
    assert "the worker's process ended with signal 9" in errors[1]
    assert "lower run.workers or layout.rows_per_shard" in errors[1]
    assert [event for event in events if isinstance(event, WorkersReady)][-1] == WorkersReady(n_ready=2, n_wanted=2)


def test_a_shard_that_kills_its_workers_is_given_up_and_takes_no_other_with_it(folder: Path) -> None:
    plant_worker(folder, "def planted(shard, n_before, build):\n    return die() if shard == 2 else build()\n")
    events = run(attempts=1)
    assert shards(events, ShardCommitted) == [0, 1, 3, 4, 5]
    assert shards(events, ShardAbandoned) == [2]
    assert len(tries(folder, 2)) == len(set(tries(folder, 2))) == local.DEATHS
    # Whoever was built beside it when it first killed was tried again, beside nothing.
    assert max(Counter(shards(events, ShardStarted)).values()) == local.DEATHS
    assert all(len(tries(folder, shard)) <= 2 for shard in (0, 1, 3, 4, 5))


def test_workers_that_cannot_start_raise_what_they_met(folder: Path) -> None:
    plant_worker(
        folder,
        "def start():\n"
        "    from actlake.storage.errors import ModelAccessError\n"
        "    raise ModelAccessError('planted: other weights')\n",
    )
    with pytest.raises(ModelAccessError, match="planted: other weights"):
        run()


def test_what_a_worker_meets_that_is_not_ours_is_raised_as_an_error_of_ours(folder: Path) -> None:
    plant_worker(folder, "def start():\n    raise RuntimeError('CUDA out of memory')\n")
    with pytest.raises(ActlakeError, match=r"^a worker cannot start: RuntimeError: CUDA out of memory$") as raised:
        run()
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_that_cannot_be_sent_comes_as_its_text(folder: Path) -> None:
    plant_worker(
        folder,
        "class Odd(Exception):\n"
        "    def __init__(self, one, other):\n"
        "        super().__init__(f'{one} and {other}')\n"
        "def planted(shard, n_before, build):\n"
        "    raise Odd('this', 'that')\n",
    )
    errors = {str(event.error) for event in run(attempts=1) if isinstance(event, ShardAbandoned)}
    assert errors == {"Odd: this and that"}


def test_workers_that_die_before_they_have_their_model_are_an_error(folder: Path) -> None:
    plant_worker(folder, "start = die\n")
    with pytest.raises(ActlakeError, match="process ended with signal 9; where that was for want of memory"):
        run()


def test_a_run_that_is_closed_ends_its_workers(folder: Path) -> None:
    plant_worker(folder, "def planted(shard, n_before, build):\n    hold()\n")
    events = local.run(order(), TASKS, attempts=1, workers=2)
    while not isinstance(next(events), ShardStarted):
        pass
    workers = wait_for(lambda: held(folder), bool)
    events.close()
    assert not any(alive(pid) for pid in workers)


#: Waits for an event that never comes.
_WAITING = """
import sys
from actlake.jobs.engines import local
from actlake.jobs.work import Task, WorkOrder

sys.path.insert(0, sys.argv[1])
order = WorkOrder(model="m", revision=None, fingerprint="f", dtype="bfloat16", device="cpu", n_threads=1, dataset="d",
                  corpus="c", points=())
tasks = [Task(split="train", shard=shard, n_rows=1) for shard in range(4)]
for event in local.run(order, tasks, attempts=1, workers=2):
    pass
"""


def test_no_worker_outlives_a_killed_run(folder: Path) -> None:
    plant_worker(folder, "def planted(shard, n_before, build):\n    hold()\n")
    with subprocess.Popen([sys.executable, "-c", _WAITING, str(folder)]) as process:
        workers = wait_for(lambda: held(folder), lambda found: len(found) == 2)
        process.kill()
    wait_for(lambda: [pid for pid in workers if alive(pid)], lambda left: not left)


# --- GPUs ---------------------------------------------------------------------------------------------------------


class Quick:
    """A worker in this process, whose threads take a while to end, as those that used torch may."""

    n_concurrent = 2
    gate = threading.Event()
    kept = threading.local()

    def __init__(self, order: WorkOrder) -> None: ...

    def build(self, task: Task, on_rows: Callable[[int, float], None]) -> None:
        class Slow:
            def __del__(self) -> None:
                time.sleep(0.2)

        self.kept.slow = Slow()
        self.gate.wait(60)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("actlake-start", "actlake-worker")]


def test_threads_of_a_run_end_with_it_unless_they_are_in_the_middle_of_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_worker, "Worker", Quick)
    Quick.gate.set()
    events = list(local.run(order(), TASKS, attempts=1))
    assert shards(events, ShardCommitted) == list(range(6))
    assert threads() == []

    Quick.gate.clear()
    broken_off = local.run(order(), TASKS, attempts=1)
    while not isinstance(next(broken_off), ShardStarted):
        pass
    broken_off.close()
    assert threads()
    Quick.gate.set()
    wait_for(threads, lambda left: not left)


def test_gpus_are_dealt_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_groups("cuda", 1) == ["0", "1", "2", "3", "4"]
    assert gpu_groups("cuda", 2) == ["0,1", "2,3"]
    assert gpu_groups("cuda:3", 1) == gpu_groups("cpu", 1) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, GPU-bb,7,1,0")
    assert gpu_groups("cuda", 2) == ["GPU-aa,GPU-bb", "7,1"]
    with pytest.raises(JobFileError, match=r"run\.gpus_per_worker = 8, but this process sees 5 GPUs"):
        gpu_groups("cuda", 8)


@pytest.mark.parametrize(
    ("device", "n_gpus", "wanted", "n_workers"),
    [("cuda", 1, 8, 5), ("cuda", 2, 8, 2), ("cuda", 1, 3, 3), ("cuda:1", 1, 5, 1), ("cpu", 1, 3, 3)],
)
def test_there_is_one_worker_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, n_gpus: int, wanted: int, n_workers: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert local.n_workers_here(order(device=device, n_gpus=n_gpus), wanted) == n_workers


def test_each_worker_sees_its_own_gpus_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plant_worker(folder, "def start():\n    (FOLDER / f'gpus-{os.environ[\"CUDA_VISIBLE_DEVICES\"]}').touch()\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7,4,5")
    assert shards(run(device="cuda", n_gpus=2), ShardCommitted) == list(range(6))
    assert {path.name for path in folder.glob("gpus-*")} == {"gpus-6,7", "gpus-4,5"}
