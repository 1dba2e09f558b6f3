"""Workers that come, go, fail and die: the engine with actors that load no model, on the Ray of this test session."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actlake.jobs.engines import ray_cluster, ray_engine, ray_pool
from actlake.jobs.engines.events import (
    Event,
    RowsCaptured,
    ShardAbandoned,
    ShardCommitted,
    ShardRetried,
    ShardStarted,
    WorkersReady,
)
from actlake.jobs.engines.ray_pool import PoolOptions
from actlake.jobs.engines.ray_worker import Place, RayWorker
from actlake.jobs.work import Task, WorkOrder
from actlake.storage.errors import (
    ActlakeError,
    BadInputError,
    MissingExtraError,
    ModelAccessError,
    WorkerLostError,
)
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord

pytestmark = pytest.mark.usefixtures("ray_cluster")

#: Of a session whose Ray has two.
N_CPUS = 2


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def record_of(task: Task) -> ShardRecord:
    return ShardRecord(
        dataset_id="d",
        shard=task.shard,
        revision=0,
        first_row=0,
        n_rows=task.n_rows,
        n_void=0,
        objects={},
        stats=ObjectRecord(nbytes=1, crc32c=1),
        provenance=Provenance(attempt=str(os.getpid())),
    )


class NullWorker(RayWorker):
    """Builds nothing; ``dataset`` is a folder in which actors leave marks."""

    def start(self) -> int:
        return 2

    def build(self, task: Task) -> ShardRecord:
        self._count(task.n_rows, 0.5)
        return record_of(task)

    def mark(self, name: str) -> bool:
        """Leave a mark; say whether this is the first of that name."""
        try:
            Path(self._order.dataset, name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def tasks(n: int) -> list[Task]:
    return [Task(split="train", shard=shard, n_rows=8) for shard in range(n)]


def run(worker: type[RayWorker], marks: Path, n_tasks: int, notes: list[str] | None = None, **options: Any) -> Any:
    order = WorkOrder(
        dataset=str(marks), corpus="", model="", revision=None, fingerprint="", points=(), dtype="bfloat16",
        device="cpu", n_threads=1,
    )  # fmt: skip
    heard = [] if notes is None else notes
    return ray_engine.run(
        order, tasks(n_tasks), options=PoolOptions(**options), address=None, note=heard.append, worker=worker
    )


def committed(events: list[Event]) -> list[int]:
    return sorted(event.task.shard for event in events if isinstance(event, ShardCommitted))


def those(events: list[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def held_cpu() -> Iterator[Any]:
    """Take one CPU of the cluster; what is given can be killed to let it go."""

    @ray.remote(num_cpus=1)
    class Holder:
        def here(self) -> bool:
            return True

    holder: Any = Holder.remote()  # type: ignore[attr-defined]
    assert ray.get(holder.here.remote(), timeout=100)
    yield holder
    ray.kill(holder)


def test_every_shard_is_built_once_and_every_row_reported(tmp_path: Path) -> None:
    events = list(run(NullWorker, tmp_path, 300, most=2))
    assert committed(events) == list(range(300))
    assert sorted(event.task.shard for event in those(events, ShardStarted)) == list(range(300))
    assert sum(event.n_rows for event in those(events, RowsCaptured)) <= 2400
    assert those(events, WorkersReady)[0] == WorkersReady(n_ready=0, n_wanted=2)
    assert those(events, WorkersReady)[-1].n_ready >= 1


class Waiting(NullWorker):
    """Builds no shard before the folder has the mark ``go``."""

    def build(self, task: Task) -> ShardRecord:
        until(Path(self._order.dataset, "go").exists)
        return super().build(task)


def test_a_run_begins_with_the_first_worker_and_others_join_when_there_is_room(tmp_path: Path, held_cpu: Any) -> None:
    """Nothing is built before the second worker is ready, for which there is room only once a shard was handed out."""
    events = []
    with closing(run(Waiting, tmp_path, 20, most=4)) as running:
        for event in running:
            events.append(event)
            if isinstance(event, ShardStarted) and len(those(events, ShardStarted)) == 1:
                ray.kill(held_cpu)
            if isinstance(event, WorkersReady) and event.n_ready == 2:
                (tmp_path / "go").touch()
    assert committed(events) == list(range(20))
    assert len({event.record.provenance.attempt for event in those(events, ShardCommitted)}) == 2
    assert all(event.n_wanted == 4 for event in those(events, WorkersReady))


def test_rows_and_seconds_are_reported_while_shards_are_built(tmp_path: Path) -> None:
    class Counting(Waiting):
        def build(self, task: Task) -> ShardRecord:
            self._count(5, 0.25)
            return super().build(task)

    events = []
    for event in run(Counting, tmp_path, 2, most=1):
        events.append(event)
        if sum(found.n_rows for found in those(events, RowsCaptured)) == 10:
            (tmp_path / "go").touch()
    captured = those(events, RowsCaptured)
    assert captured[-1].n_rows <= 10
    assert sum(event.forward_s for event in captured if event.n_rows) >= 0.5


def test_two_shards_are_in_hand_of_each_worker(tmp_path: Path) -> None:
    events = []
    for event in run(Waiting, tmp_path, 8, most=1):
        events.append(event)
        if isinstance(event, ShardStarted):
            started = [found.task.shard for found in those(events, ShardStarted)]
            if started == [0, 1]:
                assert not those(events, ShardCommitted)
                (tmp_path / "go").touch()
    assert committed(events) == list(range(8))


def test_closing_a_run_ends_its_workers(tmp_path: Path) -> None:
    running = run(Waiting, tmp_path, 8, most=3)
    next(event for event in running if isinstance(event, ShardStarted))
    running.close()

    @ray.remote(num_cpus=N_CPUS)
    def room() -> bool:
        return True

    # Room for it is only where no worker is left, and none that was pending takes it.
    assert ray.get(room.remote(), timeout=100)


def test_a_worker_that_dies_costs_no_attempt(tmp_path: Path) -> None:
    class Dying(NullWorker):
        def build(self, task: Task) -> ShardRecord:
            if task.shard == 3 and self.mark("died"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().build(task)

    events = list(run(Dying, tmp_path, 12, most=2, attempts=1))
    assert committed(events) == list(range(12))
    retried = those(events, ShardRetried)
    assert 3 in [event.task.shard for event in retried]
    assert all(isinstance(event.error, WorkerLostError) for event in retried)
    assert "its worker's process on" in str(retried[0].error)


def test_a_shard_that_kills_every_worker_is_given_up_and_takes_no_other_with_it(tmp_path: Path) -> None:
    class Killing(NullWorker):
        def build(self, task: Task) -> ShardRecord:
            if task.shard == 2:
                assert any(self.mark(f"death {number}") for number in range(10))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().build(task)

    events = list(run(Killing, tmp_path, 9, most=2, attempts=1))
    assert committed(events) == [0, 1, 3, 4, 5, 6, 7, 8]
    (abandoned,) = those(events, ShardAbandoned)
    assert abandoned.task.shard == 2
    assert "(3 times in all)" in str(abandoned.error)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_shard_is_tried_on_another_worker(tmp_path: Path) -> None:
    """Each worker waits, in its first build, for the other one, so that there are two."""

    class Failing(NullWorker):
        def build(self, task: Task) -> ShardRecord:
            self.mark(f"here {os.getpid()}")
            until(lambda: len(list(Path(self._order.dataset).glob("here*"))) == 2)
            if task.shard == 1 and self.mark("failed"):
                Path(self._order.dataset, "failed").write_text(str(os.getpid()))
                raise OSError("planted")
            return super().build(task)

    events = list(run(Failing, tmp_path, 9, most=2, least=2, attempts=2))
    assert committed(events) == list(range(9))
    (retried,) = those(events, ShardRetried)
    assert (retried.task.shard, str(retried.error), type(retried.error)) == (1, "planted", OSError)
    (again,) = [event for event in those(events, ShardCommitted) if event.task.shard == 1]
    assert again.record.provenance.attempt != (tmp_path / "failed").read_text()


def test_a_worker_that_cannot_start_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    class Unable(NullWorker):
        def start(self) -> int:
            if self.mark("unable"):
                raise ModelAccessError("planted: other weights here")
            return super().start()

    notes: list[str] = []
    events = list(run(Unable, tmp_path, 6, notes, most=2))
    assert committed(events) == list(range(6))
    assert len(notes) == 1
    assert "cannot start, the run goes on without it: ModelAccessError: planted: other weights here" in notes[0]


class Noted(list[str]):
    """Notes, the first of which leaves the mark ``noted``."""

    def __init__(self, marks: Path) -> None:
        super().__init__()
        self._mark = marks / "noted"

    def append(self, text: str) -> None:
        super().append(text)
        self._mark.touch()


class SecondBest(NullWorker):
    """The first to start cannot, once another one has built a shard, whose next one waits until that was noted."""

    def start(self) -> int:
        if self.mark("unable"):
            until(Path(self._order.dataset, "built").exists)
            raise ModelAccessError("planted")
        return super().start()

    def build(self, task: Task) -> ShardRecord:
        if task.shard == 3:
            until(Path(self._order.dataset, "noted").exists)
        self.mark("built")
        return super().build(task)


def test_a_worker_that_dies_is_replaced_though_another_one_could_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(SecondBest):
        def build(self, task: Task) -> ShardRecord:
            record = super().build(task)
            if task.shard == 3 and self.mark("died"):
                os.kill(os.getpid(), signal.SIGKILL)
            return record

    monkeypatch.setattr(ray_pool, "_GRACE_S", 0.0)
    notes = Noted(tmp_path)
    events = list(run(Dying, tmp_path, 6, notes, most=2))
    assert committed(events) == list(range(6))
    assert len(notes) == 1
    assert 3 in [event.task.shard for event in those(events, ShardRetried)]


def test_workers_that_cannot_start_are_none_of_those_to_begin_with(tmp_path: Path) -> None:
    class Unable(NullWorker):
        def start(self) -> int:
            if self.mark("unable"):
                raise ModelAccessError("planted")
            return super().start()

    events = list(run(Unable, tmp_path, 4, least=2, most=2, start_timeout=60.0))
    assert committed(events) == [0, 1, 2, 3]


def test_a_late_worker_of_another_actlake_is_named(tmp_path: Path) -> None:
    class Old(SecondBest):
        def place(self) -> Place:
            place = super().place()
            if not self.mark("unable"):
                return place
            until(Path(self._order.dataset, "built").exists)
            return replace(place, host="node-7", version="0.0.1")

    notes = Noted(tmp_path)
    assert committed(list(run(Old, tmp_path, 6, notes, most=2))) == list(range(6))
    assert len(notes) == 1
    assert "a worker on node-7 cannot start, the run goes on without it: BadInputError: node-7 has actlake" in notes[0]


def test_a_worker_that_could_not_start_is_replaced_with_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 3 waits until a third worker is ready."""

    class Mended(SecondBest):
        is_broken = False

        def place(self) -> Place:
            place = super().place()
            self.is_broken = self.mark("broken")
            return replace(place, node="broken") if self.is_broken else place

        def start(self) -> int:
            if self.is_broken:
                return super().start()
            self.mark(f"ready {os.getpid()}")
            return NullWorker.start(self)

        def build(self, task: Task) -> ShardRecord:
            if task.shard == 3:
                until(lambda: len(list(Path(self._order.dataset).glob("ready*"))) == 2)
            return super().build(task)

    def with_broken() -> list[dict[str, Any]]:
        there = [] if notes else [{"NodeID": "broken"}]
        return ray_cluster.nodes() + there

    notes = Noted(tmp_path)
    monkeypatch.setattr(ray_pool, "nodes", with_broken)
    monkeypatch.setattr(ray_pool, "_NODES_S", 0.0)
    events = list(run(Mended, tmp_path, 6, notes, most=2))
    assert committed(events) == list(range(6))
    assert len(notes) == 1
    assert those(events, WorkersReady)[-1] == WorkersReady(n_ready=2, n_wanted=2)


def test_workers_that_could_not_be_made_are_made_again_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only worker dies; where Ray puts the next two, none can be made."""

    class Unmade(NullWorker):
        def __init__(self, order: WorkOrder) -> None:
            super().__init__(order)
            if Path(order.dataset, "died").exists() and any(self.mark(f"unmade {number}") for number in range(2)):
                raise OSError("planted")

        def build(self, task: Task) -> ShardRecord:
            if task.shard == 3 and self.mark("died"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().build(task)

    wait = ray.wait

    def wait_for_some(refs: list[Any], **options: Any) -> Any:
        assert refs
        return wait(refs, **options)

    monkeypatch.setattr(ray_pool, "_AGAIN_S", 0.5)
    monkeypatch.setattr(ray, "wait", wait_for_some)
    notes: list[str] = []
    events = list(run(Unmade, tmp_path, 6, notes, most=1))
    assert committed(events) == list(range(6))
    assert len(notes) == 1
    assert notes[0].endswith("planted")
    assert (tmp_path / "unmade 1").exists()


@pytest.mark.parametrize(
    ("planted", "raised", "message"),
    [
        (ModelAccessError("planted"), ModelAccessError, "^planted$"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), MissingExtraError, "lacks torch: every node"),
        (RuntimeError("CUDA, no room"), ActlakeError, "^a worker cannot start: RuntimeError: CUDA, no room$"),
    ],
)
def test_where_no_worker_can_start_the_first_error_is_raised(
    planted: Exception, raised: type[Exception], message: str, tmp_path: Path
) -> None:
    class Unable(NullWorker):
        def start(self) -> int:
            raise planted

    with pytest.raises(raised, match=message):
        list(run(Unable, tmp_path, 6, most=1))


def test_a_worker_of_another_actlake_is_refused(tmp_path: Path) -> None:
    class Old(NullWorker):
        def place(self) -> Place:
            return Place(node=super().place().node, host="node-7", version="0.0.1")

    with pytest.raises(BadInputError, match=r"node-7 has actlake 0\.0\.1, the driver .*'actlake submit' ship it"):
        list(run(Old, tmp_path, 6, most=1))


def test_a_worker_whose_process_dies_as_it_loads_the_model_is_given_up(tmp_path: Path) -> None:
    class Stillborn(NullWorker):
        def start(self) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 2

    with pytest.raises(ActlakeError, match=r"the worker's process on \S+ died"):
        list(run(Stillborn, tmp_path, 6, most=1))


def test_a_silent_node_that_the_cluster_gives_up_loses_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer ever comes for the first calls: as of a host that a partition has cut off."""

    class Silent(NullWorker):
        def build(self, task: Task) -> ShardRecord:
            if self.mark("silent"):
                until(lambda: False)
            return super().build(task)

    alive, calls = ray_cluster.nodes, [0]

    def nodes() -> list[dict[str, Any]]:
        calls[0] += 1
        return [] if (tmp_path / "silent").exists() and calls[0] == 1 else alive()

    def counted() -> list[dict[str, Any]]:
        if not (tmp_path / "silent").exists():
            return alive()
        return nodes()

    monkeypatch.setattr(ray_pool, "nodes", counted)
    monkeypatch.setattr(ray_pool, "_NODES_S", 0.0)
    events = list(run(Silent, tmp_path, 4, most=1, attempts=1))
    assert committed(events) == [0, 1, 2, 3]
    retried = those(events, ShardRetried)
    assert retried
    assert all("the node of its worker" in str(event.error) for event in retried)


def test_a_run_says_what_it_waits_for_and_not_for_ever(
    tmp_path: Path, held_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_QUIET_S", 1.0)
    notes: list[str] = []
    with pytest.raises(ActlakeError, match=r"no worker came for 3 s.*run\.start_timeout"):
        list(run(NullWorker, tmp_path, 4, notes, most=2, least=2, start_timeout=3.0))
    (note,) = notes
    assert re.fullmatch(
        r"[01] of 2 workers are there: a worker wants 1 CPUs and 0 GPUs; .*; waiting for room, up to 3 s "
        r"\(run\.start_timeout\)",
        note,
    )


def test_a_worker_may_want_resources_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(
        BadInputError, match="wants 1 CPUs and 0 GPUs, 1 spot; the largest of 1 Ray nodes has 2 and 0, 0"
    ):
        list(run(NullWorker, tmp_path, 4, most=1, resources={"spot": 1.0}))
    events = list(run(NullWorker, tmp_path, 4, most=1, placement="spread"))
    assert committed(events) == [0, 1, 2, 3]
