"""`actlake prepare`: all that needs a network is done once, and what comes after it needs none."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import contents
from typer.testing import CliRunner

from actlake.jobs.cli import corpus as _corpus  # noqa: F401 - registers its commands
from actlake.jobs.cli import ingest as _registers  # noqa: F401
from actlake.jobs.cli.app import app
from actlake.jobs.preparing import compute_command

Write = Callable[..., Path]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return every file's time of change and digest."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_prepare_makes_all_but_the_shards_and_says_what_comes_next(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], tiny_model: Path
) -> None:
    job = write_job()
    result = run("prepare", job)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "ds") == {
        key: value for key, value in reference.items() if key.endswith(("spec.json", "zarr.json"))
    }
    (corpus,) = (tmp_path / "corpora").iterdir()
    assert [path.name for path in corpus.glob("rows/*/*")]
    assert f"HF_HUB_OFFLINE=1 actlake ingest {job} --engine local --slice $SLURM_ARRAY_TASK_ID" in result.output
    assert "875 rows in 8 shards, 8 to build" in result.output
    before = files(tmp_path)
    report = json.loads(run("prepare", job, "--json").stdout)
    assert files(tmp_path) == before
    assert report["weights"] == str(tiny_model)
    assert report["command"] == compute_command(job)
    assert (report["n_rows"], report["n_shards"], report["n_missing"]) == (875, 8, 8)
    # What is prepared is what ingest would have made, to the last file.
    assert run("ingest", job, "--engine", "local").exit_code == 0
    after = files(tmp_path)
    assert {key: after[key] for key in before} == before
    assert contents(tmp_path / "ds") == reference


def test_a_login_node_needs_no_gpu(write_job: Write, tmp_path: Path) -> None:
    path = write_job()
    path.write_text(path.read_text() + 'device = "cuda"\n')
    assert run("prepare", path).exit_code == 0
    result = run("ingest", path, "--engine", "local")
    assert (result.exit_code, "torch finds no GPU here" in result.output) == (2, True)


def test_an_address_wants_the_engine_that_has_one(write_job: Write, tmp_path: Path) -> None:
    for command in (["prepare"], ["corpus", "build", "--engine", "local"]):
        result = run(*command, write_job(), "--address", "head:6379")
        assert (result.exit_code, "give --engine ray, or leave --address out" in result.output) == (2, True)
        assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


def test_replies_need_the_jobs_device_when_the_corpus_is_built(write_job: Write, tmp_path: Path) -> None:
    path = write_job()
    text = path.read_text().replace("[layout]", "replies = {}\n[layout]")
    path.write_text(text + 'device = "cuda"\n')
    result = run("prepare", path)
    assert (result.exit_code, "torch finds no GPU here" in result.output) == (2, True)
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('device = "cuda:2"', "run.device = 'cuda:2' with run.gpus_per_worker = 1 wants 3 GPUs, torch finds 2 here"),
        ("gpus_per_worker = 4", "run.gpus_per_worker = 4 wants 4 GPUs, torch finds 2 here; ask for more, or lower it"),
    ],
)
def test_more_gpus_than_there_are_are_refused_before_anything_is_made(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    path = write_job()
    path.write_text(path.read_text() + line + "\n")
    result = run("ingest", path, "--engine", "local")
    assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output
    assert [item.name for item in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.parametrize(("memory", "message"), [('"1MB"', "worker(s) would take"), ('"100GB"', None)])
def test_a_model_too_big_for_the_machine_is_refused_before_its_shards(
    write_job: Write, tmp_path: Path, memory: str, message: str | None
) -> None:
    path = write_job()
    path.write_text(path.read_text() + f"[plan]\nmemory = {memory}\n")
    assert run("prepare", path).exit_code == 0  # The login node's memory is not the compute nodes'.
    result = run("ingest", path, "--engine", "local", "--slice", "1/8")
    assert result.exit_code == (2 if message else 0), result.output
    assert message is None or message in result.output
    assert bool(list((tmp_path / "ds").glob("commits/*/*"))) == (message is None)


# --- Without a network --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path) -> Path:
    """Return a cache of the Hub as ``snapshot_download`` leaves it, with the tiny model as someone/tiny."""
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hf"
    repository = home / "hub/models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for path in tiny_model.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return home


def without_network(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command where there is no network interface; skips where that is not allowed."""
    alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    return subprocess.run(
        [*alone, *command], capture_output=True, text=True, timeout=400, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("model", ["folder", "someone/tiny"])
def test_after_prepare_an_ingestion_needs_no_network(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], hub: Path, model: str
) -> None:
    job = write_job() if model == "folder" else write_job(model=f'"{model}"')
    environment = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "ACTLAKE_CACHE": str(tmp_path / "cache")}
    actlake = [sys.executable, "-m", "actlake.jobs.cli"]
    # Prepared offline too: there is no Hub here, and what it would fetch is in the cache.
    prepared = subprocess.run(
        [*actlake, "prepare", str(job)], capture_output=True, text=True, timeout=400, env=os.environ | environment
    )
    assert prepared.returncode == 0, prepared.stderr
    done = without_network([*actlake, "ingest", str(job), "--engine", "local", "--slice", "1/1"], environment)
    assert done.returncode == 0, done.stderr
    assert "it is whole" in done.stdout
    found = contents(tmp_path / "ds")
    if model == "folder":
        assert found == reference
    else:
        # Another name and revision of the model: other ids, the same activations.
        assert set(found) == set(reference)
        arrays = [key for key in reference if "/c/" in key]
        assert arrays
        assert {key: found[key] for key in arrays} == {key: reference[key] for key in arrays}


def test_sources_that_cannot_be_reached_are_not_needed_again(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], documents: str
) -> None:
    job, folder = write_job(), Path(documents).parent
    assert run("prepare", job).exit_code == 0
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        assert run("ingest", job, "--engine", "local").exit_code == 0
    finally:
        hidden.rename(folder)
    assert contents(tmp_path / "ds") == reference
