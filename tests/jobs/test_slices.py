"""Slices: what they are, that they make a dataset whole in any order and at once, and who writes the summaries."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Recorder, contents
from typer.testing import CliRunner

import actlake
from actlake.jobs import ingestion, readiness
from actlake.jobs.cli import ingest as _registers  # noqa: F401
from actlake.jobs.cli.app import app
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.jobs.slices import Slice
from actlake.storage.errors import BadInputError

Write = Callable[..., Path]


# --- What a slice is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number", "count"), [("3/8", 3, 8), ("0/8", 0, 8), ("8/8", 8, 8), (" 1 / 1 ", 1, 1), ("07/10", 7, 10)]
)
def test_slices_are_read(text: str, number: int, count: int) -> None:
    assert Slice.parse(text) == Slice(number=number, count=count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9/8", r"there is no slice 9 of 8; an array of 8 tasks is numbered 0-7 or 1-8, without gaps"),
        ("1/0", r"--slice 1/0: a dataset has at least one slice; give e\.g\. --slice \$SLURM_ARRAY_TASK_ID"),
        ("a/b", r"'a/b' is not NUMBER/COUNT"),
        ("-1/8", r"'-1/8' is not NUMBER/COUNT"),
        ("1.0/8", r"is not NUMBER/COUNT"),
        ("1/2/3", r"is not NUMBER/COUNT"),
        ("3", r"'3' is not NUMBER/COUNT"),
        ("", r"'' is not NUMBER/COUNT"),
        ("/", r"'/' lacks a number: an environment variable in it is empty, as those of Slurm are outside of a job"),
        ("3/", r"'3/' lacks a number"),
        ("/8", r"'/8' lacks a number"),
    ],
)
def test_what_is_no_slice_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Slice.parse(text)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_every_missing_shard_is_in_one_slice_however_they_are_numbered(
    write_job: Write, count: int, first: int, plan: readiness.Plan
) -> None:
    slices = [list(plan.missing.slice(number, count)) for number in range(first, first + count)]
    for number, tasks in enumerate(slices, first):
        assert {task.shard % count for task in tasks} <= {number % count}
        assert len(tasks) == len(plan.missing.slice(number, count))
    dealt = [task for tasks in slices for task in tasks]
    assert len(dealt) == len(set(dealt)) == len(plan.missing)
    assert set(dealt) == set(plan.missing)


@pytest.fixture
def plan(write_job: Write, monkeypatch: pytest.MonkeyPatch) -> readiness.Plan:
    """What the standard job has to do."""
    job, found = read_job(write_job()), list[readiness.Plan]()

    class Planned(Recorder):
        def planned(self, plan: readiness.Plan) -> None:
            found.append(plan)

    with monkeypatch.context() as patched:
        patched.setattr(ingestion, "_build_missing", lambda *a: [])
        ingest(job, engine="local", listener=Planned())
    return found[0]


# --- Runs ---------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_slices_in_any_order_make_the_dataset_whole(
    write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    job, ds = write_job(), tmp_path / "ds"
    result = run("ingest", job, "--engine", "local", "--slice", "2/3")
    assert result.exit_code == 0, result.output
    assert "; 2 of slice 2/3 are to be built" in result.output  # Shards 2 and 5, and no held-out one.
    assert "built 2 shards of slice 2/3" in result.output
    assert "has 2 of 8 shards: 6 still missing, of other slices or failed" in result.output
    assert not (ds / "root.json").exists()
    again = run("ingest", job, "--engine", "local", "--slice", "2/3")
    assert (again.exit_code, "nothing to build: no shard of slice 2/3 is missing" in again.output) == (0, True)
    report = json.loads(run("ingest", job, "--engine", "local", "--slice", "3/3", "--json").stdout)
    assert (report["n_built"], report["n_committed"]) == (3, 5)
    last = run("ingest", job, "--engine", "local", "--slice", "1/3")
    assert "has 8 of 8 shards: it is whole" in last.output
    assert contents(ds) == reference
    assert actlake.open(ds).complete
    assert (ds / "root.json").exists()


def test_ray_takes_no_slice(write_job: Write, tmp_path: Path) -> None:
    result = run("ingest", write_job(), "--slice", "1/2")
    assert result.exit_code == 2
    assert "add --engine local, or leave --slice out" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


def test_a_wrong_slice_is_refused_before_anything_is_made(write_job: Write, tmp_path: Path) -> None:
    result = run("ingest", write_job(), "--engine", "local", "--slice", "9/8")
    assert (result.exit_code, "there is no slice 9 of 8" in result.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.slow
@pytest.mark.parametrize("slices", [("0/1", "1/1"), ("0/2", "1/2")], ids=["the same", "different"])
@pytest.mark.parametrize("prepared", [True, False])
def test_processes_that_race_on_one_folder_leave_what_one_alone_does(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], slices: tuple[str, str], prepared: bool
) -> None:
    job = write_job()
    if prepared:
        assert run("prepare", job).exit_code == 0
    command = [sys.executable, "-m", "actlake.jobs.cli", "ingest", str(job), "--engine", "local", "--slice"]
    racing = [subprocess.Popen([*command, one], stdout=subprocess.PIPE, text=True) for one in slices]
    said = [process.communicate(timeout=400)[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0], said
    assert contents(tmp_path / "ds") == reference
    assert any("it is whole" in text for text in said)
    assert actlake.open(tmp_path / "ds").complete
    assert sorted(path.name for path in tmp_path.rglob(".actlake-*")) == []
