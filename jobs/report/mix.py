"""What the sampled rows are of: tokens, roles, sources and the labels of their documents."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from actlake.jobs.report.sample import RowSample
from actlake.shards.corpus_rows import CorpusRows
from actlake.storage.rowspace import ROLES

_T = TypeVar("_T", int, str)

#: Tokens, and values of a label, that are shown.
_TOP = 25


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the sample: the most frequent tokens by id, roles by name, and values of each label with their rows.

    ``labels`` holds ``source`` first, then the metadata that the corpus keeps; absent values are ``""``. Empty where
    there is no corpus.
    """

    n_rows: int
    n_distinct_tokens: int
    tokens: Sequence[tuple[int, int]]
    roles: Mapping[str, int]
    labels: Mapping[str, Sequence[tuple[str, int]]]


def mix(sample: RowSample, corpus: CorpusRows | None) -> Mix:
    """Return what the sample is made of."""
    tokens = Counter(sample.columns["token_id"].tolist())
    names = {code: name for name, code in ROLES.items()}
    roles = Counter(names.get(code, f"role {code}") for code in sample.columns["role"].tolist())
    return Mix(
        n_rows=sample.n_rows,
        n_distinct_tokens=len(tokens),
        tokens=_top(tokens),
        roles=dict(roles.most_common()),
        labels=_labels(sample, corpus) if corpus is not None else {},
    )


def _labels(sample: RowSample, corpus: CorpusRows) -> dict[str, list[tuple[str, int]]]:
    numbers, n_rows = np.unique(sample.columns["sequence"], return_counts=True)
    found = {}
    for field in corpus.fields[1:]:  # the first is the document
        counts = Counter[str]()
        for value, n in zip(corpus.values(field, numbers), n_rows.tolist(), strict=True):
            counts[value or ""] += n
        found[field] = _top(counts)
    return found


def _top(counts: Counter[_T]) -> list[tuple[_T, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
