"""Redaction: the text goes, the rows are void, and nothing else moves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FormulaModel, WordTokenizer, make_corpus, make_spec
from runs import contents
from typer.testing import CliRunner

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.ingest.corpus import build_corpus
from actlake.jobs.cli import corpus as _corpus  # noqa: F401 - registers
from actlake.jobs.cli import verify as _verify  # noqa: F401 - registers
from actlake.jobs.cli.app import app
from actlake.jobs.redact import RedactReport, redact
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import Problem, verify
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, UnknownNameError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.redaction import redacted_name
from actlake.storage.rowspace import ROLE_VOID, KeepRule
from actlake.storage.spec import SPLITS
from actlake.storage.stores import Store, resolve_url

SECRET = "word1234567"
LONG = "0003.txt"


def write_texts(folder: Path, n_documents: int = 30) -> str:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(n_documents):
        words = [f"word{word}" for word in random.integers(0, 500, size=random.integers(3, 50))]
        if number == 3:
            words = [SECRET] * 70
        (folder / f"{number:04d}.txt").write_text(" ".join(words))
    return f"{folder}/*.txt"


def build(folder: Path, name: str, *, shards: int | None = None, keep: KeepRule | None = None) -> Store:
    """Build the dataset of both splits as far as wanted."""
    corpus = Corpus.open(Store(folder / "corpus"))
    for split in SPLITS:
        spec = make_spec(corpus, split=split, keep=keep or KeepRule(exclude=(0, 1, 2)))
        store = Store(folder / name if split == "train" else folder / name / "heldout")
        n_rows = corpus.row_index(split, spec.keep).n_rows
        header = prepare(
            store, Header(spec=spec, n_rows=n_rows, corpus="../corpus" if split == "train" else "../../corpus")
        )
        builder = ShardBuilder(store=store, corpus=corpus, forward=FormulaModel(spec.hook_points))
        for shard in range(builder.space.n_shards)[:shards]:
            builder.build(shard)
        finish(store, header)
    return Store(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_corpus(Store(tmp_path / "corpus"), write_texts(tmp_path / "texts"))
    return tmp_path


def of_document(folder: Path, split: str, name: str) -> list[int]:
    corpus = Corpus.open(Store(folder / "corpus"))
    sequences = corpus.sequences(split, 0, corpus.splits[split].n_sequences)
    return [one.index for one in sequences if one.document == name]


def rows_of(store: Store) -> dict[str, Any]:
    ds = actlake.open(store.url)
    columns = ds.rows(np.arange(ds.n_rows))
    return columns | {point: ds[point][:] for point in ds.hook_points}


def problems_of(ds: ActivationDataset) -> tuple[Problem, ...]:
    return verify(ds, corpus=Corpus.open(resolve_url(ds.header.corpus, ds.store))).problems


def test_the_rows_are_void_and_all_others_are_as_they_were(folder: Path) -> None:
    store = build(folder, "ds")
    sequences, before = of_document(folder, "train", LONG), rows_of(store)
    assert len(sequences) > 3
    report = redact(Store(folder / "corpus"), [LONG], [store])
    after, mine = rows_of(store), np.isin(before["sequence"], sequences)
    assert report.rows == {store.url: mine.sum()}
    assert mine.sum() == 70
    assert (after["role"][mine] == ROLE_VOID).all()
    assert not after["token_id"][mine].any()
    for name, rows in after.items():
        assert np.array_equal(rows[~mine].view(np.uint8), before[name][~mine].view(np.uint8)), name
        if name.startswith("layers"):
            assert not rows[mine].astype(np.float32).any()
    ds = actlake.open(store.url)
    assert ds.complete
    assert not problems_of(ds)
    assert {
        int(row) for batch in ds.stream(ds.hook_points[0], batch_size=8, drop_last=False) for row in batch.row
    } == set(np.flatnonzero(~mine).tolist())
    assert ds.statistics(ds.hook_points[0]).count == (~mine).sum()


def test_the_text_is_nowhere_in_the_corpus(folder: Path) -> None:
    old = set((folder / "corpus" / "sequences").iterdir())
    redact(Store(folder / "corpus"), [LONG], [])
    corpus = Corpus.open(Store(folder / "corpus"))
    token = WordTokenizer.token_id(SECRET)
    found = [one for split in SPLITS for one in corpus.sequences(split, 0, corpus.splits[split].n_sequences)]
    assert not any((one.tokens == token).any() or one.document == LONG for one in found)
    redacted = [one for one in found if one.redacted]
    assert {one.document for one in redacted} == {redacted_name(LONG)}
    assert sum(len(one.tokens) for one in redacted) == 70 + len(redacted)
    now = set((folder / "corpus" / "sequences").iterdir())
    assert len(now) == len(old)
    assert len(now - old) == 1
    assert corpus.verify() == len(corpus.files)


def test_a_dataset_built_afterwards_has_the_same_content(folder: Path) -> None:
    store = build(folder, "ds")
    redact(Store(folder / "corpus"), [LONG], [store])
    build(folder, "anew")
    first, second = contents(folder / "ds"), contents(folder / "anew")
    assert first == second


def test_what_was_missing_is_built_from_the_redacted_corpus(folder: Path) -> None:
    store = build(folder, "ds", shards=2)
    redact(Store(folder / "corpus"), [LONG], [store])
    build(folder, "ds")
    build(folder, "anew")
    assert contents(folder / "ds") == contents(folder / "anew")


def test_a_keep_rule_first_used_afterwards_has_as_many_rows(folder: Path) -> None:
    common = WordTokenizer.token_id("word7")
    rule = KeepRule(exclude=(0, 1, 2, common), skip_first=2)
    expected = {
        split: Corpus.open(Store(folder / "corpus")).row_index(split, rule).first_row.tolist() for split in SPLITS
    }
    for path in (folder / "corpus" / "rows").rglob("*.parquet"):
        path.unlink()
    redact(Store(folder / "corpus"), [LONG, "0004.txt"], [build(folder, "ds", shards=1, keep=rule)])
    for path in (folder / "corpus" / "rows").rglob("*.parquet"):
        path.unlink()
    corpus = Corpus.open(Store(folder / "corpus"))
    assert {split: corpus.row_index(split, rule).first_row.tolist() for split in SPLITS} == expected


def test_a_larger_build_does_not_bring_the_document_back(tmp_path: Path) -> None:
    source, place = write_texts(tmp_path / "texts"), Store(tmp_path / "corpus")
    make_corpus(place, source, max_tokens=400)
    names = {
        one.document for one in Corpus.open(place).sequences("train", 0, Corpus.open(place).splits["train"].n_sequences)
    }
    redact(place, [LONG], [])
    assert LONG in names
    whole = make_corpus(place, source)
    assert whole.complete
    assert whole.redactions
    sequences = whole.sequences("train", 0, whole.splits["train"].n_sequences)
    assert LONG not in {one.document for one in sequences}
    assert sum(one.redacted for one in sequences) == 5


def test_a_document_with_its_id_is_not_appended_either(folder: Path) -> None:
    place = Store(folder / "corpus")
    redact(place, [LONG], [])
    (folder / "texts" / "new").mkdir()
    spec = Corpus.open(place).spec
    (folder / "texts" / "zzzz.txt").write_text("word1 word2")
    assert build_corpus(place, spec, WordTokenizer(), append=True).redactions == Corpus.open(place).redactions


class Killed(Exception):
    """Stands for the end of the process."""


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let so many writes and deletions through, then end."""
    left = iter(range(after))
    for name in ("write", "delete"):
        real = getattr(Store, name)

        def counted(store: Store, *args: Any, _real: Any = real) -> None:
            if next(left, None) is None:
                raise Killed
            _real(store, *args)

        monkeypatch.setattr(Store, name, counted)


@pytest.mark.parametrize("after", [0, 2, 5, 9, 12, 14, 18, 23, 25, 31, 36, 40, 99])
def test_a_run_after_a_crash_ends_as_an_undisturbed_one(
    folder: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(folder, "ds")
    with monkeypatch.context() as patched:
        killing(patched, after)
        try:
            redact(Store(folder / "corpus"), [LONG], [store])
            crashed = False
        except Killed:
            crashed = True
    again = redact(Store(folder / "corpus"), [LONG], [store])
    assert crashed or again.shards[store.url] == 0
    build(folder, "anew")
    assert contents(folder / "ds") == contents(folder / "anew")
    assert not (folder / "ds" / "redacting").exists() or not any((folder / "ds" / "redacting").iterdir())
    ds = actlake.open(store.url)
    assert ds.complete
    assert not problems_of(ds)


def test_a_dataset_that_was_not_named_is_found_by_verify(folder: Path) -> None:
    store = build(folder, "ds")
    redact(Store(folder / "corpus"), [LONG], [])
    result = CliRunner().invoke(app, ["verify", store.url, "--json"])
    assert result.exit_code == 2
    assert "redact" in result.stdout


def test_bad_input_changes_nothing(folder: Path, tmp_path: Path) -> None:
    store, before = build(folder, "ds"), contents(folder / "corpus")
    with pytest.raises(UnknownNameError, match=r"no document '0003'.*0003\.txt"):
        redact(Store(folder / "corpus"), ["0003"], [store])
    make_corpus(Store(folder / "other"), write_texts(folder / "others", 9))
    with pytest.raises(BadInputError, match="datasets of this corpus only"):
        redact(Store(folder / "other"), [LONG], [store])
    assert contents(folder / "corpus") == before


def test_the_command_reports_and_names_the_datasets_left_out(folder: Path) -> None:
    one, other = build(folder, "one"), build(folder, "other")
    command = ["corpus", "redact", str(folder / "corpus"), "--document", LONG, "--dataset", one.url, "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rows"] == {one.url: 70}
    assert report["not_named"] == [other.url]
    assert set(RedactReport.__dataclass_fields__) <= set(report)
    again = CliRunner().invoke(app, [*command[:-1]])
    assert f"{one.url}: 0 rows are void" in again.stdout
    assert "name it with --dataset" in again.stdout
