"""Copies a dataset, or some hook points and shards of it, between any two stores.

Each shard is copied as it was built: objects first, its commit record last. So a copy that was interrupted goes on
where it stopped, a reader of the copy sees whole shards alone, and a source that grows is followed by copying again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from actlake.jobs.transfer_corpus import CorpusCopy, CorpusReport, corpus_beside, holds_corpus
from actlake.jobs.transfer_objects import Budget
from actlake.jobs.transfer_split import SplitCopy, SplitReport, copy_covariances
from actlake.shards.prefetch import thread_count
from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.errors import BadInputError, NotFoundError, SpecMismatchError
from actlake.storage.header import Header
from actlake.storage.stores import Store, relative_url, resolve_url

#: Protocols whose first folder is a bucket.
_BUCKETS = ("gs", "gcs", "s3", "s3a", "az", "abfs")

#: Bytes of objects held at a time, unless one object alone is larger.
MEMORY_NBYTES = 2 << 30

#: What may lie at a destination that has no ``spec.json``: the rest of a copy that was interrupted at its very start.
_BEGUN = {"arrays", "heldout"}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to copy: hook points (patterns; none: all), shards ``start`` to ``stop`` of the training split, and more."""

    points: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None
    heldout: bool = True
    corpus: bool = False
    replace: bool = False

    @property
    def whole(self) -> bool:
        """Whether all shards are selected."""
        return self.stop is None and not self.start

    def shards(self, n_shards: int) -> range:
        """Return the numbers of the selected shards; raise ``BadInputError`` where there are none."""
        stop = n_shards if self.stop is None else min(self.stop, n_shards)
        if not 0 <= self.start < stop:
            raise BadInputError(
                f"--shards {self.start}:{'' if self.stop is None else self.stop} selects nothing; "
                f"the shards are 0:{n_shards}"
            )
        return range(self.start, stop)


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What became of a copy; ``corpus_url`` is where the copy says that its corpus is."""

    splits: tuple[SplitReport, ...]
    corpus: CorpusReport | None
    corpus_url: str

    @property
    def failures(self) -> tuple[str, ...]:
        """What is damaged at the source, or differs at the target."""
        return tuple(line for split in self.splits for line in split.failures)

    @property
    def n_missing(self) -> int:
        """Shards that were asked for and are not committed at the source."""
        return sum(len(split.missing_shards) for split in self.splits)


class Progress:
    """Hears how a copy goes; this one keeps quiet."""

    def begin(self, part: str, nbytes: int) -> None:
        """A split, or the corpus, of about so many bytes is next."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""


def copy_dataset(
    source: Store,
    target: Store,
    selection: Selection | None = None,
    *,
    n_workers: int | None = None,
    memory_nbytes: int = MEMORY_NBYTES,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy a dataset, or a selection of it; what the target has already is not copied again.

    Damaged objects are collected, and their shards not committed; the others are copied. ``memory_nbytes`` bounds what
    is held of objects, ``n_workers`` threads copy them.

    Raises before anything is written: ``NotFoundError`` for a source that is none, ``SpecMismatchError`` for a target
    of another spec, field by field, ``BadInputError`` for a selection that selects nothing and for a target that holds
    other things. Later ``DataError`` for a damaged corpus or covariance.
    """
    selection, progress = selection or Selection(), progress or Progress()
    target.require_writable()
    _check_places(source, target)
    n_threads, budget = n_workers or thread_count(source.local and target.local), Budget(memory_nbytes)
    splits = list(_splits(source, target, selection))
    report = None
    if selection.corpus:
        corpus = resolve_url(splits[0].old.corpus, source)
        beside = corpus_beside(target, corpus.root)
        if beside.url != corpus.url:
            report = copy_corpus(corpus, beside, n_threads, budget, progress)
    reports, place = [], _corpus_place(splits[0].old, source, target)
    for split in splits:
        url = place if isinstance(place, str) else relative_url(place, split.target)
        split.new = replace(split.new, corpus=url)
        progress.begin(split.new.spec.split, split.planned_nbytes)
        reports.append(split.run(budget, n_threads, progress.advance))
        if selection.whole:
            copy_covariances(split.source, split.target)
    return CopyReport(splits=tuple(reports), corpus=report, corpus_url=place if isinstance(place, str) else place.url)


def _corpus_place(header: Header, source: Store, target: Store) -> Store | str:
    """Return where a copy says that its corpus is: beside it where one is, else where it was."""
    beside = corpus_beside(target, header.corpus)
    if holds_corpus(beside, header.spec.corpus_id):
        return beside
    try:
        return resolve_url(header.corpus, source)
    except BadInputError:
        # A place that this user does not trust: nothing is read there, and the copy says what the source said.
        return header.corpus


def copy_any(
    source: Store,
    target: Store,
    selection: Selection,
    *,
    n_workers: int | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy a dataset, or a corpus, whatever the source is. Raises as ``copy_dataset`` and ``copy_corpus``."""
    if source.exists("spec.json") or not source.exists("corpus.json"):
        return copy_dataset(source, target, selection, n_workers=n_workers, progress=progress)
    if selection != Selection():
        raise BadInputError(
            f"{source.url} is a corpus, which is copied whole; leave out --points, --shards and the like"
        )
    target.require_writable()
    n_threads = n_workers or thread_count(source.local and target.local)
    return CopyReport(splits=(), corpus=copy_corpus(source, target, n_threads, progress=progress), corpus_url="")


def copy_corpus(
    source: Store, target: Store, n_threads: int, budget: Budget | None = None, progress: Progress | None = None
) -> CorpusReport:
    """Copy a corpus; what the target has already is not copied again. Raises as ``CorpusCopy`` and its ``run``."""
    progress, copy = progress or Progress(), CorpusCopy(source, target)
    progress.begin("corpus", copy.nbytes)
    return copy.run(budget or Budget(MEMORY_NBYTES), n_threads, progress.advance)


def _check_places(source: Store, target: Store) -> None:
    mine, theirs = source.root.strip("/") + "/", target.root.strip("/") + "/"
    if source.protocol == target.protocol and (mine.startswith(theirs) or theirs.startswith(mine)):
        raise BadInputError(f"{target.url} and {source.url} lie in each other; copy to another folder")
    if target.protocol in _BUCKETS and "/" not in target.root.strip("/"):
        raise BadInputError(f"{target.url!r} is a whole bucket; name a folder in it, e.g. '{target.url}/demo'")
    names = set(target.names())
    if "spec.json" not in names and (strange := sorted(names - _BEGUN)):
        raise BadInputError(
            f"{target.url} holds other things ({', '.join(strange[:4])}) and no dataset; name a folder of its own, "
            f"e.g. {target.url}/{source.root.rpartition('/')[2]}"
        )


def _splits(source: Store, target: Store, selection: Selection) -> Iterator[SplitCopy]:
    """Yield the splits, the training split first; raise where a target holds another dataset."""
    places = [(source, target)]
    if selection.heldout and source.exists("heldout/spec.json"):
        places.append((source.child("heldout"), target.child("heldout")))
    for place, there in places:
        old = Header.read(place)
        points = old.spec.select(selection.points) if selection.points else old.spec.point_names
        chosen = tuple(point for point in old.spec.hook_points if point.name in points)
        new = replace(old, spec=replace(old.spec, hook_points=chosen))
        _require_same_spec(there, new)
        n_shards = old.spec.row_space(old.n_rows).n_shards
        shards = selection.shards(n_shards) if place is source else range(n_shards)
        yield SplitCopy(place, there, old, new, shards, replace=selection.replace)


def _require_same_spec(target: Store, header: Header) -> None:
    try:
        stored = Header.read(target)
    except NotFoundError:
        return
    if lines := stored.spec.difference(header.spec):
        raise SpecMismatchError(
            f"{target.url} holds a dataset with another spec (here: stored, there: to be copied):\n  "
            + "\n  ".join(lines)
            + "\nname another folder"
        )
    require_one_corpus(stored.chain, header.chain, target.url, "the source")
