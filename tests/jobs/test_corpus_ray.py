"""A corpus built on Ray Data has the bytes of one built in this process, for any workers and after a crash."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import WordTokenizer
from ray import cloudpickle

from actlake.ingest import corpus_map, corpus_parts
from actlake.ingest.corpus import build_corpus
from actlake.jobs.corpus import count_rows
from actlake.jobs.corpus_ray import RayData
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import SourceError
from actlake.storage.rowspace import KeepRule
from actlake.storage.stores import Store

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data warns of settings of its own when it first makes its context.
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning"),
]


def write(folder: Path, n_files: int = 6, n_documents: int = 30) -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(n_files):
        numbers = range(file * n_documents, (file + 1) * n_documents)
        lines = [
            json.dumps({"id": f"d{n}", "text": " ".join(f"word{n * j % 97}" for j in range(1 + n % 50)), "kind": n % 3})
            for n in numbers
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return (f"{folder}/[0-2].jsonl", f"{folder}/[3-9].jsonl")


def spec_of(sources: tuple[str, ...], **changes: Any) -> CorpusSpec:
    return CorpusSpec(sources=sources, context_length=16, holdout=0.1, tokenizer="words", metadata=("kind",), **changes)


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def carried() -> Iterator[None]:
    """Have the tests' own modules travel with what is pickled: workers cannot import them."""
    by_value: Any = cloudpickle
    modules = (fakes, sys.modules[__name__])
    for module in modules:
        by_value.register_pickle_by_value(module)
    yield
    for module in modules:
        by_value.unregister_pickle_by_value(module)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Sources of several parts."""
    monkeypatch.setattr(corpus_parts, "PART_NBYTES", 5_000)
    monkeypatch.setattr(corpus_map, "BUCKET_NBYTES", 20_000)
    return write(tmp_path / "in")


def on_ray(place: Path, spec: CorpusSpec, workers: int, load: Any = WordTokenizer, **options: Any) -> Corpus:
    engine = RayData(workers=workers, cpus=0.5, least_nbytes=0)
    return build_corpus(Store(place), spec, WordTokenizer(), engine=engine, load=load, **options)


def test_one_and_four_workers_and_this_process_make_the_same_bytes(tmp_path: Path, sources: tuple[str, ...]) -> None:
    spec = spec_of(sources)
    told: list[tuple[int, int]] = []
    build_corpus(Store(tmp_path / "here"), spec, WordTokenizer())
    for workers in (1, 4):
        corpus = on_ray(tmp_path / str(workers), spec, workers, progress=lambda *done: told.append(done))
        assert files(tmp_path / str(workers)) == files(tmp_path / "here")
    assert told[-1][0] == 180
    keep = KeepRule(exclude=(2,))
    counted = count_rows(corpus, "train", keep, RayData(workers=2, cpus=0.5)).first_row.tolist()
    assert counted == Corpus.open(Store(tmp_path / "here")).row_index("train", keep).first_row.tolist()


class Dying(WordTokenizer):
    """Kills its process at its third batch, once."""

    n_batches = 0

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> Any:
        Dying.n_batches += 1
        if Dying.n_batches == 3 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(text, add_special_tokens=add_special_tokens)


def test_a_worker_that_is_killed_changes_nothing(tmp_path: Path, sources: tuple[str, ...]) -> None:
    spec = spec_of(sources)
    on_ray(tmp_path / "killed", spec, 2, load=partial(Dying, tmp_path / "died"))
    assert (tmp_path / "died").exists()
    build_corpus(Store(tmp_path / "here"), spec, WordTokenizer())
    assert files(tmp_path / "killed") == files(tmp_path / "here")


def test_what_is_wrong_with_the_sources_is_said_as_in_this_process(tmp_path: Path, sources: tuple[str, ...]) -> None:
    (tmp_path / "in/4.jsonl").write_text('{"id": "d0", "text": "again"}\n')
    with pytest.raises(SourceError, match=r"two documents have the id 'd0': 0\.jsonl, line 1 of .* has it too"):
        on_ray(tmp_path / "c", spec_of(sources), 2)
    (tmp_path / "in/4.jsonl").write_text('{"id": "d900", "text": 7}\n')
    with pytest.raises(SourceError, match=r"4\.jsonl, line 1 of .*field 'text' holds int, not text"):
        on_ray(tmp_path / "c", spec_of(sources), 2)
