"""Whom to kill in a run, and when; what of it must be mended by hand before it can go on."""

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.campaign import Driver, Run, World, marked, parent_of, wait_until
from chaos.nodes import Nodes
from chaos.site.planted import BEFORE_COMMIT, BETWEEN_OBJECTS

ONE, TWO, RAY = "one process", "two processes", "Ray"
DRIVER, WORKER, NODE, EVERYTHING = "driver", "worker", "node", "everything"

#: Who there is to be killed, by engine.
VICTIMS = {ONE: (DRIVER,), TWO: (WORKER, DRIVER), RAY: (WORKER, NODE, DRIVER, EVERYTHING)}


@dataclass(frozen=True)
class Scene:
    """An engine, who is killed there, and the Ray cluster that runs on its own; of everything Ray is the driver's."""

    engine: str
    victim: str
    nodes: Nodes | None = None

    def run(self, world: World, folder: Path, *, salted: bool = False) -> Run:
        """Return a dataset to be built on this engine."""
        if self.engine == RAY:
            assert self.nodes is not None
            if self.victim == EVERYTHING:
                return Run(world, folder, engine="ray", salted=salted)
            return Run(world, folder, engine="ray", address=self.nodes.address, points=self.nodes.points)
        return Run(world, folder, workers=2 if self.engine == TWO else 1, salted=salted)

    def kill(self, run: Run, driver: Driver, pid: int = 0) -> None:
        """Kill the victim: the worker ``pid``, or any, and its node; the driver where there is no worker yet."""
        worker = pid or next(iter(self._workers(run, driver)), 0)
        if self.victim == EVERYTHING:
            run.kill(*marked(run.points), driver.pid)
        elif self.victim == DRIVER or not worker:
            run.kill(driver.pid)
        elif self.victim == NODE:
            run.kill(parent_of(worker))
        else:
            run.kill(worker)

    def _workers(self, run: Run, driver: Driver) -> Sequence[int]:
        if self.nodes is not None and self.victim != EVERYTHING:
            return self.nodes.workers()
        return [pid for pid in marked(run.points) if pid != driver.pid]

    def mend(self, run: Run) -> None:
        """Wait until what was killed has taken with it what it should; start another node for a lost one."""
        if self.nodes is None or self.victim == EVERYTHING:
            if self.victim in (DRIVER, EVERYTHING):
                wait_until(lambda: not marked(run.points), 60, "the end of what the driver had started")
        elif self.victim == NODE and len(self.nodes.raylets()) < 2:
            self.nodes.start_node()


def at_point(scene: Scene, run: Run, point: str) -> None:
    """Kill when a process comes to a point; the run goes on, or another does."""
    run.arm(point)
    driver = run.start()
    scene.kill(run, driver, run.reached(point, driver))
    _go_on(scene, run, driver)


def at_random(scene: Scene, run: Run, drawn: random.Random, seconds: float) -> None:
    """Kill at a time that is drawn from those of an undisturbed run."""
    driver = run.start()
    time.sleep(drawn.uniform(0, seconds))
    if driver.poll() is None:
        scene.kill(run, driver)
    _go_on(scene, run, driver)


def _go_on(scene: Scene, run: Run, driver: Driver) -> None:
    scene.mend(run)
    if driver.wait(300) != 0:
        run.check_committed()
        run.resume()


def late(run: Run, point: str) -> None:
    """Stop a process at a point, let another finish the dataset, and let the first go on to its end."""
    first, _ = _stopped_meanwhile(run, point)
    run.go(point)
    run.finish(first)


def late_and_killed(run: Run) -> None:
    """The same, but the late process, having stored its objects over the other's, is killed before its commit."""
    first, pid = _stopped_meanwhile(run, BETWEEN_OBJECTS)
    run.arm(BEFORE_COMMIT)
    run.go(BETWEEN_OBJECTS)
    assert run.reached(BEFORE_COMMIT, first) == pid
    run.kill(pid)
    first.wait(60)


def _stopped_meanwhile(run: Run, point: str) -> tuple[Driver, int]:
    run.arm(point)
    first = run.start()
    pid = run.reached(point, first)
    os.kill(pid, signal.SIGSTOP)
    run.resume()
    os.kill(pid, signal.SIGCONT)
    return first, pid
