"""SIGTERM at many moments: exit code 143, nothing half made, no process left, and the next run goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planting import held, plant, plant_worker
from runs import alive, contents, wait_for
from typer.testing import CliRunner

import actlake
from actlake.jobs.cli import ingest as _registers  # noqa: F401
from actlake.jobs.cli.app import app

Write = Callable[..., Path]

SAID = "terminated; run the same command again to go on where it stopped\n"


def succeed(*arguments: str | Path) -> None:
    """Run a command, in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


#: How the command line starts.
MAIN = ("-m", "actlake.jobs.cli")


def terminated(folder: Path, *arguments: str | Path, n_moments: int = 1, main: tuple[str, str] = MAIN) -> list[int]:
    """Run the command line with what is planted in ``folder``; send SIGTERM once so many processes are held there.

    Returns those processes. Checks the exit code, and that it says so and nothing else on stderr.
    """
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *main, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            pids = wait_for(lambda: held(folder), lambda found: len(found) >= n_moments or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, errors) == (143, SAID)
    assert len(pids) == n_moments
    wait_for(lambda: [pid for pid in pids if alive(pid)], lambda left: not left)
    return pids


#: Holds a process at its first call of a function of ours.
HOLD = """
import {module}

{module}.{name} = lambda *arguments, **named: hold()
"""


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("ingest", "actlake.jobs.readiness", "resolve_model"),
        ("ingest", "actlake.ingest.corpus_build", "_merge"),
        ("ingest", "actlake.ingest.loading", "load_model"),
        ("prepare", "actlake.ingest.corpus_build", "_merge"),
    ],
    ids=["while the model is fetched", "while the corpus is built", "while the model loads", "prepare"],
)
def test_a_terminated_command_says_so_and_the_next_one_goes_on(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], command: str, module: str, name: str
) -> None:
    job, folder = write_job(), tmp_path / "planted"
    plant(folder, HOLD.format(module=module, name=name))
    terminated(folder, command, job, "--engine", "local")
    assert list(tmp_path.rglob(".actlake-*")) == []
    succeed(command, job, "--engine", "local")
    succeed("ingest", job, "--engine", "local")
    assert contents(tmp_path / "ds") == reference


#: Holds a process in the middle of writing an object of shard 2.
WRITING = """
replace = os.replace

def held(source, target):
    if "layers.1.attn_z/c/2/" in str(target):
        hold()
    replace(source, target)

os.replace = held
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_open_shard_is_given_up_and_leaves_nothing(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], workers: int
) -> None:
    job, folder = write_job(), tmp_path / "planted"
    job.write_text(job.read_text() + f"workers = {workers}\n")
    plant(folder, WRITING)
    terminated(folder, "ingest", job, "--engine", "local")
    assert list(tmp_path.rglob(".actlake-*")) == []
    ds = actlake.open(tmp_path / "ds")
    assert 2 in ds.missing_shards
    assert not (tmp_path / "ds/arrays/layers.1.attn_z/c/2/0").exists()
    succeed("ingest", job, "--engine", "local")
    assert contents(tmp_path / "ds") == reference


#: Holds every worker at its first shard.
BUILDING = """
def planted(shard, n_before, build):
    hold()
"""


def test_it_ends_every_worker_process(write_job: Write, tmp_path: Path) -> None:
    job, folder = write_job(), tmp_path / "planted"
    job.write_text(job.read_text() + "workers = 2\n")
    plant_worker(folder, BUILDING)
    assert len(set(terminated(folder, "ingest", job, "--engine", "local", n_moments=2))) == 2
    assert list((tmp_path / "ds").glob("commits/*/*")) == []


#: The command line with actors that have no model, and are held at their first shard. Its last argument is where.
ON_RAY = """
import os, sys, time
from pathlib import Path
from actlake.jobs.cli import main
from actlake.jobs.engines import ray_engine

FOLDER = Path(sys.argv.pop())

class Held(ray_engine.RayWorker):
    def start(self):
        return 1

    def build(self, task):
        (FOLDER / f"held-{os.getpid()}").touch()
        time.sleep(600)

ray_engine.RayWorker = Held
main()
"""


@pytest.mark.slow
def test_it_ends_rays_actors(write_job: Write, tmp_path: Path, reference: dict[str, Any]) -> None:
    job, folder = write_job(), tmp_path / "moments"
    folder.mkdir()
    terminated(folder, "ingest", job, folder, main=("-c", ON_RAY))
    succeed("ingest", job, "--engine", "local")
    assert contents(tmp_path / "ds") == reference
