"""The Slurm scripts: bash takes them, their options exist, their commands are ours, and the array's builds a slice."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from fakes import write_documents

from actlake.jobs.cli import ingest  # noqa: F401 - registers
from actlake.jobs.cli.app import app
from actlake.storage.stores import Store

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "infra/slurm").glob("*.sbatch"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])

#: Options of sbatch that the scripts may use, and what their values look like; None: the option has none.
OPTIONS = {
    "job-name": r"[\w-]+",
    "array": r"[0-9]+-[0-9]+(%[0-9]+)?",
    "nodes": r"[1-9][0-9]*",
    "ntasks": r"[1-9][0-9]*",
    "cpus-per-task": r"[1-9][0-9]*",
    "gpus-per-task": r"[1-9][0-9]*",
    "gpus-per-node": r"[1-9][0-9]*",
    "mem": r"[0-9]+[KMGT]?",
    "time": r"([0-9]+-)?[0-9]{2}:[0-9]{2}:[0-9]{2}",
    "signal": r"(B:)?(TERM|INT|USR1)@[1-9][0-9]*",
    "open-mode": r"append|truncate",
    "output": r"(%[xjAa]|[\w.-])+",
    "exclusive": None,
    "requeue": None,
}


def wrong_options(text: str) -> list[str]:
    """Return the #SBATCH lines that are none, or come after the first command, where Slurm no longer reads them."""
    found, over = [], False
    for line in text.splitlines():
        if not line.startswith("#SBATCH"):
            over = over or bool(line and not line.startswith("#"))
            continue
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        name, given = ("", None) if match is None else match.groups()
        value = OPTIONS.get(name, "(?!)")  # Which matches nothing.
        good = given is None if value is None else given is not None and re.fullmatch(value, given)
        if over or not good:
            found.append(line)
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each actlake command of a script, its variables replaced by what they may be."""
    values = {"job": "job.toml", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "slice[@]": "--slice=1/4"}
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("#") or " actlake " not in line:
            continue
        words = shlex.split(re.sub(r"\$\{?([\w@\[\]]+)\}?", lambda m: values.get(m[1], "1"), line.partition("||")[0]))
        yield words[words.index("actlake") + 1 :]


@every_script
def test_bash_takes_the_script(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=20, check=True).stderr == b""


@every_script
def test_its_options_are_slurms(script: Path) -> None:
    text = script.read_text()
    assert wrong_options(text) == []
    assert "#SBATCH --requeue" in text
    assert re.search(r"#SBATCH --signal=TERM@", text)


@pytest.mark.parametrize(
    "line",
    [
        "#SBATCH --gpu=1",
        "#SBATCH --time=12h",
        "#SBATCH --requeue=yes",
        "#SBATCH -N 1",
        "#SBATCH --mem",
        "#SBATCH mem=1G",
    ],
)
def test_a_wrong_option_would_be_found(line: str) -> None:
    assert wrong_options(f"#!/bin/bash\n{line}\n") == [line]
    assert wrong_options("set -e\n#SBATCH --mem=1G\n") == ["#SBATCH --mem=1G"]


@every_script
def test_its_commands_are_ours(script: Path) -> None:
    group: Any = typer.main.get_command(app)
    (words,) = commands(script.read_text())
    group.commands[words[0]].make_context(words[0], words[1:])
    assert '"$job"' in script.read_text()


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """Return an environment with actlake, an srun that runs its command here, and a scontrol that notes its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": f'echo "$@" >> {shlex.quote(str(tmp_path / "scontrol"))}',
        "actlake": f'[[ -z ${{FAIL:-}} ]] || exit "$FAIL"; exec {sys.executable} -m actlake.jobs.cli "$@"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "70",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_CPUS_ON_NODE": "1",
    }


def run(name: str, job: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "infra/slurm" / name), str(job)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)


TASK_3 = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a job file of 4 shards of a tiny model, and held-out ones."""
    import tiny_gemma

    model, texts = tiny_gemma.save(tmp_path / "model"), write_documents(tmp_path / "texts")
    path = tmp_path / "job.toml"
    path.write_text(
        f'dataset = "{tmp_path}/ds"\nmodel = "{model}"\nhook_points = ["layers.1.resid_post"]\nmax_rows = 500\n'
        f'[capture]\nbatch_tokens = 256\n[corpus]\nsources = ["{texts}"]\ncontext_length = 32\nholdout = 0.1\n'
        "[layout]\nrows_per_shard = 128\nrows_per_chunk = 32\n[run]\nthreads = 1\n"
    )
    return path


def test_a_task_of_the_array_builds_its_slice(job: Path, tmp_path: Path, stand_ins: dict[str, str]) -> None:
    assert run("prepare.sbatch", job, stand_ins).returncode == 0
    done = run("ingest-array.sbatch", job, stand_ins | TASK_3)
    assert done.returncode == 0, done.stderr
    assert "built 1 shard of slice 3/4" in done.stdout
    assert Store(tmp_path / "ds").names("commits/00000000") == ["0000000003.json"]
    whole = run("ingest-node.sbatch", job, stand_ins)
    assert (whole.returncode, "built 4 shards" in whole.stdout) == (0, True), whole.stderr
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("name", "array", "requeued"),
    [("ingest-array.sbatch", TASK_3, "70_3"), ("ingest-node.sbatch", TASK_3, "70_3"), ("ingest-node.sbatch", {}, "70")],
)
def test_a_task_whose_time_is_up_goes_back_into_the_queue(
    tmp_path: Path, stand_ins: dict[str, str], name: str, array: dict[str, str], requeued: str
) -> None:
    assert run(name, Path("job.toml"), stand_ins | array | {"FAIL": "143"}).returncode == 143
    assert (tmp_path / "scontrol").read_text() == f"requeue {requeued}\n"


def test_a_task_that_fails_does_not(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    assert run("ingest-array.sbatch", Path("job.toml"), stand_ins | TASK_3 | {"FAIL": "1"}).returncode == 1
    assert not (tmp_path / "scontrol").exists()


def test_a_script_without_a_job_says_how_it_is_used(stand_ins: dict[str, str]) -> None:
    for script in SCRIPTS:
        done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=20, check=False, env=stand_ins)
        assert (done.returncode, "usage: sbatch" in done.stderr) == (1, True)
