"""Whole ingestion runs as the tests look at them: what must reproduce, and a run that is killed on the way."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from actlake.jobs.engines.events import Event
from actlake.jobs.readiness import Listener

T = TypeVar("T")


def contents(dataset: Path) -> dict[str, Any]:
    """Return what must reproduce: every object's digest, of commit records only the content.

    A file that a killed process had not yet named is no object: nobody reads it.
    """
    found: dict[str, Any] = {}
    for path in sorted(dataset.rglob("*")):
        key = str(path.relative_to(dataset))
        if not path.is_file() or key.startswith(("manifest/", "heldout/manifest/")) or key.endswith("root.json"):
            continue
        if path.name.startswith(".actlake-"):
            continue
        if "commits/" in key:
            found[key] = json.loads(path.read_bytes())["content"]
        else:
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_until(job: Path, engine: str, condition: Callable[[], bool]) -> int:
    """Start ``actlake ingest`` and SIGKILL its process as soon as the condition holds; return its exit code."""
    command = [sys.executable, "-m", "actlake.jobs.cli", "ingest", str(job), "--engine", engine]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    return process.wait(timeout=30)


def wait_for(look: Callable[[], T], good: Callable[[T], bool]) -> T:
    """Look until what is found is good, for minutes at most; return it."""
    deadline = time.monotonic() + 200
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    """Say whether a process runs; one that is dead but not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Recorder(Listener):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[Event] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, event: Event) -> None:
        self.events.append(event)
