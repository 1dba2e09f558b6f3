"""Row filters against what the corpus says of every row: which rows, what is read, what is refused."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formula_dataset import WIDE, Made
from labelled import Labelled, Truth, make_labelled

from actlake.shards.dataset import ActivationDataset
from actlake.shards.select import RowFilter, where
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import BadInputError, NotFoundError, UnknownNameError

POINT = "layers.1.resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


def chosen(dataset: ActivationDataset, rows: RowFilter, step: int = 64) -> set[int]:
    """The chosen rows, asked for in pieces."""
    found = set()
    for shard in dataset.reader.manifest.shards:
        n_rows = dataset.reader.record(shard).n_rows
        for start in range(0, n_rows, step):
            mask = rows.mask(shard, start, min(step, n_rows - start))
            assert (mask.dtype, len(mask)) == (np.dtype(bool), min(step, n_rows - start))
            found |= {int(place) + shard * dataset.spec.rows_per_shard + start for place in np.flatnonzero(mask)}
    return found


def from_end(truth: Truth) -> int:
    return len(truth.sequence.tokens) - 1 - truth.position


def label(truth: Truth, name: str) -> str | None:
    return truth.sequence.metadata[name]


CASES: list[tuple[dict[str, Any], Callable[[Truth], bool]]] = [
    ({"position": (4, None)}, lambda t: t.position >= 4),
    ({"position": (None, 3)}, lambda t: t.position < 3),
    ({"position": [2, np.int64(9)]}, lambda t: 2 <= t.position < 9),
    ({"position_from_end": (0, 3)}, lambda t: from_end(t) < 3),
    ({"position_from_end": (1, None)}, lambda t: from_end(t) >= 1),
    ({"token_id": 582}, lambda t: t.token_id == 582),
    ({"token_ids": [582, 9]}, lambda t: t.token_id == 582),
    ({"token_id": range(100, 400)}, lambda t: 100 <= t.token_id < 400),
    ({"role": "text"}, lambda t: True),
    ({"role": ["user", 2]}, lambda t: False),
    ({"category": "jailbreak"}, lambda t: label(t, "category") == "jailbreak"),
    ({"category": ["jailbreak", "refusal"]}, lambda t: label(t, "category") in ("jailbreak", "refusal")),
    ({"category": None}, lambda t: label(t, "category") is None),
    ({"category": ["refusal", None]}, lambda t: label(t, "category") in ("refusal", None)),
    ({"turns": [1, 2]}, lambda t: label(t, "turns") in ("1", "2")),
    ({"safe": True}, lambda t: label(t, "safe") == "true"),
    ({"document": "d35"}, lambda t: t.sequence.document == "d35"),
    (
        {"category": "refusal", "position": (3, 12), "safe": False, "position_from_end": (2, None)},
        lambda t: label(t, "category") == "refusal" and 3 <= t.position < 12 and not int_label(t) and from_end(t) >= 2,
    ),
]


def int_label(truth: Truth) -> bool:
    return label(truth, "safe") == "true"


@pytest.mark.parametrize(("conditions", "holds"), CASES, ids=lambda case: str(case)[:40])
@pytest.mark.parametrize("step", [64, 13])
def test_the_rows_that_fulfil_every_condition_are_chosen(
    made: Labelled, conditions: dict[str, Any], holds: Callable[[Truth], bool], step: int
) -> None:
    expected = {truth.row for truth in made.rows if holds(truth)}
    assert chosen(made.ds, where(made.ds, **conditions), step) == expected
    assert expected or "role" in conditions


def test_norms_are_multiples_of_the_points_median(made: Labelled) -> None:
    norms = np.sqrt((made.ds[POINT][:].astype(np.float64) ** 2).sum(axis=1))
    median = made.ds.statistics(POINT).median_norm
    for low, high in ((None, 1.0), (0.5, 1.5), (1.2, None)):
        inside = (norms >= (low or 0) * median) & (norms < (high or np.inf) * median)
        assert 0 < inside.sum() < len(norms)
        assert chosen(made.ds, where(made.ds, norm={POINT: (low, high)}), 24) == set(np.flatnonzero(inside).tolist())


def test_void_rows_are_never_chosen(make: Callable[..., Made]) -> None:
    voids = frozenset({0, 100, 300, 301})
    dataset = make(voids=voids).build_all().open()
    assert chosen(dataset, where(dataset, position=(0, None)), 100) == set(range(868)) - voids
    norms = where(dataset, norm={WIDE: (0.0, None)})
    assert chosen(dataset, norms, 100) == set(range(868)) - voids


# --- what is read ---


def reads(monkeypatch: pytest.MonkeyPatch, dataset: ActivationDataset) -> list[tuple[str, int]]:
    """The array and chunk of every read from now on."""
    found: list[tuple[str, int]] = []
    read_chunk = dataset.reader.read_chunk

    def watch(array: ArraySpec, shard: int, chunk: int, out: Any) -> None:
        found.append((array.name, chunk))
        read_chunk(array, shard, chunk, out)

    monkeypatch.setattr(dataset.reader, "read_chunk", watch)
    return found


def test_only_the_columns_and_chunks_needed_are_read(made: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = where(made.ds, position=(5, 7), norm={POINT: (None, 1.0)})
    positions = made.ds["rows/position"][64:128]
    found = reads(monkeypatch, made.ds)
    rows.mask(1, 0, 64)
    # Chunks of 16 rows for the columns, of 8 for the point.
    wanted = {place // 8 for place in np.flatnonzero((positions >= 5) & (positions < 7)).tolist()}
    assert 0 < len(wanted) < 8
    assert found == [("rows/position", chunk) for chunk in range(4)] + [(POINT, chunk) for chunk in sorted(wanted)]
    found.clear()
    where(made.ds, position=(999, None), norm={POINT: (None, 1.0)}, category="refusal").mask(0, 17, 4)
    assert found == [("rows/position", 1)]


def test_a_dataset_without_its_corpus_is_chosen_from_by_its_columns(tmp_path: Path) -> None:
    made = make_labelled(tmp_path, n_rows=64)
    (tmp_path / "corpus").rename(tmp_path / "gone")
    assert chosen(made.ds, where(made.ds, position=(4, None))) == {t.row for t in made.rows if t.position >= 4}
    labels: list[dict[str, Any]] = [{"category": "refusal"}, {"document": "d1"}]
    for conditions in labels:
        with pytest.raises(NotFoundError, match=r"corpus at .*corpus, which is not there.*put it back"):
            where(made.ds, **conditions)
    with pytest.raises(NotFoundError, match="put it back"):
        where(made.ds, position_from_end=(0, 3)).mask(0, 0, 64)


def test_masks_agree_in_threads_and_after_pickling(made: Labelled) -> None:
    rows = where(made.ds, category="refusal", position_from_end=(2, None), norm={POINT: (None, 1.5)})
    expected = [rows.mask(shard, 0, 38).tolist() for shard in range(4)]
    copy: RowFilter = pickle.loads(pickle.dumps(rows))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda shard: copy.mask(shard % 4, 0, 38).tolist(), range(64)))
    assert found == expected * 16
    assert copy.describe() == rows.describe()


# --- descriptions ---


def test_a_description_is_small_and_tells_filters_apart(made: Labelled) -> None:
    filters = [
        where(made.ds, position=(4, None)),
        where(made.ds, position=(4, 900)),
        where(made.ds, position_from_end=(4, None)),
        where(made.ds, token_id=range(500)),
        where(made.ds, token_id=range(501)),
        where(made.ds, norm={POINT: (None, 2)}),
        where(made.ds, norm={POINT: (None, 2), "layers.0.attn_z": (1.5, 2)}, category=["refusal", "jailbreak"]),
    ]
    described = [json.dumps(rows.describe()) for rows in filters]
    assert len(set(described)) == len(described)
    assert max(map(len, described)) < 300
    for rows in filters:
        assert rows.restored(json.loads(json.dumps(rows.describe()))).describe() == rows.describe()
    with pytest.raises(BadInputError, match=r"chosen by .*900.*same conditions in where"):
        filters[0].restored(filters[1].describe())


def test_a_restored_filter_keeps_the_median_of_its_description(made: Labelled) -> None:
    rows = where(made.ds, norm={POINT: (None, 1.0)}, role="text")
    description = rows.describe()
    grown = rows.restored({**description, "medians": [description["medians"][0] * 1.3]})
    wider = where(made.ds, norm={POINT: (None, 1.3)})
    assert chosen(made.ds, grown) == chosen(made.ds, wider) != chosen(made.ds, rows)
    with pytest.raises(BadInputError, match="same conditions"):
        rows.restored({"where": description["where"]})


# --- refusals ---


@pytest.mark.parametrize(
    ("conditions", "error", "match"),
    [
        ({}, BadInputError, r"without a condition; give one, e\.g\. position=\(4, None\)"),
        ({"position": 4}, BadInputError, r"position = 4 is no range; write \(low, high\)"),
        ({"position": (4, 4)}, BadInputError, r"position = \(4, 4\) is empty"),
        ({"position": (None, None)}, BadInputError, "chooses everything"),
        ({"position": (0.5, None)}, BadInputError, "whole numbers"),
        ({"position": (True, None)}, BadInputError, "True is no number"),
        ({"position_from_end": ("a", 2)}, BadInputError, "'a' is no number"),
        ({"norm": {POINT: (None, float("nan"))}}, BadInputError, "nan is no number"),
        ({"norm": {"layers.9.resid_post": (None, 2)}}, UnknownNameError, "no hook point 'layers.9.resid_post'"),
        ({"role": "modle"}, UnknownNameError, "no role 'modle'; did you mean 'model'"),
        ({"role": "assistant"}, UnknownNameError, "valid names: model, reasoning, system, template, text, user"),
        ({"role": "void"}, BadInputError, "cannot be chosen"),
        ({"role": []}, BadInputError, "chooses nothing"),
        ({"token_id": []}, BadInputError, "chooses nothing; name at least one"),
        ({"token_id": [1.5]}, BadInputError, "whole number"),
        ({"token_id": "the"}, BadInputError, "whole number"),
        ({"cattegory": "refusal"}, UnknownNameError, r"no field 'cattegory'.*did you mean 'category'\?.*metadata"),
        ({"postion": (4, None)}, UnknownNameError, "did you mean 'position'"),
        ({"category": "jailbrake"}, UnknownNameError, "no document has category = 'jailbrake'.*'jailbreak', 'refusal'"),
        ({"category": []}, BadInputError, "category = .* chooses nothing"),
        ({"safe": None}, UnknownNameError, "every document has a 'safe'.*'false', 'true'"),
        ({"document": ["d1", "d99"]}, UnknownNameError, r"document = 'd99'.*'d0', .*\(\d+ in all\)"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(
    made: Labelled, conditions: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        where(made.ds, **conditions)


def test_a_median_that_was_not_stored_is_taken_from_the_rows(made: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = where(made.ds, norm={POINT: (None, 1.2)}).describe()
    stored = made.ds.statistics(POINT)
    monkeypatch.setattr(made.ds, "statistics", lambda point: replace(stored, norm_histogram=None))
    assert where(made.ds, norm={POINT: (None, 1.2)}).describe() == wanted
