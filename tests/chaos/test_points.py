"""SIGKILL at every step of a shard's way: the next run finishes the dataset, equal to an undisturbed one."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from chaos.campaign import Driver, Run, World, marked, parent_of, wait_until
from chaos.nodes import QUICK, Nodes
from chaos.site.planted import POINTS
from runs import contents

#: Whom to kill when a process of a driver's run is at a point.
Victims = Callable[[int, Driver], Sequence[int]]


#: A shard that has lost three workers is given up: no more than two points of one run kill a worker.
HALVES = pytest.mark.parametrize("points", [POINTS[:2], POINTS[2:]], ids=["objects", "commit"])


LONG = pytest.mark.skipif("ACTLAKE_CHAOS" not in os.environ, reason="takes minutes: 'make chaos' runs it")


#: Every kill of a driver or of all Ray costs the start of another, so that half of the points is for 'make chaos'.
IN_TURN = pytest.mark.parametrize(
    "points",
    [pytest.param(POINTS[1::2], id="stored"), pytest.param(POINTS[::2], id="about-to", marks=LONG)],
)


def disturb(
    run: Run, victims: Victims, points: Sequence[str] = POINTS, mend: Callable[[], object] = lambda: None
) -> None:
    """Kill at each of the points, one after another, in one run for as long as its driver lives."""
    driver: Driver | None = None
    for point in points:
        run.arm(point)
        if driver is None:
            driver = run.start()
        pid = run.reached(point, driver)
        killed = victims(pid, driver)
        run.kill(*killed)
        mend()
        if driver.pid in killed:
            driver.wait(30)
            driver, run.n_resumes = None, run.n_resumes + 1
        run.check_committed()
    if driver is None:
        run.build()
    else:
        run.finish(driver)
    assert run.outcome().is_whole
    assert run.n_kills == len(points)


def worker(pid: int, driver: Driver) -> Sequence[int]:
    assert pid != driver.pid
    return [pid]


def only_driver(pid: int, driver: Driver) -> Sequence[int]:
    return [driver.pid]


# --- without Ray --------------------------------------------------------------------------------------------------


def test_one_process(world: World, tmp_path: Path) -> None:
    disturb(Run(world, tmp_path), only_driver)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_one_of_two_worker_processes(world: World, tmp_path: Path, point: str) -> None:
    run = Run(world, tmp_path, workers=2)
    run.arm(point)
    driver = run.start()
    pid = run.reached(point, driver)
    assert pid != driver.pid
    run.kill(pid)
    assert run.finish(driver).outcome().is_whole


@pytest.mark.slow
def test_the_driver_of_two_worker_processes(world: World, tmp_path: Path) -> None:
    run = Run(world, tmp_path, workers=2)
    disturb(run, only_driver, mend=lambda: wait_until(lambda: not marked(run.points), 30, "the end of the workers"))


# --- on Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head that takes no work, and one node that does."""
    with Nodes(tmp_path_factory.mktemp("nodes"), QUICK) as started:
        started.start_head()
        started.start_node()
        yield started


def on(nodes: Nodes, world: World, folder: Path, *, salted: bool = False) -> Run:
    return Run(
        world,
        folder,
        engine="ray",
        address=nodes.address,
        points=nodes.points,
        salted=salted,
        environment=QUICK,
    )


@pytest.mark.slow
@HALVES
def test_a_worker_on_ray(nodes: Nodes, world: World, tmp_path: Path, points: Sequence[str]) -> None:
    disturb(on(nodes, world, tmp_path), worker, points)


@pytest.mark.slow
def test_a_worker_on_ray_where_no_two_attempts_have_the_same_bytes(nodes: Nodes, world: World, tmp_path: Path) -> None:
    run = on(nodes, world, tmp_path, salted=True)
    try:
        disturb(run, worker, POINTS[1:3])
    finally:
        (run.points / "salt").unlink()
    stored = {key for key in world.contents if "arrays/layers" in key and "/c/" in key}
    assert stored
    assert all(contents(run.dataset)[key] != world.contents[key] for key in stored)


@pytest.mark.slow
@IN_TURN
def test_the_driver_on_ray(nodes: Nodes, world: World, tmp_path: Path, points: Sequence[str]) -> None:
    disturb(on(nodes, world, tmp_path), only_driver, points)


@pytest.mark.slow
@IN_TURN
def test_a_whole_node_on_ray(nodes: Nodes, world: World, tmp_path: Path, points: Sequence[str]) -> None:
    def raylet(pid: int, driver: Driver) -> Sequence[int]:
        found = parent_of(pid)
        assert found in nodes.raylets()
        return [found]

    disturb(on(nodes, world, tmp_path), raylet, points, nodes.start_node)


@pytest.mark.slow
@IN_TURN
def test_everything_on_ray(world: World, tmp_path: Path, points: Sequence[str]) -> None:
    """Ray is the driver's own here, started and stopped with it."""
    run = Run(world, tmp_path, engine="ray")

    def everything(pid: int, driver: Driver) -> Sequence[int]:
        found = marked(run.points)
        assert pid in found
        assert driver.pid in found
        return list(found)

    disturb(run, everything, points, mend=lambda: wait_until(lambda: not marked(run.points), 30, "the end of Ray"))
