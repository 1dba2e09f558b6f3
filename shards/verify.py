"""Checks every committed byte of a dataset, and makes damaged shards invisible so that they are built again.

What a deep check cannot see: bytes that were changed together with every checksum and statistic of them (``rerun``, in
``actlake.jobs``, compares rows with the model itself); and, with codec ``none`` and without the corpus, the row columns
of two shards of one size exchanged. There all indexes are equal, and so are the checksums of whole objects, since each
chunk ends with its own; only what the corpus and the statistics say of the rows tells objects apart.
"""

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.dataset import ActivationDataset
from actlake.shards.dataset import open as open_dataset
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.verify_layout import layout_problems
from actlake.shards.verify_shard import Expected, Problem, ShardCheck
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.errors import BadInputError, CorruptObjectError, DataError, SpecMismatchError
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest, uncommit
from actlake.storage.records import ShardRecord, commit_key, read_record
from actlake.storage.rowspace import mix64
from actlake.storage.shard_rows import ShardRows
from actlake.storage.stores import Store

__all__ = ["Problem", "VerifyReport", "completed", "merged", "open_damaged", "repair", "verify"]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked, what was found, and which planned shards are not there to be checked.

    Of ``n_shards``, ``n_deep`` were read whole. ``corpus`` says whether rows were compared with the corpus.
    """

    n_shards: int = 0
    n_deep: int = 0
    n_objects: int = 0
    n_chunks: int = 0
    n_rows: int = 0
    nbytes: int = 0
    corpus: bool = False
    problems: tuple[Problem, ...] = ()
    missing_shards: tuple[int, ...] = ()

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """The shards with a problem, ascending."""
        return tuple(sorted({problem.shard for problem in self.problems if problem.shard is not None}))


def merged(reports: Iterable[VerifyReport]) -> VerifyReport:
    """Return what reports about different shards of one dataset say together."""
    parts = list(reports)
    counts = ("n_shards", "n_deep", "n_objects", "n_chunks", "n_rows", "nbytes")
    problems = [problem for part in parts for problem in part.problems]
    return VerifyReport(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        corpus=any(part.corpus for part in parts),
        problems=tuple(sorted(problems, key=lambda problem: (problem.shard is None, problem.shard))),
        missing_shards=tuple(sorted({shard for part in parts for shard in part.missing_shards})),
    )


def verify(
    dataset: ActivationDataset,
    *,
    on_progress: Callable[[int], None] | None = None,
    deep: bool = True,
    sample: float = 1.0,
    corpus: Corpus | None = None,
    shards: Sequence[int] | None = None,
    n_threads: int | None = None,
) -> VerifyReport:
    """Check every shard that was committed when the dataset was opened; damage is collected, never raised.

    Each record, object, shard index, chunk and checksum, the row columns, and the statistics against the rows. Without
    ``deep`` only records, sizes and shard indexes: a few small reads an object. The held-out split is a dataset of its
    own.

    Args:
        dataset: what to check.
        on_progress: hears of stored bytes as their shards are done; their sum is that of the manifest's ``nbytes``.
        deep: read objects whole.
        sample: the share of the shards that ``deep`` is for, at least one of them, always the same ones.
        corpus: compare token, position, sequence and role of every row with it.
        shards: check these alone, and nothing beside shards.
        n_threads: how many shards at a time; by default as many as the machine has cores, more over a network.

    Raises ``SpecMismatchError`` for a corpus that the dataset is not made from.
    """
    chosen = dataset.reader.manifest.shards if shards is None else list(shards)
    whole = _sampled(dataset.reader.manifest.shards, sample) if deep else set()
    expected = None if corpus is None else _from_corpus(dataset, corpus)
    reports = [VerifyReport(corpus=corpus is not None)]
    with Workers(n_threads or thread_count(dataset.store.local)) as workers:

        def check(shard: int) -> VerifyReport:
            found = ShardCheck(dataset, shard, shard in whole, expected).run()
            counts = {name: value for name, value in vars(found).items() if name != "problems"}
            return VerifyReport(n_shards=1, n_deep=int(shard in whole), problems=tuple(found.problems), **counts)

        for report in workers.map(check, chosen):
            reports.append(report)
            if on_progress is not None:
                on_progress(report.nbytes)
    return merged(reports) if shards is not None else completed(dataset, reports, deep)


def completed(dataset: ActivationDataset, reports: Sequence[VerifyReport], deep: bool) -> VerifyReport:
    """Return what reports of all shards say together, and what is to be found beside the shards.

    That are metadata, objects of no known name, shards that are missing and, ``deep``, the manifest.
    """
    problems = list(layout_problems(dataset.store))
    # The manifest reads records too; what is wrong with those has been found.
    if deep and not any(problem.kind == "record" for report in reports for problem in report.problems):
        try:
            for _ in dataset.reader.manifest.tables():
                pass
        except DataError as error:
            problems.append(Problem(kind="manifest", shard=None, message=str(error)))
    beside = VerifyReport(problems=tuple(problems), missing_shards=tuple(dataset.missing_shards))
    return merged([*reports, beside])


def _sampled(shards: Sequence[int], sample: float) -> set[int]:
    if not 0 < sample <= 1:
        raise BadInputError(f"sample = {sample} is not a share; use a number above 0 up to 1, e.g. 0.01 for 1 %")
    keys = mix64(np.asarray(shards, dtype=np.uint64))
    return {shards[i] for i in np.argsort(keys, kind="stable")[: math.ceil(sample * len(shards))]}


def _from_corpus(dataset: ActivationDataset, corpus: Corpus) -> Expected:
    spec = dataset.spec
    if corpus.corpus_id != spec.corpus_id:
        raise SpecMismatchError(
            f"{dataset.url} is made from corpus {spec.corpus_id[:12]}..., {corpus.store.url} is "
            f"{corpus.corpus_id[:12]}...: give the one that it was made from, or none"
        )
    require_one_corpus(dataset.header.chain, corpus.chain, dataset.url, corpus.store.url)
    index, one_at_a_time = corpus.row_index(spec.split, spec.keep), threading.Lock()

    def expected(record: ShardRecord) -> Mapping[str, npt.NDArray[Any]]:
        # The rows that were planned when the shard was committed: a short last one has grown since, or will.
        space = spec.row_space(record.first_row + record.n_rows)
        with one_at_a_time:
            rows = ShardRows.of(corpus, index, spec, space, record.shard)
        return rows.columns()

    return expected


def open_damaged(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[ActivationDataset, VerifyReport]:
    """Open a dataset of which commit records or the manifest may be damaged; return it and that damage.

    The dataset has the shards of the sound records. Raises as ``actlake.open`` for a damaged ``spec.json``.
    """
    try:
        return open_dataset(url, storage_options), VerifyReport()
    except CorruptObjectError as error:
        store = Store(url, storage_options)
        header = Header.read(store)
        message = str(error)
    records, problems = [], []
    for shard in _committed(store):
        try:
            records.append(read_record(store, shard))
        except CorruptObjectError as error:
            problems.append(Problem(kind="record", shard=shard, message=str(error)))
    if not problems:
        problems.append(Problem(kind="manifest", shard=None, message=message))
    dataset = ActivationDataset(store, header, Manifest.of(records))
    return dataset, VerifyReport(problems=tuple(problems))


def _committed(store: Store) -> Iterator[int]:
    for folder in store.folders("commits"):
        for name in store.names(f"commits/{folder}"):
            match = re.fullmatch(r"([0-9]{10})\.json", name)
            if match is not None and commit_key(int(match[1])) == f"commits/{folder}/{name}":
                yield int(match[1])


def repair(dataset: ActivationDataset, report: VerifyReport) -> tuple[int, ...]:
    """Make the damaged shards of a report invisible, so that the next ingestion builds them; return them.

    Metadata are written again; a damaged manifest is deleted, for the next ingestion writes it from the commits.
    """
    kinds = {problem.kind for problem in report.problems}
    if "manifest" in kinds:
        for key in ("root.json", *(f"manifest/{name}" for name in dataset.store.names("manifest"))):
            dataset.store.delete(key)
    for shard in report.bad_shards:
        uncommit(dataset.store, shard)
    if "metadata" in kinds:
        prepare(dataset.store, dataset.header)
    return report.bad_shards
