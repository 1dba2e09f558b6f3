"""A real Ray head with dashboard and token: submit, status, logs, stop, and the metrics that Prometheus scrapes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import contents
from typer.testing import CliRunner, Result

from actlake.jobs.cli import cluster, ingest  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.metrics import COUNTERS, GAUGES
from actlake.jobs.wheel import own_wheel

pytestmark = pytest.mark.slow

Write = Callable[..., Path]

_TOKEN = "0123456789abcdef" * 4

#: Held by this module's cluster; tests wait at most so long for what they look for.
_PATIENCE_S = 240


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Head:
    """A running head; ``environment`` is what reaches it."""

    def __init__(self, folder: str) -> None:
        os.mkdir(folder)
        self.gcs, self.dashboard, self.metrics = free_port(), free_port(), free_port()
        self.url, self.address = f"http://127.0.0.1:{self.dashboard}", f"127.0.0.1:{self.gcs}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
        # Entrypoints run "python", as in the image.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {"PATH": path, "RAY_metrics_report_interval_ms": "500"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={self.gcs}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={self.dashboard}", f"--metrics-export-port={self.metrics}"]
        command += [
            f"--temp-dir={folder}",
            "--object-store-memory=100000000",
            f"--ray-client-server-port={free_port()}",
        ]
        # Without a port of its own the agent takes Ray's usual one, and ends its node where another Ray has that.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        self._log = Path(folder, "start.log")
        with self._log.open("wb") as log:
            environment = os.environ | self.environment | settings
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def starts(self) -> bool:
        """Wait for the start; False where Ray gave up: agents have 15 s, in which a busy machine may not start them."""
        until("start", lambda: self._process.poll() is not None or b"will now block" in self._log.read_bytes())
        return self._process.poll() is None

    def close(self) -> None:
        """Kill what was started, by its id: daemons are of its group, workers end with them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=20)


def until(what: str, look: Callable[[], Any]) -> Any:
    """Return the first true value of ``look``."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what} in {_PATIENCE_S} s")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Short: sockets lie in it, whose names have at most 107 characters.
    folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    with folder as name, contextlib.ExitStack() as stack:
        for attempt in range(3):
            found = Head(f"{name}/{attempt}")
            stack.callback(found.close)
            if found.starts():
                break
        until("dashboard", lambda: run(found, "status").exit_code == 0)
        yield found


def run(head: Head, *arguments: str | Path, **environment: str) -> Result:
    changes = {"COLUMNS": "400", "RAY_API_SERVER_ADDRESS": head.url, **head.environment, **environment}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=changes)


def status(head: Head, job: str) -> dict[str, Any]:
    result = run(head, "status", job, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def scraped(head: Head) -> dict[str, float]:
    """Return our metrics by name and state, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{head.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_actlake_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        state = re.search(r'state="(\w+)"', labels)
        found[name + (f"/{state[1]}" if state else "")] = float(value)
    return found


def held_wheel(folder: Path, gate: Path) -> Path:
    """Return a wheel of this actlake whose workers build no shard after the first ones until ``gate`` is there."""
    wheel = own_wheel()
    whole, held = folder / "whole.whl", folder / wheel.name
    whole.write_bytes(wheel.data)
    planted = (
        "\n_build = Worker.build\n\n\ndef _held(self, task, *rest):\n    import pathlib, time\n\n"
        f"    while task.shard > 1 and not pathlib.Path({str(gate)!r}).exists():\n        time.sleep(0.05)\n"
        "    return _build(self, task, *rest)\n\n\nWorker.build = _held\n"
    )
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(held, "w") as made:
        for name in source.namelist():
            more = planted.encode() if name == "actlake/jobs/work.py" else b""
            made.writestr(name, source.read(name) + more)
    return held


def test_a_job_is_seen_stopped_and_resumed(
    head: Head, write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    job = write_job()
    sent = run(head, "submit", job, "--wheel", held_wheel(tmp_path, tmp_path / "gate"), "--json")
    assert sent.exit_code == 0, sent.output
    name = json.loads(sent.stdout)["job"]

    # The wheel that was sent is what the workers run: they stop at its gate.
    progress = until(
        "second shard", lambda: (found := status(head, name)["progress"]) and found["n_committed"] >= 2 and found
    )
    assert (progress["n_shards"], progress["n_rows"], progress["n_failed"]) == (8, 875, 0)
    assert progress["n_committed"] < 8
    assert status(head, name)["state"] == "RUNNING"
    table = run(head, "status").stdout
    assert re.search(rf" {name} +RUNNING +\d/8 ", table)
    assert f"the job {name} is building {tmp_path}/ds already" in run(head, "submit", job).stderr

    counted = {f"ray_{counter}_total" for counter in COUNTERS if counter != "actlake_retries"}

    # Each metric is exported at a time of its own: of those of one moment, one may be there before the other.
    def exported() -> dict[str, float] | None:
        found = scraped(head)
        whole = found.keys() >= counted and found["ray_actlake_committed_shards_total"] == progress["n_committed"]
        return found if whole and found["ray_actlake_shards/committed"] == progress["n_committed"] else None

    found = until("metrics", exported)
    assert {name.partition("/")[0] for name in found} >= {f"ray_{gauge}" for gauge in GAUGES if "seconds" not in gauge}
    assert found["ray_actlake_rows/done"] + found["ray_actlake_rows/left"] == 875
    assert found["ray_actlake_workers/ready"] >= 1

    stopped = run(head, "stop", name)
    assert stopped.exit_code == 0, stopped.output
    assert f"{name} is STOPPED" in stopped.stdout
    last = status(head, name)
    assert (last["state"], last["progress"]["n_committed"]) == ("STOPPED", progress["n_committed"])
    assert "terminated; run the same command again" in run(head, "logs", name).stdout
    assert not list((tmp_path / "ds").rglob(".actlake-*"))

    resumed = run(head, "submit", job, "--follow")
    assert resumed.exit_code == 0, resumed.output
    assert f"{progress['n_committed']} of them committed before" in resumed.stdout
    assert "875 rows" in resumed.stdout.splitlines()[-1]
    assert contents(tmp_path / "ds") == reference
    (again,) = re.findall(r"^submitted (\S+)", resumed.stdout, re.MULTILINE)
    followed = run(head, "logs", again, "-f")
    assert followed.exit_code == 0
    assert followed.stdout == run(head, "logs", again).stdout
    assert followed.stdout in resumed.stdout


def test_a_job_that_cannot_be_done_ends_with_its_code_and_cause(head: Head, write_job: Write) -> None:
    job = write_job()
    job.write_text(job.read_text() + 'device = "cuda"\nstart_timeout = 1\n')
    result = run(head, "submit", job, "--follow", "--no-ship")
    assert result.exit_code == 2, result.output
    assert "GPU" in result.stdout, result.output
    assert "is FAILED with exit code 2" in result.stderr


def test_without_the_token_nothing_is_done(head: Head, write_job: Write, tmp_path: Path) -> None:
    job = write_job()
    for token, why in (("", "wants a token, and none is here"), ("f" * 64, "wants another token")):
        result = run(head, "submit", job, RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
        assert result.exit_code == 2
        assert why in result.stderr.splitlines()[-1]
    done = driver(head, job, RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == 2
    assert "wants a token, and none or another one is here; copy the cluster's token" in done.stderr.splitlines()[-1]
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


def test_a_driver_with_another_ray_or_python_is_told(head: Head, write_job: Write, tmp_path: Path) -> None:
    """The head says of itself that it is another; nothing else of a real cluster of another version is at hand."""
    job = write_job()
    changed = say_versions(head, ray="2.49.0", python="3.10.2")
    try:
        done = driver(head, job)
    finally:
        say_versions(head, **changed)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"the cluster at {head.address} runs Ray 2.49.0 and Python 3.10.2, this machine Ray " in last
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


def say_versions(head: Head, ray: str, python: str) -> dict[str, str]:
    """Change what a head says of its versions; return what it said before."""
    code = (
        "import json, sys; from ray._raylet import GcsClient; address, ray, python = sys.argv[1:];"
        "client, key = GcsClient(address=address), b'CLUSTER_METADATA';"
        "was = json.loads(client.internal_kv_get(key, b'cluster'));"
        "now = was | {'ray_version': ray, 'python_version': python};"
        "client.internal_kv_put(key, json.dumps(now).encode(), True, b'cluster');"
        "print(json.dumps({'ray': was['ray_version'], 'python': was['python_version']}))"
    )
    command = [sys.executable, "-c", code, head.address, ray, python]
    environment = os.environ | head.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def driver(head: Head, job: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a driver on this machine."""
    command = [sys.executable, "-m", "actlake.jobs.cli", "ingest", str(job), "--address", head.address]
    return subprocess.run(
        command,
        env=os.environ | head.environment | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
