"""Two hosts, each in a network namespace with a Ray node of its own, and a store that they reach by its URL alone."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos.campaign import MARK, SITE, Fresh, Run, World, parent_of, wait_until
from chaos.nodes import QUICK, Nodes, free_port
from chaos.site.planted import AFTER_COMMIT, BETWEEN_OBJECTS
from chaos.test_bad_stores import downloaded
from emulators import running, s3_options
from integration.demo_job import N_ROWS, write_demo_job
from runs import contents

import actlake
from actlake.shards.verify import verify
from actlake.storage.stores import Store

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> None:
    """Call iproute2; raise ``PermissionError`` with what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Host:
    """A network namespace with one link to the bridge that all of them share."""

    name: str
    address: str
    link: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What goes before a command that is to run on this host, under its name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ("ip", "netns", "exec", self.name, *named)

    def cut(self) -> None:
        """Nothing goes in or out from now on; no one is told."""
        ip("link", "set", self.link, "down")

    def join(self) -> None:
        ip("link", "set", self.link, "up")


@contextmanager
def lan(*names: str) -> Iterator[tuple[str, list[Host]]]:
    """Make hosts on a network of their own; give the address at which this machine is on it, and the hosts."""
    number = os.getpid()
    network = f"10.{200 + number % 50}.{number // 50 % 250}"
    bridge = f"acb{number}"
    with ExitStack() as stack:

        def make(undo: list[str], *arguments: str) -> None:
            ip(*arguments)
            stack.callback(lambda: suppressed(*undo))

        make(["link", "del", bridge], "link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{network}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        hosts = []
        for place, name in enumerate(names):
            host = Host(f"actlake-{number}-{name}", f"{network}.{place + 2}", f"acv{number}{name}")
            make(["netns", "del", host.name], "netns", "add", host.name)
            # A namespace that some process is still in stays, and its link with it.
            make(
                ["link", "del", host.link],
                "link",
                "add",
                host.link,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host.name,
            )
            ip("link", "set", host.link, "master", bridge)
            ip("link", "set", host.link, "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", host.name, "link", "set", device, "up")
            hosts.append(host)
        yield f"{network}.1", hosts


def suppressed(*arguments: str) -> None:
    with suppress(PermissionError):
        ip(*arguments)


@dataclass(frozen=True)
class Site:
    """Two hosts, the points of each, and the store between them."""

    a: Host
    b: Host
    nodes: Nodes
    points: dict[str, Path]
    store: Store


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        try:
            address, (a, b) = stack.enter_context(lan("a", "b"))
        except (PermissionError, FileNotFoundError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        store = stack.enter_context(bucket(address))
        points = {"a": tmp_path / "points-a", "b": tmp_path / "points-b"}
        nodes = stack.enter_context(Nodes(points["a"], {**QUICK, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}))
        nodes.start_head(*a.inside, ip=a.address, n_cpus=1)
        nodes.start_node(*b.inside, ip=b.address, points=points["b"])
        yield Site(a, b, nodes, points, store)


@contextmanager
def bucket(address: str) -> Iterator[Store]:
    """Serve S3 at an address; give a folder of it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]
    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        wait_until(lambda: answers(address, port), 60, "an S3 server")
        options: dict[str, Any] = s3_options(port)
        options["client_kwargs"]["endpoint_url"] = f"http://{address}:{port}"
        # What was under way when a host was cut off is begun again after seconds, until the host is back: an attempt
        # that gave up would not finish late.
        options |= {"wait_s": 0.1, "stall_s": 5.0, "attempts": 60}
        store = Store("s3://actlake-hosts/run", options)
        store.fs.mkdir("actlake-hosts")
        yield store


def answers(address: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((address, port), timeout=1).close()
        return True
    return False


def run_on(site: Site, world: World, folder: Path) -> Run:
    return Run(
        world,
        folder,
        engine="ray",
        # One worker of two shards at once could do everything before the other is there.
        workers="{ min = 2, max = 2 }",
        address=site.nodes.address,
        points=site.points["a"],
        dataset=f"{site.store.url}/ds",
        options=site.store.options,
        environment=QUICK,
    )


def at(points: Path, point: str) -> int:
    """Return the process that waits at a point, 0 where none does."""
    return next((int(path.suffix[1:]) for path in points.glob(f"{point}.*") if path.suffix[1:].isdigit()), 0)


def require_whole(site: Site, world: World, folder: Path) -> actlake.ActivationDataset:
    place = site.store.child("ds")
    assert contents(downloaded(place, folder / "copy")) == world.contents
    ds = actlake.open(place.url, place.options)
    assert ds.complete
    assert verify(ds).problems == verify(ds.heldout).problems == ()
    return ds


def test_two_hosts_build_one_dataset(site: Site, world: World, tmp_path: Path) -> None:
    run = run_on(site, world, tmp_path / "run")
    for points in site.points.values():
        (points / f"{BETWEEN_OBJECTS}.armed").touch()
    driver = run.start(*site.a.inside)
    # Each holds one of its shards until the other holds one too.
    places = list(site.points.values())
    wait_until(lambda: driver.poll() is not None or all(at(points, BETWEEN_OBJECTS) for points in places), 240, "both")
    for points in places:
        (points / f"{BETWEEN_OBJECTS}.go").touch()
    run.finish(driver)
    ds = require_whole(site, world, tmp_path)
    assert set(ds.manifest["host"].to_pylist()) == {site.a.name, site.b.name}


@pytest.mark.timeout(1500)
def test_two_hosts_build_the_whole_demo(site: Site, gemma_270m: Path, demo_on_gcs: Store, tmp_path: Path) -> None:
    place = site.store.child("demo")
    job = write_demo_job(tmp_path, place.url, {**place.options, "stall_s": 60.0, "attempts": 5})
    environment = {MARK: str(site.points["a"]), "PYTHONPATH": str(SITE), **QUICK}
    arguments = ["ingest", str(job), "--engine", "ray", "--address", site.nodes.address]
    driver = Fresh(arguments, environment, tmp_path / "log", *site.a.inside)
    assert driver.wait(900) == 0, (tmp_path / "log").read_text()[-3000:]
    ds = actlake.open(place.url, place.options)
    assert ds.complete
    assert ds.n_rows + ds.heldout.n_rows == N_ROWS
    assert verify(ds).problems == verify(ds.heldout).problems == ()
    assert set(ds.manifest["host"].to_pylist()) == {site.a.name, site.b.name}
    # The bytes of one host, on another store.
    assert contents(downloaded(place, tmp_path / "two")) == contents(downloaded(demo_on_gcs, tmp_path / "one"))


@pytest.mark.skipif("ACTLAKE_CHAOS" not in os.environ, reason="takes minutes: 'make chaos' runs it")
def test_a_host_that_was_cut_off_finishes_its_old_shard_late(site: Site, world: World, tmp_path: Path) -> None:
    run, there = run_on(site, world, tmp_path / "run"), site.points["b"]
    (there / f"{BETWEEN_OBJECTS}.armed").touch()
    driver = run.start(*site.a.inside)
    pid = wait_until(lambda: driver.poll() is not None or at(there, BETWEEN_OBJECTS), 240, "a shard on the other host")
    # Its node would end its workers as soon as it learned that it had been given up: one of them is faster.
    raylet = parent_of(pid)
    assert raylet in site.nodes.raylets()
    os.kill(raylet, signal.SIGSTOP)
    site.b.cut()
    # The node is given up, the shard built by another.
    run.finish(driver)
    require_whole(site, world, tmp_path)
    (there / f"{AFTER_COMMIT}.armed").touch()
    site.b.join()
    (there / f"{BETWEEN_OBJECTS}.go").touch()
    # Late it commits, unless Ray has ended it: the dataset stays what it was.
    wait_until(lambda: at(there, AFTER_COMMIT) or not Path(f"/proc/{pid}").exists(), 240, "the end of the old attempt")
    require_whole(site, world, tmp_path / "late")
