"""Faults in the processes that a run starts: code that each of them imports before anything else of ours."""

from pathlib import Path

_TOOLS = """
import os, signal, sys, time
from pathlib import Path

FOLDER = Path(__file__).parent

def tries(number):
    path = FOLDER / f"tries-{number}"
    return path.read_text().split() if path.exists() else []

def trying(split, shard):
    number = shard if split == "train" else 1000 + shard
    before = tries(number)
    with (FOLDER / f"tries-{number}").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return number, len(before)

def hold():
    '''Say that this process has come here, and stay.'''
    (FOLDER / f"held-{os.getpid()}").touch()
    while True:
        time.sleep(60)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def planted(shard, n_before, build):
    return build()

"""

_BUILDER = """
from actlake.ingest.build import ShardBuilder

real = ShardBuilder.build

def build(self, shard, *rest, **named):
    return planted(*trying(self.header.spec.split, shard), lambda: real(self, shard, *rest, **named))

ShardBuilder.build = build
"""

_WORKER = """
from actlake.jobs.engines import local_worker

class Worker:
    n_concurrent = 2

    def __init__(self, order):
        start()

    def build(self, task, on_rows):
        on_rows(task.n_rows, 0.5)
        return planted(*trying(task.split, task.shard), lambda: None)

local_worker.Worker = Worker
"""


def plant(folder: Path, code: str = "") -> None:
    """Write what a process with ``folder`` on its path runs first: ``code``, which may use ``hold`` and ``die``.

    It may define ``planted(shard, n_before, build)``, which is called in place of ``ShardBuilder.build`` with how often
    it was called for this shard before; held-out shards count from 1000.
    """
    _write(folder, _TOOLS + code + (_BUILDER if "def planted" in code else ""))


def plant_worker(folder: Path, code: str = "") -> None:
    """As ``plant``, for a worker of the local engine that has no model and makes nothing: it starts in a moment.

    ``code`` may define ``start()`` too, which is called where the model would be loaded.
    """
    _write(folder, _TOOLS + "def start():\n    pass\n\n" + code + _WORKER)


def _write(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)


def tries(folder: Path, shard: int) -> list[int]:
    """Return the processes that tried to build a shard, in their order."""
    path = folder / f"tries-{shard}"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def held(folder: Path) -> list[int]:
    """Return the processes that are held."""
    return [int(path.name.removeprefix("held-")) for path in folder.glob("held-*")]
