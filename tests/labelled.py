"""A dataset with a labelled corpus, built by the shard builder from formulas, and what is true of each of its rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FormulaModel, make_corpus, make_spec

from actlake.ingest.build import ShardBuilder
from actlake.shards.dataset import ActivationDataset
from actlake.shards.dataset import open as open_dataset
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.header import Header, prepare
from actlake.storage.stores import Store

CATEGORIES = ("jailbreak", "refusal", None)
METADATA = ("category", "safe", "turns")


def labels_of(number: int) -> dict[str, Any]:
    """What the document of a number says of itself; a missing label is absent or null."""
    labels: dict[str, Any] = {"turns": number % 4, "safe": number % 5 == 0}
    category = CATEGORIES[number % 3]
    if category is not None or number % 2:
        labels["category"] = category
    return labels


def write_labelled(folder: Path, n_documents: int = 40) -> str:
    """Write documents of 1..59 words with labels as JSON lines; return their glob."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    lines = []
    for number in range(n_documents):
        words = random.integers(0, 500, size=random.integers(1, 60))
        text = " ".join(f"word{word}" for word in words)
        lines.append(json.dumps({"id": f"d{number}", "text": text, **labels_of(number)}))
    (folder / "a.jsonl").write_text("\n".join(lines[: n_documents // 2]))
    (folder / "b.jsonl").write_text("\n".join(lines[n_documents // 2 :]))
    return f"{folder}/*.jsonl"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One row as the corpus says it is."""

    row: int
    token_id: int
    position: int
    sequence: TokenSequence


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The dataset, its corpus, and the truth of its rows in corpus order."""

    ds: ActivationDataset
    corpus: Corpus
    rows: list[Truth]


def make_labelled(folder: Path, n_rows: int = 230, shards: list[int] | None = None, **changes: Any) -> Labelled:
    """Build a dataset of 64 rows a shard, 32 a block; all of its shards or those named."""
    store = Store(folder / "data")
    corpus = make_corpus(Store(folder / "corpus"), write_labelled(folder / "texts"), metadata=METADATA)
    spec = make_spec(corpus, **changes)
    prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    builder = ShardBuilder(store=store, corpus=corpus, forward=FormulaModel(spec.hook_points), n_threads=1)
    space = spec.row_space(n_rows)
    for shard in range(space.n_shards) if shards is None else shards:
        builder.build(shard)
    stored = [space.rows_of(shard).start + place for shard in range(space.n_shards) for place in space.places(shard)]
    kept = zip(stored, _kept(corpus, spec.split), strict=False)
    rows = [Truth(row=int(row), token_id=token, position=at, sequence=of) for row, (token, at, of) in kept]
    return Labelled(ds=open_dataset(store.url), corpus=corpus, rows=rows)


def _kept(corpus: Corpus, split: str) -> Iterator[tuple[int, int, TokenSequence]]:
    for sequence in corpus.sequences(split, 0, corpus.splits[split].n_sequences):
        for position, token in enumerate(sequence.tokens.tolist()):
            if token > 2:
                yield token, position, sequence
