"""Which shard a worker gets next, and when one is given up: no Ray, no processes."""

from actlake.jobs.engines.events import ShardAbandoned, ShardRetried
from actlake.jobs.engines.shard_queue import MOST_DEATHS, MOST_NODES, Loss, ShardQueue, Try
from actlake.jobs.work import Task
from actlake.storage.errors import WorkerLostError

A, B = object(), object()


def tasks(n: int) -> list[Task]:
    return [Task(split="train", shard=shard, n_rows=8) for shard in range(n)]


def taken(queue: ShardQueue, worker: object = A, building: tuple[Try, ...] = (), ready: object = None) -> Try:
    one = queue.take(worker, building, [A, B] if ready is None else ready)  # type: ignore[arg-type]
    assert one is not None
    return one


def test_shards_come_in_order_and_end() -> None:
    queue = ShardQueue(iter(tasks(3)), attempts=2)
    assert [taken(queue).task.shard for _ in range(3)] == [0, 1, 2]
    assert queue.is_empty
    assert queue.take(A, [], [A]) is None


def test_a_failed_shard_goes_to_another_worker_before_any_other_shard() -> None:
    queue = ShardQueue(tasks(3), attempts=3)
    first = taken(queue)
    assert isinstance(queue.failed(first, A, OSError("x")), ShardRetried)
    assert taken(queue, A).task.shard == 1
    assert taken(queue, B) is first
    # Failed on both: either may have it.
    assert isinstance(queue.failed(first, B, OSError("x")), ShardRetried)
    assert taken(queue, A) is first


def test_a_failed_shard_goes_to_the_same_worker_where_there_is_no_other() -> None:
    queue = ShardQueue(tasks(1), attempts=2)
    first = taken(queue, A, ready=[A])
    queue.failed(first, A, OSError("x"))
    assert not queue.is_empty
    assert taken(queue, A, ready=[A]) is first


def test_a_shard_is_given_up_with_its_first_error_after_so_many_attempts() -> None:
    queue, errors = ShardQueue(tasks(1), attempts=3), [OSError("first"), OSError("second"), OSError("third")]
    one = taken(queue)
    assert queue.failed(one, A, errors[0]) == ShardRetried(task=one.task, error=errors[0])
    assert queue.failed(taken(queue, B), B, errors[1]) == ShardRetried(task=one.task, error=errors[1])
    assert queue.failed(taken(queue, A), A, errors[2]) == ShardAbandoned(task=one.task, error=errors[0])
    assert queue.is_empty


def test_what_a_shard_raised_first_is_named_where_its_workers_die_later() -> None:
    queue = ShardQueue(tasks(1), attempts=9)
    queue.failed(taken(queue), A, OSError("no room"))
    events = [queue.lost(taken(queue, B), B, Loss.PROCESS, "host") for _ in range(MOST_DEATHS)]
    assert isinstance(events[-1], ShardAbandoned)
    assert isinstance(events[-1].error, WorkerLostError)
    assert str(events[-1].error).endswith(f"({MOST_DEATHS} times in all); at first it raised OSError: no room")


def test_lost_nodes_and_dead_processes_are_no_attempts_and_counted_apart() -> None:
    queue = ShardQueue(tasks(1), attempts=1)
    for _ in range(MOST_NODES - 1):
        assert isinstance(queue.lost(taken(queue), A, Loss.NODE, "host"), ShardRetried)
    for _ in range(MOST_DEATHS - 1):
        assert isinstance(queue.lost(taken(queue), A, Loss.PROCESS, "host"), ShardRetried)
    event = queue.lost(taken(queue), A, Loss.PROCESS, "host")
    assert isinstance(event, ShardAbandoned)
    assert isinstance(event.error, WorkerLostError)
    assert str(event.error).startswith("its worker's process on host died; where that was for want of memory")
    assert str(event.error).endswith("(3 times in all)")


def test_a_shard_that_loses_ten_nodes_is_given_up() -> None:
    queue = ShardQueue(tasks(1), attempts=1)
    events = [queue.lost(taken(queue), A, Loss.NODE, "host") for _ in range(MOST_NODES)]
    assert [type(event) for event in events] == [ShardRetried] * (MOST_NODES - 1) + [ShardAbandoned]
    assert str(events[-1].error) == "the node of its worker, host, was lost (10 times in all)"


def test_a_shard_whose_worker_died_is_built_alone() -> None:
    """So that it cannot kill the worker of another shard again, nor be blamed for what another one does."""
    queue = ShardQueue(tasks(4), attempts=1)
    suspect, mate = taken(queue), taken(queue)
    queue.lost(suspect, A, Loss.PROCESS, "host")
    # The first worker that asks, and builds something, takes nothing more until it is done; others go on.
    assert queue.take(A, [mate], [A, B]) is None
    assert taken(queue, B, (Try(tasks(1)[0]),)).task.shard == 2
    assert queue.take(A, [mate], [A, B]) is None
    assert taken(queue, A) is suspect
    assert queue.take(A, [suspect], [A, B]) is None
    assert taken(queue, B).task.shard == 3


def test_a_claim_of_a_worker_that_is_gone_passes_on() -> None:
    queue = ShardQueue(tasks(2), attempts=1)
    suspect = taken(queue)
    queue.lost(suspect, A, Loss.PROCESS, "host")
    assert queue.take(A, [Try(tasks(1)[0])], [A, B]) is None
    assert queue.take(B, [Try(tasks(1)[0])], [B]) is None
    assert taken(queue, B, ready=[B]) is suspect


def test_a_lost_node_does_not_make_a_shard_a_suspect() -> None:
    queue = ShardQueue(tasks(2), attempts=1)
    first = taken(queue)
    queue.lost(first, A, Loss.NODE, "host")
    assert taken(queue, A, (Try(tasks(1)[0]),)) is first
