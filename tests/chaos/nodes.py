"""Ray nodes as processes of their own, that can be killed, cut off and brought back; on one host or on several."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.campaign import MARK, SITE, kill, marked, wait_until

#: A lost node is dead after seconds instead of a minute; nothing waits long for an answer that does not come.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
}

#: Seconds that a node may take to start. Ray itself gives up after 30 of them, which a busy machine may need.
_START_S, _N_STARTS = 180, 3


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Nodes:
    """A Ray cluster whose processes are planted with ``points``; what is left of it at the end is killed by id."""

    def __init__(self, points: Path, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, **(environment or {})}
        self.points, self.port, self.address = points, free_port(), ""
        # Paths of sockets have at most 107 characters.
        self._folder = tempfile.mkdtemp(prefix="actlake-ray-", dir="/tmp")
        self._planted = {points}
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_head(self, *prefix: str, ip: str = "", n_cpus: int = 0) -> None:
        """Start the head, which takes no work by default; ``prefix`` goes before the command."""
        self.address = f"{ip or '127.0.0.1'}:{self.port}"
        self._start(prefix, ["--head", "--port", str(self.port), "--include-dashboard=false"], ip, n_cpus, self.points)

    def start_node(self, *prefix: str, ip: str = "", n_cpus: int = 1, points: Path | None = None) -> None:
        """Start a node with room for as many workers of one thread, with points of its own or those of the cluster."""
        self._start(prefix, ["--address", self.address], ip, n_cpus, points or self.points)

    def _start(self, prefix: tuple[str, ...], arguments: list[str], ip: str, n_cpus: int, points: Path) -> None:
        points.mkdir(parents=True, exist_ok=True)
        self._planted.add(points)
        command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        command += ["--num-cpus", str(n_cpus), "--num-gpus", "0", "--object-store-memory", "80000000", "--block"]
        command += ["--disable-usage-stats", "--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--node-ip-address", ip] if ip else []
        for _ in range(_N_STARTS):
            process, said = self._try(command, points)
            if process.poll() is None:
                return
        raise AssertionError(f"a Ray node does not start:\n{said}")

    def _try(self, command: list[str], points: Path) -> "tuple[subprocess.Popen[bytes], str]":
        """Start a node; return its process and what it said until it was up, or ended."""
        # Ray notes in its folder which cluster runs on this machine: not where others look.
        own = {MARK: str(points), "PYTHONPATH": str(SITE), "RAY_TMPDIR": self._folder}
        log = Path(self._folder) / f"start-{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={**self._environment, **own}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._started.append(process)
        started = b"Ray runtime started"
        wait_until(lambda: process.poll() is not None or started in log.read_bytes(), _START_S, "a Ray node")
        return process, log.read_text()[-3000:]

    def processes(self) -> dict[int, str]:
        """Return the processes of the cluster, and the drivers that were planted with it; with their commands."""
        return {pid: command for points in self._planted for pid, command in marked(points).items()}

    def raylets(self) -> list[int]:
        """Return the raylets that are running."""
        return [pid for pid, command in self.processes().items() if "/raylet/raylet " in command]

    def workers(self) -> list[int]:
        """Return the actors that build shards."""
        return [pid for pid, command in self.processes().items() if command.startswith("ray::RayWorker")]

    def kill_all(self) -> None:
        """End every process of the cluster, and every driver that was planted with it."""
        for pid in self.processes():
            kill(pid)
        for process in self._started:
            process.kill()
            process.wait(30)
        wait_until(lambda: not self.processes(), 30, "the end of a Ray cluster")
