"""What the report says is what is stored: counted and computed again the slow and obvious way."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_dataset
from formula_dataset import Made, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from report_dataset import POINTS
from typer.testing import CliRunner

import actlake
from actlake.jobs.cli import report as _registers  # noqa: F401
from actlake.jobs.cli.app import app
from actlake.jobs.report.collect import collect
from actlake.jobs.report.documents import _aligned
from actlake.jobs.report.manifest_facts import _runs, split_facts
from actlake.jobs.report.page import SCRIPTS, embed, render
from actlake.jobs.report.sample import _edges, sample_rows
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> report_dataset.Made:
    made = report_dataset.make(tmp_path_factory.mktemp("report"))
    for shard in (0, 2, 3):
        made.train.build(shard)
    made.heldout.build(0)
    return made


@pytest.fixture(scope="module")
def contents(built: report_dataset.Made) -> Any:
    return collect(actlake.open(built.url))


# --- coverage and the run -----------------------------------------------------------------------------------------


def test_coverage_shows_each_gap_and_each_short_shard(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), 5 * 256 + 100).build(0, 1, 4, 5)
    facts = split_facts(made.open())
    assert [(run.start, run.stop, run.share) for run in facts.runs] == [(0, 2, 1.0), (2, 4, 0.0), (4, 6, 1.0)]
    assert (facts.n_shards, facts.n_shards_planned, facts.n_missing, facts.first_missing) == (4, 6, 2, [2, 3])
    grown = Made(made.url, 6 * 256).open()
    assert [(run.start, run.stop, run.share) for run in split_facts(grown).runs][-2:] == [(4, 5, 1.0), (5, 6, 0.391)]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.9996, 1.0]), min_size=1, max_size=60), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_runs_tile_the_shards_and_call_whole_only_what_is(shares: list[float], per_bin: int) -> None:
    runs = _runs(np.array(shares), per_bin)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(shares)
    for run in runs:
        inside = shares[run.start : run.stop]
        assert (run.share == 1.0) == all(share == 1.0 for share in inside)
        assert (run.share == 0.0) == all(share == 0.0 for share in inside)


def test_spans_are_the_shards_in_time(built: report_dataset.Made, contents: Any) -> None:
    tables = [actlake.open(built.url).manifest, actlake.open(f"{built.url}/heldout").manifest]
    assert sum(span.n_rows for span in contents.spans) == sum(sum(table["n_rows"].to_pylist()) for table in tables)
    assert [span.label for span in contents.spans if span.split == "train"] == ["shard 0", "shard 2", "shard 3"]
    assert all(
        span.rows_per_s == pytest.approx(1000 * span.n_rows / max(span.stop - span.start, 1)) for span in contents.spans
    )
    assert contents.provenance.n_undated == 0
    assert contents.provenance.n_tokens == sum(sum(table["n_tokens"].to_pylist()) for table in tables)


def test_a_long_run_is_binned_without_losing_rows(
    monkeypatch: pytest.MonkeyPatch, built: report_dataset.Made, contents: Any
) -> None:
    monkeypatch.setattr("actlake.jobs.report.manifest_facts._MAX_BINS", 3)
    found = collect(actlake.open(built.url), n_rows=0)
    assert sum(span.n_rows for span in found.spans) == sum(split.n_rows for split in found.splits)
    assert sum(span.n_shards for span in found.spans) == 4
    assert len(found.spans) <= 3
    first, last = min(span.start for span in contents.spans), max(span.stop for span in contents.spans)
    for span in found.spans:
        ended = [one for one in contents.spans if span.start - 0.01 <= one.stop <= span.stop + 0.01]
        assert span.stop - span.start == pytest.approx((last - first) / 3, abs=0.01)
        assert span.n_rows <= sum(one.n_rows for one in ended)
    assert found.spans[-1].stop == pytest.approx(last)


# --- norms and channels -------------------------------------------------------------------------------------------


def all_rows(built: report_dataset.Made, point: str) -> Any:
    ds = actlake.open(built.url)
    table = ds.manifest
    spans = zip(table["first_row"].to_pylist(), table["n_rows"].to_pylist(), strict=True)
    return np.concatenate([ds[point][first : first + n] for first, n in spans]).astype(np.float64)


@pytest.mark.parametrize("name", POINTS)
def test_points_agree_with_the_stored_rows(built: report_dataset.Made, contents: Any, name: str) -> None:
    point = next(point for point in contents.points if point.name == name)
    x = all_rows(built, name)
    norms = np.linalg.norm(x, axis=1)
    assert point.n_rows == len(x)
    assert point.norm_mean == pytest.approx(norms.mean(), rel=1e-12)
    assert point.norm_rms == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-12)
    assert point.mean_to_spread == pytest.approx(
        np.linalg.norm(x.mean(axis=0)) / np.sqrt(x.var(axis=0).sum()), rel=1e-9
    )
    energy = (x**2).mean(axis=0)
    expected = sorted(enumerate(energy / energy.sum()), key=lambda item: -item[1])[:8]
    assert [item.channel for item in point.channels] == [channel for channel, _ in expected]
    assert [item.share for item in point.channels] == pytest.approx([share for _, share in expected], rel=1e-9)
    assert point.exact_norms
    assert sum(point.histogram.counts) == len(x)
    assert point.quantiles[3] == pytest.approx(np.median(norms), rel=0.02)
    stored = sum(path.stat().st_size for path in Path(built.url, "arrays", name).glob("c/*/0"))
    assert point.nbytes == stored
    assert point.ratio == pytest.approx(2 * x.size / stored)


def test_the_map_of_channels_has_their_shares(built: report_dataset.Made, contents: Any) -> None:
    found = contents.channel_maps["resid_post"]
    assert found.layers == [0, 1, 2]
    for i, layer in enumerate(found.layers):
        energy = (all_rows(built, f"layers.{layer}.resid_post") ** 2).mean(axis=0)
        expected = [energy[channel] / energy.sum() for channel in found.channels]
        assert found.shares[i] == pytest.approx(expected, abs=1e-5)


def test_old_statistics_without_norms_fall_back_on_the_sample(golden: str) -> None:
    found = collect(actlake.open(golden))
    assert [point.exact_norms for point in found.points] == [False, False]
    for point in found.points:
        assert sum(point.histogram.counts) == found.mix.n_rows if point.histogram else False
        assert point.quantiles is not None
    render(found)


@pytest.fixture
def golden() -> str:
    return str(Path(__file__).parents[1] / "storage" / "data" / "format-v1")


# --- sampled rows -------------------------------------------------------------------------------------------------


def test_the_sample_leaves_void_rows_out_and_has_the_rows_norms(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), 868, voids=frozenset(range(10, 30))).build(0, 2, 3)
    ds = made.open()
    everything = sample_rows(ds, 10**6)
    assert everything.n_rows == 256 + 256 + 100 - 20
    for name, norms in everything.norms.items():
        rows = np.concatenate([made.rows_of(shard) for shard in (0, 2, 3)])
        kept = rows[~np.isin(rows, list(made.voids))]
        assert norms == pytest.approx(np.linalg.norm(made.values(name, kept).astype(np.float64), axis=1), rel=1e-6)
    assert sample_rows(ds, 64).n_rows == 64 - 20
    assert sample_rows(ds, 0).n_rows == 0


def test_the_position_profile_is_the_mean_over_each_bin(built: report_dataset.Made, contents: Any) -> None:
    ds = actlake.open(built.url)
    sample = sample_rows(ds, 16_384)
    found, position = contents.positions, sample.columns["position"]
    assert sum(found.n_rows) == sample.n_rows
    for name, ratios in found.ratios.items():
        for low, high, ratio in zip(found.edges[:-1], found.edges[1:], ratios, strict=True):
            inside = (position >= low) & (position < high)
            if inside.any():
                assert ratio == pytest.approx(sample.norms[name][inside].mean() / sample.norms[name].mean(), abs=1e-4)
            else:
                assert ratio is None


@given(st.integers(0, 200_000))
def test_position_bins_hold_every_position(last: int) -> None:
    edges = _edges(last)
    assert edges == sorted(set(edges))
    assert edges[0] == 0
    assert edges[-2] <= last < edges[-1]


def test_the_mix_counts_tokens_roles_and_labels(built: report_dataset.Made, contents: Any) -> None:
    sample = sample_rows(actlake.open(built.url), 16_384)
    tokens = Counter(sample.columns["token_id"].tolist())
    assert dict(contents.mix.tokens) == {token: tokens[token] for token, _ in contents.mix.tokens}
    assert [n for _, n in contents.mix.tokens] == sorted(tokens.values(), reverse=True)[:25]
    assert contents.mix.roles == {"text": sample.n_rows}
    kinds = Counter[str]()
    for sequence in sample.columns["sequence"].tolist():
        kinds[str(built.corpus.sequences("train", sequence, sequence + 1)[0].metadata["kind"])] += 1
    assert dict(contents.mix.labels["kind"]) == kinds
    assert list(contents.mix.labels) == ["source", "kind"]


def test_documents_have_the_norm_of_each_tokens_own_row(built: report_dataset.Made, contents: Any) -> None:
    ds = actlake.open(built.url)
    assert contents.documents.points == POINTS
    assert len(contents.documents.documents) > 1
    for shown in contents.documents.documents:
        sequence = built.corpus.sequences("train", shown.sequence, shown.sequence + 1)[0]
        assert (shown.document, shown.tokens) == (sequence.document, sequence.tokens.tolist())
        assert shown.labels == sequence.metadata
        assert shown.rows[0] == -1, "BOS is no row"
        for place, row in enumerate(shown.rows[1:], start=1):
            columns = ds.rows([row])
            assert (columns["sequence"][0], columns["position"][0]) == (shown.sequence, place)
            for point, norms in zip(contents.documents.points, shown.norms, strict=True):
                assert norms[place] == pytest.approx(np.linalg.norm(ds[point][row].astype(np.float64)), rel=5e-3)


def test_a_dataset_without_its_corpus_is_shown_by_token_ids(tmp_path: Path) -> None:
    found = collect(Made(str(tmp_path / "ds"), 300).build(0).open())
    assert (found.corpus_note, found.pieces, found.mix.labels) == ("the corpus is gone", {}, {})
    first = found.documents.documents[0]
    assert (first.tokens[5], first.rows[5]) == (5 * 7, 5)
    render(found)


def test_void_rows_have_no_norm() -> None:
    roles = np.array([0, 0, ROLE_VOID, 0])
    assert _aligned(np.array([1.0, 2.0]), np.array([1, 2]), roles) == [None, 1.0, None, None]


# --- the page -----------------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(deadline=None)
def test_embedded_data_reads_back_and_cannot_end_its_element(value: Any) -> None:
    text = embed(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_the_page_holds_no_tag_from_data_and_names_no_other_place(contents: Any) -> None:
    page = render(contents).decode()
    assert "window.harmed = 1" in page, "the attack is there, as text"
    assert "<img" not in page
    assert page.count("<script") == 1 + len(SCRIPTS)
    markup = re.sub(r"<script.*?</script>|<style>.*?</style>|<!--.*?-->", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", markup)


def test_a_wide_dataset_fits_the_page_limit(tmp_path: Path) -> None:
    streams = ("attn_z", "mlp_in", "mlp_out", "resid_post")
    points = tuple(PointSpec(name=f"layers.{i}.{s}", width=8, rows_per_chunk=64) for i in range(62) for s in streams)
    spec = make_spec(hook_points=points, rows_per_shard=512, rows_per_block=512)
    found = collect(Made(str(tmp_path / "ds"), 512, spec).build(0).open())
    n_norms = sum(len(norms) for shown in found.documents.documents for norms in shown.norms)
    # As many norms as a page may have: 24 hook points, 6,000 tokens, 6 bytes.
    assert len(render(found)) - 6 * n_norms + 24 * 6_000 * 6 < 5_000_000


def test_the_third_party_scripts_are_as_published() -> None:
    assets = files("actlake.jobs.report").joinpath("assets")
    licences = assets.joinpath("LICENSES.txt").read_text()
    vendored = [name for name in SCRIPTS if name.endswith(".min.js")]
    assert len(vendored) == 2
    for name in vendored:
        assert f"{name}: sha256 {hashlib.sha256(assets.joinpath(name).read_bytes()).hexdigest()}" in licences


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command_says_what_it_wrote(built: report_dataset.Made, tmp_path: Path) -> None:
    result = run(built.url, "-o", str(tmp_path / "r.html"))
    assert result.exit_code == 0
    ds = actlake.open(built.url)
    assert f"{ds.n_rows:,} of {ds.n_rows_planned:,} rows, incomplete" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_no_rows_are_read_where_none_are_wanted(built: report_dataset.Made, tmp_path: Path) -> None:
    found = collect(actlake.open(built.url), n_rows=0)
    assert (found.mix.n_rows, found.documents.documents, found.sample_points) == (0, (), ())
    assert found.points[0].norm_mean is not None
    render(found)


@pytest.mark.parametrize(
    ("dataset", "output", "message"),
    [("nothing", "r.html", "no dataset"), ("nothing", "no/folder/r.html", "there is no folder")],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, dataset: str, output: str, message: str) -> None:
    result = run(str(tmp_path / dataset), "-o", str(tmp_path / output))
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_watching_writes_whole_pages_until_the_dataset_is_complete(tmp_path: Path) -> None:
    made = Made(str(tmp_path / "ds"), 600).build(0)
    page = tmp_path / "r.html"
    seen: list[bytes] = []
    results: list[Any] = []
    watching = threading.Thread(target=lambda: results.append(run(made.url, "-o", str(page), "--watch", "1")))
    watching.start()
    deadline = time.monotonic() + 60
    while watching.is_alive() and time.monotonic() < deadline:
        if page.exists() and (data := page.read_bytes()) not in seen[-1:]:
            assert data.endswith(b"</html>\n"), "half a page"
            seen.append(data)
            if len(seen) < 3:
                made.build(len(seen))
        time.sleep(0.02)
    watching.join(timeout=1)
    if page.read_bytes() != seen[-1]:
        seen.append(page.read_bytes())
    assert results[0].exit_code == 0
    states = [(b'"complete":true' in data, b'"watch_s":1.0' in data) for data in seen]
    assert states == [(False, True), (False, True), (True, True)]
    assert Store(made.url).exists("commits/00000000/0000000002.json")
