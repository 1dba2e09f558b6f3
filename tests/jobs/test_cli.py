"""The command line on a tiny model: what each command prints, and the exit codes."""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import demo, ingest, query  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.jobfile import LayoutOptions, RunOptions, parse_job, read_job

Write = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dataset(write_job: Write, tmp_path: Path) -> Path:
    result = run("ingest", write_job(max_rows=300), "--engine", "local")
    assert result.exit_code == 0, result.output
    return tmp_path / "ds"


def flip(path: Path, offset: int = 20) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_ingest_reports_and_then_has_nothing_to_do(write_job: Write, tmp_path: Path) -> None:
    first = run("ingest", write_job(), "--engine", "local")
    assert first.exit_code == 0
    assert "875 rows in 8 shards" in first.output
    assert "train shard 5: 60 rows" in first.output
    assert "compressed" in first.output
    again = run("ingest", write_job(), "--engine", "local", "--json")
    assert json.loads(again.stdout)["n_built"] == 0
    assert "nothing to build" in run("ingest", write_job(), "--engine", "local").output


def test_bad_input_is_one_message_and_exit_code_2(write_job: Write, tmp_path: Path) -> None:
    path = write_job()
    path.write_text(path.read_text().replace("max_rows", "max_row"))
    result = run("ingest", path)
    assert result.exit_code == 2
    assert "unknown key 'max_row'; did you mean 'max_rows'?" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "ds").exists()
    assert run("show", tmp_path / "nothing").exit_code == 2
    assert run("ingest", write_job(), "--engine", "spark").exit_code == 2


def test_a_shard_that_cannot_be_built_gives_exit_code_1(write_job: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from actlake.ingest.build import ShardBuilder

    def failing(*_: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(ShardBuilder, "build", failing)
    result = run("ingest", write_job(), "--engine", "local")
    assert result.exit_code == 1
    assert "8 of 8 shards could not be built" in result.output
    assert "OSError: planted" in result.output


def test_init_writes_a_job_that_parses_and_is_not_overwritten(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "new.toml"
    assert run("init", tiny_model, "-o", path).exit_code == 0
    job = read_job(path)
    assert (job.model, job.hook_points, job.corpus.context_length) == (str(tiny_model), ("layers.1.resid_post",), 256)
    text = path.read_text()
    # What is commented out is known and, but for what has no default, the default.
    full = tomllib.loads(re.sub(r"^# (?!preset)(\w+ = )", r"\1", text, flags=re.MULTILINE))
    parsed = parse_job(full)
    assert set(full["layout"]) | {"rows_per_block"} == {item.name for item in fields(LayoutOptions)}
    assert set(full["run"]) == {item.name for item in fields(RunOptions)}
    assert parsed.capture == job.capture
    assert (parsed.layout.shard_memory, parsed.layout.order, parsed.layout.codec) == (2**34, "shuffled", "blosc")
    assert (parsed.corpus.text_field, parsed.corpus.holdout, parsed.seed) == ("text", 0.005, 0)
    assert (parsed.run.device, parsed.run.attempts) == (job.run.device, job.run.attempts)
    again = run("init", tiny_model, "-o", path)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert run("init", tiny_model, "-o", path, "--force").exit_code == 0


def test_points_shows_widths(tiny_model: Path) -> None:
    result = run("points", tiny_model)
    assert result.exit_code == 0
    assert "attn_z" in result.output
    listed = json.loads(run("points", tiny_model, "--json").stdout)
    assert listed["layers"] == 3
    assert listed["hook_points"]["layers.2.attn_z"] == {"width": 48, "nbytes_per_token": 96}
    assert len(listed["hook_points"]) == 21
    assert run("points", "no/such-model").exit_code == 2


def test_ls_finds_datasets_splits_and_corpora(dataset: Path) -> None:
    entries = json.loads(run("ls", dataset.parent, "--json").stdout)
    kinds = {entry["kind"]: entry for entry in entries}
    assert set(kinds) == {"dataset", "heldout", "corpus"}
    assert kinds["dataset"]["n_rows"] == 300
    assert kinds["dataset"]["complete"] == 1.0
    assert run("ls", dataset.parent).exit_code == 0
    empty = dataset.parent / "empty"
    empty.mkdir()
    assert run("ls", empty).exit_code == 2


def test_show_has_the_numbers_of_the_manifest(dataset: Path) -> None:
    shown = json.loads(run("show", dataset, "--json").stdout)
    ds = actlake.open(dataset)
    assert shown["n_rows"] == 300
    assert shown["complete"]
    assert shown["nbytes"] == ds.reader.manifest.nbytes
    assert set(shown["hook_points"]) == set(ds.hook_points)
    for point in shown["hook_points"].values():
        assert point["ratio"] == pytest.approx(300 * 2 * point["width"] / point["nbytes"])
    text = run("show", dataset).output
    assert "300 rows in 3 shards of 128" in text
    assert "layers.1.attn_z" in text


def test_head_shows_the_tokens_of_the_rows(dataset: Path) -> None:
    rows = json.loads(run("head", dataset, "-n", "5", "--start", "130", "--json").stdout)
    ds = actlake.open(dataset)
    assert [row["row"] for row in rows] == [130, 131, 132, 133, 134]
    for row in rows:
        assert row["token_id"] == ds["rows/token_id"][row["row"]]
        assert row["token"].strip() == f"word{row['token_id'] - 4}"
    assert run("head", dataset).exit_code == 0


def test_verify_is_clean_then_names_the_damage_and_repairs(dataset: Path, write_job: Write) -> None:
    clean = run("verify", dataset)
    assert clean.exit_code == 0
    assert "verify: train is whole: 3 shards" in clean.output
    assert "verify: heldout is whole" in clean.output
    flip(dataset / "arrays/layers.1.attn_z/c/1/0")
    damaged = run("verify", dataset)
    assert damaged.exit_code == 2
    assert "shard 1, layers.1.attn_z, chunk 0" in damaged.output.replace("\n", " ")
    assert "expected 0x" in damaged.output
    assert run("verify", dataset, "--repair", "--json").exit_code == 2
    assert actlake.open(dataset).missing_shards == [1]
    assert "INCOMPLETE" in run("show", dataset).output
    assert "1 shards missing" in run("verify", dataset).output
    assert run("ingest", write_job(max_rows=300), "--engine", "local").exit_code == 0
    assert run("verify", dataset).exit_code == 0


def test_help_and_version() -> None:
    text = run("--help").output
    for command in ("ingest", "init", "points", "ls", "show", "head", "verify", "demo"):
        assert command in text
        assert run(command, "--help").exit_code == 0
    assert actlake.__version__ in run("--version").output
