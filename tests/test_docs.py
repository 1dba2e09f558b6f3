"""The README and the documents say what is true: their commands, code, links and names are checked against the code."""

import json
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fakes import make_data_demo

from actlake.jobs.cli import cluster, corpus, demo, ingest, plan, query, report, sql, stats, store, verify  # noqa: F401 - each registers
from actlake.jobs.cli.app import app
from actlake.jobs.jobfile import parse_job
from actlake.storage import errors
from actlake.storage.corpus import Corpus
from actlake.storage.hookpoints import STREAMS, expand

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/*.md", "infra/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

_FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:storage|ingest|shards|jobs|examples|benchmarks|docs|tests|infra|src)/[\w./-]+\.\w+)`")
_ERROR = re.compile(r"`([A-Z]\w*Error)`")
#: What the `format` fields say: no commands.
_FORMATS = ("actlake dataset", "actlake corpus")
_MODULE = re.compile(r"`(actlake(?:\.\w+)+)`")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return [code for info, code in _FENCE.findall(text) if info.strip().split(" ")[0] == language]


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each shell command of a page: fenced as sh or console, or `actlake ...` in a line."""
    for code in blocks(text, "sh") + blocks(text, "console"):
        for line in code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.strip().removeprefix("$ "), comments=True):
                yield words
    for code in re.findall(r"`(actlake [^`]+)`", prose(text)):
        if code not in _FORMATS:
            yield shlex.split(code)


def check_command(words: list[str]) -> None:
    """Raise where a command is not one that this repository offers."""
    program, *rest = words
    if program == "actlake":
        parse_command_line(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"no make target in {words}"
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"no script {rest[0]}"
        for option in (word for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in (ROOT / rest[0]).read_text(), f"{rest[0]} has no option {option}"
    else:
        assert words[:3] == ["pip", "install", "-e"], f"an unknown program: {words}"
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[a-z0-9]+", words[3].removeprefix("."))) <= set(known), f"no such extra in {words}"


def parse_command_line(words: list[str]) -> None:
    """Parse arguments as ``actlake`` does, to the last option of the subcommand, without running it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
        if not words:  # a bare `actlake ingest` in a sentence names the command
            return
    command.make_context(name, words)


# --- commands -----------------------------------------------------------------------------------------------------


@every_page
def test_every_command_exists(page: Path) -> None:
    for words in commands(page.read_text()):
        check_command(words)


def test_the_readme_shows_every_command_of_the_command_line() -> None:
    group: Any = typer.main.get_command(app)
    shown = {words[1] for words in commands((ROOT / "README.md").read_text()) if words[0] == "actlake"}
    assert shown == set(group.commands)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("actlake ingest job.toml --frobnicate", "No such option"),
        ("actlake frobnicate data/demo", "no command"),
        ("actlake head data/demo -n none", "valid int"),
        ("actlake show a b", "unexpected extra argument"),
        ("make frobnicate", "no make target"),
        ("python benchmarks/frobnicate.py", "no script"),
        ("python benchmarks/bench_ingest.py --frobnicate", "has no option"),
        ("pip install -e '.[frobnicate]'", "no such extra"),
        ("frobnicate", "unknown program"),
    ],
)
def test_a_wrong_command_would_be_found(line: str, message: str) -> None:
    words = next(commands(f"```sh\n{line}  # a comment\n```\n"))
    with pytest.raises(Exception, match=message):
        check_command(words)


# --- code and job files -------------------------------------------------------------------------------------------


@pytest.fixture
def data_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Go to a folder with a `data/demo` of formulas, as wide and as split as the real one."""
    monkeypatch.chdir(tmp_path)
    return make_data_demo()


def test_the_python_of_the_page_on_streaming_runs(data_demo: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in blocks((ROOT / "docs" / "streaming.md").read_text(), "python"):
        exec(compile(code, "docs/streaming.md", "exec"), names)
        names.setdefault("first", names["batch"])
    assert (names["x"].dtype, tuple(names["x"].shape)) == (torch.float32, (2048, 640))
    assert len(json.dumps(names["state"])) < 4096
    resumed, kept_on = next(iter(names["again"])), next(iter(names["ds"].stream("layers.9.resid_post")))
    assert not set(resumed.row.tolist()) & set(names["first"].row.tolist())
    assert len(kept_on) == 4096
    assert int(next(iter(names["late"].stream("layers.9.resid_post", batch_size=512))).position.min()) >= 4


def test_the_readmes_python_runs_as_it_is(data_demo: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["ds"].n_rows > 4096
    assert (names["x"].dtype, tuple(names["x"].shape)) == (torch.bfloat16, (4096, 640))
    batch = names["batch"]
    assert torch.equal(names["x"], names["ds"].tensor("layers.9.resid_post", batch.row.numpy()))
    assert names["rows"].shape == (100, 640)
    assert tuple(names["held_out"].shape) == (100, 640)
    assert names["mean"].shape == (640,)
    assert f"torch.Size([4096, 640]) {batch.row[:4]} {batch.token_id[:4]}" in capsys.readouterr().out


@every_page
def test_every_job_file_parses(page: Path) -> None:
    for code in blocks(page.read_text(), "toml"):
        job = parse_job(tomllib.loads(code))
        if job.hook_points is not None:
            assert expand(job.hook_points, [f"layers.{layer}.{stream}" for layer in range(18) for stream in STREAMS])


def test_the_readmes_job_file_is_the_demo() -> None:
    (code,) = blocks((ROOT / "README.md").read_text(), "toml")
    demo_job = tomllib.loads((ROOT / "examples/demo.toml").read_text())
    assert parse_job(tomllib.loads(code)) == parse_job(demo_job)


# --- links and names ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return what links into a page may end with, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(prose(text)):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_would_be_found() -> None:
    text = "[a](docs/none.md) [b](docs/format.md#none) [c](docs/glossary.md#what-is-stored) [d](https://example.org)"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/format.md#none"]


@every_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    assert [name for name in _FILE.findall(prose(page.read_text())) if not (ROOT / name).exists()] == []


@every_page
def test_every_error_that_is_named_is_raised_by_us(page: Path) -> None:
    assert [name for name in _ERROR.findall(prose(page.read_text())) if not hasattr(errors, name)] == []


@every_page
def test_every_dotted_name_exists(page: Path) -> None:
    for dotted in _MODULE.findall(prose(page.read_text())):
        pkgutil.resolve_name(dotted)


def glossary() -> dict[str, str]:
    """Return the glossary's nouns that are names in the code, with the dotted name of each."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([\w.]+)` \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    return dict(rows)


def test_the_glossarys_nouns_are_names_in_the_code() -> None:
    found = glossary()
    expected = {"HookPoint", "Document", "TokenSequence", "Corpus", "DatasetSpec", "ShardRecord", "Manifest"}
    assert set(found) == expected | {"ActivationDataset", "ActivationStream", "TokenBatch"}
    for noun, dotted in found.items():
        assert pkgutil.resolve_name(dotted).__name__ == noun


def test_the_readmes_nouns_are_those_of_the_glossary() -> None:
    table = (ROOT / "README.md").read_text().partition("## The nouns")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", table, re.MULTILINE)) <= set(glossary())


def test_the_readme_keeps_its_order() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert headings == [
        "Two commands",
        "Ten lines of Python",
        "The nouns",
        "The flow",
        "Job file and command line",
        "What it is not",
        "Measured",
        "Licence",
    ]
