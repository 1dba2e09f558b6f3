"""Looking at datasets: `ls`, `show`, `head`, `diff`, the catalogue, and what is said of places without a dataset."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from formula_dataset import NARROW, WIDE, Made, make_spec
from labelled import Labelled, make_labelled
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import query, sql, verify  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.cli.options import parse_options
from actlake.jobs.cli.query import format_age, format_grid, format_layers, format_share
from actlake.storage.errors import BadInputError, NotFoundError
from actlake.storage.manifest import uncommit
from actlake.storage.rowspace import KeepRule


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return make_labelled(tmp_path_factory.mktemp("lake"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def cells(output: str, key: str) -> list[str]:
    """Return the words of the line that has a word."""
    (line,) = [line for line in output.splitlines() if key in line.split()]
    return line.split()


# --- ls and the catalogue ------------------------------------------------------------------------------------------


def test_the_catalogue_is_a_table_of_what_lies_below(labelled: Labelled) -> None:
    root, spec = Path(labelled.ds.url).parent, labelled.ds.spec
    table = actlake.catalog(root)
    (dataset,) = table.filter(pc.field("kind") == "dataset").to_pylist()
    newest = max(labelled.ds.manifest["finished"].to_pylist())
    assert abs(dataset.pop("updated") - datetime.fromisoformat(newest)) < timedelta(milliseconds=1)
    assert dataset == {
        "kind": "dataset",
        "url": labelled.ds.url,
        "model": "formula",
        "n_rows": 230,
        "n_planned": 230,
        "complete": True,
        "n_layers": 2,
        "streams": ["attn_z", "resid_post"],
        "n_hook_points": 2,
        "nbytes": labelled.ds.reader.manifest.nbytes,
        "dataset_id": spec.dataset_id,
        "row_space_id": spec.row_space_id,
        "corpus_id": spec.corpus_id,
        "note": "",
    }
    (corpus,) = table.filter(pc.field("kind") == "corpus").to_pylist()
    assert corpus["url"] == labelled.corpus.store.url
    assert corpus["n_rows"] == sum(split.n_tokens for split in labelled.corpus.splits.values())
    assert corpus["corpus_id"] == labelled.corpus.corpus_id
    assert actlake.catalog(root / "texts").num_rows == 0


def test_ls_shows_layers_by_streams_share_and_age(labelled: Labelled) -> None:
    root = Path(labelled.ds.url).parent
    listed = run("ls", root).output
    words = cells(listed, labelled.ds.url)
    # Two points of a grid of two layers and two streams.
    assert words[:3] == ["dataset", labelled.ds.url, "formula"]
    assert " 230 " in listed
    assert " 2 x 2 (2) " in listed
    assert "100%" in words
    assert words[-1] in ("s", "min", "h")
    assert f"{labelled.ds.reader.manifest.nbytes / 1000:.1f} kB" in listed
    found = {entry["kind"]: entry for entry in json.loads(run("ls", root, "--json").stdout)}
    assert found["dataset"]["share"] == 1.0
    assert found["dataset"]["streams"] == ["attn_z", "resid_post"]
    assert run("ls", root / "texts").exit_code == 2


def test_a_half_made_dataset_is_never_called_complete(tmp_path: Path) -> None:
    # One row of 2,049 is missing: 99.95 %.
    made = Made(str(tmp_path / "ds"), n_rows=256 * 8 + 1).build(*range(8))
    listed = run("ls", tmp_path).output
    assert "99.9%" in listed
    assert "100%" not in listed
    shown = run("show", made.url).output
    assert "INCOMPLETE: 99.9% of 2,049 rows planned, 1 shards missing" in shown
    assert "complete" not in shown
    summary = json.loads(run("show", made.url, "--json").stdout)
    assert (summary["complete"], summary["missing_shards"], summary["n_shards_missing"]) == (False, [8], 1)
    entry = json.loads(run("ls", tmp_path, "--json").stdout)[0]
    assert (entry["complete"], entry["share"]) == (False, pytest.approx(2048 / 2049, abs=1e-3))
    assert entry["share"] < 1
    html = made.open()._repr_html_()
    assert "incomplete: 1 shards missing" in html


def test_a_dataset_without_commits_is_shown(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), n_rows=300)
    assert "0.0%" in run("ls", tmp_path).output
    shown = run("show", made.url)
    assert shown.exit_code == 0
    assert "INCOMPLETE: 0.0% of 300 rows planned, 2 shards missing" in shown.output


def test_a_newer_format_says_which_actlake_reads_it(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), n_rows=64).build(0)
    path = tmp_path / "ds/spec.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    for command in (["show", made.url], ["query", made.url, "SELECT 1"], ["diff", made.url, made.url]):
        result = run(*command)
        assert result.exit_code == 2
        assert "format version 99; this actlake reads 1, 2: pip install -U actlake" in result.output
    assert "format version 99" in run("ls", tmp_path).output


@pytest.mark.parametrize(
    ("share", "shown"), [(1.0, "100%"), (0.999, "99.9%"), (0.9999, "99.9%"), (0.5, "50.0%"), (0.0, "0.0%")]
)
def test_shares_are_rounded_down(share: float, shown: str) -> None:
    assert format_share(share) == shown


def test_grids_ages_and_layers() -> None:
    assert (format_grid(18, 3, 54), format_grid(18, 4, 21)) == ("18 x 3", "18 x 4 (21)")
    now = datetime(2026, 5, 1, tzinfo=UTC)
    ages = [timedelta(seconds=5), timedelta(minutes=3), timedelta(hours=30), timedelta(hours=2), timedelta(seconds=-1)]
    assert [format_age(now - age, now) for age in ages] == ["5 s", "3 min", "1 d", "2 h", "0 s"]
    assert format_age(None) == ""
    assert (format_layers([0, 1, 2, 5, 7, 8]), format_layers([])) == ("0-2, 5, 7-8", "")


# --- show and head -------------------------------------------------------------------------------------------------


def test_show_says_who_made_it_and_what_it_cost(labelled: Labelled) -> None:
    ds = labelled.ds
    summary = json.loads(run("show", ds.url, "--json").stdout)
    made, table = summary["provenance"], ds.manifest
    assert made["hosts"] == sorted(set(table["host"].to_pylist()))
    assert made["n_tokens"] == sum(table["n_tokens"].to_pylist())
    spans = [
        (datetime.fromisoformat(b) - datetime.fromisoformat(a)).total_seconds()
        for a, b in zip(table["started"].to_pylist(), table["finished"].to_pylist(), strict=True)
    ]
    assert made["worker_s"] == pytest.approx(sum(spans), abs=1e-3)
    nbytes = ds.reader.manifest.nbytes_by_array()
    assert summary["streams"]["attn_z"] == {
        "layers": [0],
        "nbytes": nbytes["layers.0.attn_z"],
        "ratio": pytest.approx(230 * 12 / nbytes["layers.0.attn_z"]),
    }
    assert summary["streams"]["rows"]["nbytes"] == sum(n for name, n in nbytes.items() if name.startswith("rows/"))
    text = run("show", ds.url).output
    assert "cost so far: 0.00 worker hours" in text
    assert f"with {', '.join(sorted(f'{k} {v}' for k, v in made['software'][0].items()))}" in text
    assert "../corpus" in text


def test_head_shows_labels_and_roles(labelled: Labelled) -> None:
    rows = json.loads(run("head", labelled.ds.url, "-n", "230", "--json").stdout)
    truth = {one.row: one for one in labelled.rows}
    assert [row["row"] for row in rows] == list(range(230))
    for row in rows:
        sequence = truth[row["row"]].sequence
        assert (row["token_id"], row["position"]) == (truth[row["row"]].token_id, truth[row["row"]].position)
        assert row["metadata"] == dict(sequence.metadata)
        assert (row["document"], row["role"]) == (sequence.document, "text")
    assert cells(run("head", labelled.ds.url, "-n", "3").output, "category")[-4:-1] == ["category", "safe", "turns"]


# --- diff ----------------------------------------------------------------------------------------------------------


def test_diff_of_aligned_datasets(tmp_path: Path) -> None:
    a = Made(str(tmp_path / "a"), n_rows=600).build_all()
    b = Made(str(tmp_path / "b"), n_rows=600, spec=make_spec(model="chat", model_fingerprint="1" * 64)).build(0, 2)
    found = json.loads(run("diff", a.url, b.url, "--json").stdout)
    assert (found["aligned"], found["alignment"], found["same_dataset_id"]) == (True, [], False)
    assert [line.split(":")[0] for line in found["spec"]] == ["model", "model_fingerprint"]
    assert found["shards"] == {"both": 2, "only_a": 1, "only_b": 0}
    assert (found["a"]["complete"], found["b"]["complete"]) == (True, False)
    text = run("diff", a.url, b.url).output
    assert "the rows line up" in text
    assert "model: here 'formula', there 'chat'" in text
    assert "shards: 2 in both, 1 only here, 0 only there" in text


def test_diff_names_what_decides_about_rows(tmp_path: Path) -> None:
    a = Made(str(tmp_path / "a"), n_rows=300).build_all()
    points = make_spec().hook_points[:1]
    other = make_spec(seed=5, keep=KeepRule(skip_first=2), hook_points=points)
    b = Made(str(tmp_path / "b"), n_rows=300, spec=other).build_all()
    found = json.loads(run("diff", a.url, b.url, "--json").stdout)
    assert not found["aligned"]
    assert [line.split(":")[0] for line in found["alignment"]] == ["keep", "seed"]
    assert found["hook_points"] == {"both": [NARROW], "only_a": [WIDE], "only_b": []}
    assert "the rows do not line up" in run("diff", a.url, b.url).output
    same = run("diff", a.url, a.url).output
    assert "the specs are the same" in same


# --- places without a dataset --------------------------------------------------------------------------------------


def test_a_place_without_a_dataset_says_what_is_there(labelled: Labelled, tmp_path: Path) -> None:
    root = Path(labelled.ds.url).parent
    bare = tmp_path / "bare"
    (bare / "arrays").mkdir(parents=True)
    corpora = tmp_path / "corpora"
    shutil.copytree(root / "corpus", corpora / "one")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    expected = {
        root: f"below it are datasets: {labelled.ds.url}",
        root / "corpus": f"it is a corpus: actlake corpus show {root / 'corpus'}",
        root / "data/arrays": f"it is arrays of the dataset {labelled.ds.url}",
        root / "data/arrays/rows/role": f"it is arrays/rows/role of the dataset {labelled.ds.url}",
        root / "texts/a.jsonl": "it is a file",
        corpora: f"below it are corpora: {corpora / 'one'}",
        bare: "it has arrays/ but no spec.json",
        tmp_path / "notes": "found there: a.txt",
        tmp_path / "absent": "found there: nothing",
        root / "dato": f"nothing is there; did you mean {root / 'data'}?",
    }
    for place, why in expected.items():
        for command, more in (("show", []), ("head", []), ("query", ["SELECT 1"]), ("diff", [place]), ("verify", [])):
            result = run(command, place, *more)
            assert result.exit_code == 2
            assert f"no dataset at {place}" in result.output
            assert why in result.output


def test_storage_options_are_read() -> None:
    assert parse_options(None) == {}
    assert parse_options(["anon=true", "n=3", "key=a=b", 'x="7"', '{"client_kwargs": {"region": "eu"}}']) == {
        "anon": True,
        "n": 3,
        "key": "a=b",
        "x": "7",
        "client_kwargs": {"region": "eu"},
    }
    for text in ("nonsense", "=3", "{broken"):
        with pytest.raises(BadInputError, match="storage-option"):
            parse_options([text])


# --- comfort -------------------------------------------------------------------------------------------------------


def test_every_query_command_has_json_and_storage_options() -> None:
    for command in ("ls", "show", "head", "query", "diff"):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert "--json" in text
        assert "--storage-option" in text


def test_the_shell_completes_commands() -> None:
    environment = {"_ACTLAKE_COMPLETE": "complete_bash", "COMP_WORDS": "actlake di", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'actlake'; from actlake.jobs.cli import main; main()"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["diff"]


def test_notebooks_show_datasets_manifests_and_streams(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "<b>x</b>&"), n_rows=600).build_all()
    ds = made.open()
    shown: Any = ds._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;&amp;" in shown
    assert "<b>x</b>" not in shown
    assert "600 of 600 in 3 shards" in shown
    assert ">complete<" in shown
    manifest: Any = ds.reader.manifest._repr_html_()
    assert f"{ds.reader.manifest.nbytes / 1e9:,.3f} GB in 6 arrays" in manifest
    stream = ds.stream([NARROW, WIDE], batch_size=64)
    next(iter(stream))
    delivered: Any = stream._repr_html_()
    assert f"2: {NARROW}, {WIDE}" in delivered
    assert "n_batches 1" in delivered


def test_what_was_un_committed_is_gone_from_everything(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), n_rows=600).build_all()
    uncommit(made.store, 1)
    (entry,) = actlake.catalog(tmp_path).to_pylist()
    assert (entry["n_rows"], entry["n_planned"], entry["complete"]) == (344, 600, False)
    with pytest.raises(NotFoundError):
        actlake.open(tmp_path)
