"""``actlake plan`` and the plan before a run, against datasets that are really built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Recorder
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import plan  # noqa: F401 - registers its command
from actlake.jobs.cli.app import app
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.jobs.plan.sample import measure_sample
from actlake.storage.errors import JobFileError

Write = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def planned(*arguments: str | Path) -> dict[str, Any]:
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def add(job: Path, text: str) -> Path:
    job.write_text(job.read_text() + text)
    return job


def test_a_job_or_a_release_is_planned(write_job: Write) -> None:
    result = run("plan", write_job(), "--release", "gemma-scope-2")
    assert (result.exit_code, "leave one of them out" in result.output) == (2, True)


OF_JOBS = (["--by-layer"], ["--sample", "128"], ["--sample", "0"], ["--offline"])


@pytest.mark.parametrize("option", OF_JOBS, ids=" ".join)
def test_options_of_a_job_are_refused_for_a_release(option: list[str]) -> None:
    result = run("plan", "--release", "gemma-scope-2", *option)
    assert result.exit_code == 2
    assert f"{option[0]} is for a job: leave it out, or give a job file in place of --release" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("option", "key"),
    [(["--tokens-base", "8e9"], "max_rows"), (["--tokens-chat", "0"], "max_rows"), (["--dtype", "x"], "capture.dtype")],
    ids=str,
)
def test_options_of_a_release_are_refused_for_a_job(write_job: Write, option: list[str], key: str) -> None:
    result = run("plan", write_job(), *option)
    assert result.exit_code == 2
    assert f"{option[0]} is for --release: leave it out; {key} in " in result.stderr


def test_a_sample_is_not_taken_offline(write_job: Write) -> None:
    result = run("plan", write_job(), "--sample", "128", "--offline")
    assert (result.exit_code, "leave one of them out" in result.stderr) == (2, True)


def test_a_job_of_one_shard_is_told_in_the_singular_and_nothing_that_changes_nothing(write_job: Write) -> None:
    # All streams of all layers of the 27B: 4,096 rows fit the memory of a shard, and there are 700.
    job = write_job(model='"google/gemma-3-27b-pt"', hook_points='["layers.*.*"]', holdout=0.0)
    job.write_text(job.read_text().replace("rows_per_shard = 128\nrows_per_chunk = 32\n", ""))
    result = run("plan", job, "--offline", "--machine", "a3-ultragpu-8g")
    assert result.exit_code == 0, result.output
    assert "in 1 shard of 2,048 rows" in result.output
    assert "passes" not in result.output
    more = job.read_text().replace("max_rows = 700", "max_rows = 100_000")
    job.write_text(more)
    assert "passes: shards of" in run("plan", job, "--offline", "--machine", "a3-ultragpu-8g").output


def test_a_plan_with_the_corpus_counts_what_the_run_then_makes(write_job: Write, tmp_path: Path) -> None:
    # 300 rows a shard: at most four shards a split, so that the padding of each is laid out.
    job = write_job(max_rows=1_000_000, rows_per_shard=320)
    ingest(read_job(job), engine="local")
    parts = [actlake.open(str(tmp_path / "ds")), actlake.open(str(tmp_path / "ds/heldout"))]
    found = planned(job)
    assert found["n_rows"] == {part.spec.split: part.n_rows for part in parts}
    assert found["n_rows_left"] == 0
    files = [path for path in (tmp_path / "ds").rglob("*") if path.is_file()]
    in_shards = [path for path in files if {"c", "commits", "stats"} & {part.name for part in path.parents}]
    assert found["n_objects"] == len(in_shards)
    assert found["n_shards"] == sum(len(part.reader.manifest.shards) for part in parts)
    stored = sum(part.reader.manifest.nbytes for part in parts)
    assert found["nbytes"] == pytest.approx(stored, rel=0.1)
    raw = sum(part.n_rows * part.spec.nbytes_per_row for part in parts)
    assert found["raw_nbytes"] == raw
    run_tokens = sum(record.provenance.n_tokens for part in parts for record in part.reader.manifest.records())
    assert found["tokens"]["run"] == pytest.approx(run_tokens, rel=0.02)
    assert found["tokens"]["straddling"] > 0
    assert "committed rows" in found["ratios_from"]


def test_a_plan_before_the_corpus_writes_nothing_and_is_near(write_job: Write, tmp_path: Path) -> None:
    job = write_job(max_rows=1_000_000)
    found = planned(job)
    assert "their first megabyte tokenised" in found["known_from"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.toml"]
    ingest(read_job(job), engine="local")
    rows = sum(planned(job)["n_rows"].values())
    assert sum(found["n_rows"].values()) == pytest.approx(rows, rel=0.05)


def test_a_gated_model_and_absent_sources_can_be_planned(write_job: Write) -> None:
    job = write_job(model='"google/gemma-3-27b-pt"', hook_points='["layers.*.resid_post"]', rows_per_shard=16_384)
    job.write_text(job.read_text().replace("/*.txt", "/absent/*.txt"))
    found = planned(job, "--machine", "a3-ultragpu-8g", "--machines", "2")
    assert found["n_rows"]["train"] == 700
    assert "sources cannot be listed" in found["known_from"]
    assert (found["machine"]["count"], found["machine"]["n_gpus"]) == (2, 8)
    assert "max_rows (offline)" in planned(job, "--offline", "--machine", "a3-ultragpu-8g")["known_from"]
    job.write_text(job.read_text().replace("max_rows = 700\n", ""))
    refused = run("plan", job)
    assert refused.exit_code == 2
    assert "give max_rows" in refused.output


def test_the_page_shows_every_part(write_job: Write) -> None:
    result = run("plan", write_job(), "--machine", "a3-highgpu-8g", "--spot", "--by-layer", "--nic", "10GB")
    assert result.exit_code == 0, result.output
    for part in ("rows", "objects", "run twice", "memory", "NIC 10.0 GB/s", "layers.1.attn_z", "GPU-hours, idle"):
        assert part in result.output
    for part in ("Binding", "class A", "class B", "store or recompute", "cheapest change", "spot"):
        assert part in result.output


def test_the_release_is_printed_by_model_and_stream() -> None:
    arguments = ("--release", "gemma-scope-2", "--tokens-base", "8e9", "--tokens-chat", "3e9", "--dtype", "float32")
    shown = run("plan", *arguments)
    assert shown.exit_code == 0, shown.output
    assert "gemma-scope-2: 110.2 PB in float32; actlake's defaults store" in shown.output
    assert shown.output.count("resid_post") == 10
    value = planned(*arguments)
    assert value["nbytes"] == 2_503_680 * 4 * 11_000_000_000
    assert value["stored"] == sum(made["nbytes"] for made in value["plans"])
    wide = planned(*arguments, "--shard-memory", "128GiB")
    assert [made["rows_per_shard"] for made in wide["plans"]][4] == 32_768
    over = run("plan", *arguments, "--shard-memory", "256GiB", "--json")
    assert over.exit_code == 2
    assert [made["rows_per_shard"] for made in json.loads(over.stdout)["plans"]][4] == 65_536
    assert "the release does not fit a3-ultragpu-8g, which has 2,952.0 GiB; lower --shard-memory" in over.stderr
    assert over.stderr.count("worker(s) would take") == 2
    assert run("plan").exit_code == 2


def test_a_corpus_without_rows_is_planned_as_nothing(write_job: Write) -> None:
    job = write_job()
    ingest(read_job(job), engine="local")
    job.write_text(job.read_text().replace("batch_tokens = 256", "batch_tokens = 256\nskip_first = 200"))
    job.write_text(job.read_text().replace("/ds", "/other"))
    found = planned(job)
    assert (found["n_rows"], found["nbytes"], found["n_shards"]) == ({}, 0, 0)
    assert run("plan", job).exit_code == 0


def test_a_run_prints_its_plan_first_and_nothing_when_all_is_there(write_job: Write) -> None:
    job, listener, again = read_job(write_job()), Recorder(), Recorder()
    ingest(job, engine="local", listener=listener)
    (note,) = (note for note in listener.notes if note.startswith("plan: "))
    assert "875 rows in 8 shards" in note
    ingest(job, engine="local", listener=again)
    assert not any(note.startswith("plan: ") for note in again.notes)


def test_a_run_over_its_budget_is_refused_before_it_writes(write_job: Write, tmp_path: Path) -> None:
    job = add(write_job(), '[budget]\nmax_bytes = "100 kB"\n')
    with pytest.raises(JobFileError, match=r"budget.max_bytes is 100,000; max_rows = \d+ fits") as refused:
        ingest(read_job(job), engine="local")
    assert not (tmp_path / "ds").exists()
    assert run("plan", job).exit_code == 2
    n_rows = str(refused.value).partition("max_rows = ")[2].partition(" ")[0]
    job.write_text(job.read_text().replace("max_rows = 700", f"max_rows = {n_rows}"))
    ingest(read_job(job), engine="local")
    assert actlake.open(str(tmp_path / "ds")).n_rows == int(n_rows.replace("_", ""))


def test_a_run_that_does_not_fit_the_memory_is_refused(write_job: Write, tmp_path: Path) -> None:
    job = add(write_job(), '[plan]\nmemory = "100 MB"\n')
    with pytest.raises(JobFileError, match=r"1 worker\(s\) would take .* this machine has 0.1 GiB"):
        ingest(read_job(job), engine="local")
    assert not (tmp_path / "ds").exists()


def test_a_sample_measures_the_ratios_of_the_stored_rows(write_job: Write, tmp_path: Path) -> None:
    job = write_job(rows_per_shard=512)
    found = measure_sample(read_job(job), 512)
    assert not (tmp_path / "ds").exists()
    assert found.tokens_per_s is not None
    assert found.tokens_per_s > 0
    ingest(read_job(job), engine="local")
    ds = actlake.open(str(tmp_path / "ds"))
    stored = ds.reader.manifest.nbytes_by_array()
    for name in ds.hook_points:
        raw = ds.n_rows * ds.spec.arrays()[name].nbytes_per_row
        assert found.ratios[name] == pytest.approx(raw / stored[name], rel=0.1)
    assert "a sample of" in planned(job, "--sample", "128")["ratios_from"]
