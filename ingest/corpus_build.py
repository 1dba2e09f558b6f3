"""One build of a corpus, from its sources' files to its sequence files: map, merge, lay out, write.

The stages are plain functions over lists of items; an engine decides in which processes they run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from actlake.ingest.corpus_layout import (
    Counts,
    SelectOrder,
    SplitLayout,
    count_bucket,
    gather_buckets,
    lay_out,
    quotas_of,
    shares_of,
)
from actlake.ingest.corpus_map import PartOrder, plan_buckets, read_part, tokenise_part
from actlake.ingest.corpus_merge import Merged, MergeOrder, merge, merge_range, plan_ranges
from actlake.ingest.corpus_parts import Part, plan_parts
from actlake.ingest.corpus_spill import BUILDING, Block, Memory, PartRecord, Place, done, present_blocks
from actlake.ingest.corpus_write import Tally, WriteOrder, plan_files, write_file
from actlake.ingest.documents import BadDocument
from actlake.ingest.records import Fields
from actlake.ingest.replies import Group, ReplyBatch, missing_batches, plan_groups, reply_files, stored_batches
from actlake.ingest.sources import require_documents
from actlake.ingest.tokenising import Progress, Tokenizer
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import (
    QUARANTINE,
    QUARANTINE_STEM,
    VOCABULARY,
    VOCABULARY_STEM,
    sequence_stem,
    write_by_content,
)
from actlake.storage.corpus_segments import Segment
from actlake.storage.corpus_spec import SPLITS, CorpusSpec, SourceFile, SplitInfo
from actlake.storage.errors import BadInputError, SourceError
from actlake.storage.records import ObjectRecord
from actlake.storage.stores import Store

#: Sequences in one file and in one row group: fixed, so that the bytes follow from the sequences alone.
SEQUENCES_PER_FILE = 65_536
SEQUENCES_PER_ROW_GROUP = 1_024

#: Generates and stores batches of replies; hears how many replies they are.
Replying = Callable[[Iterator[ReplyBatch], int], None]

#: Bytes of sources that are built in this process' memory, with nothing to take up after a crash.
IN_MEMORY_NBYTES = 64 * 2**20

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Where the stages of a build run. ``remote`` says that it is in other processes, which see only stored objects.

    Sources of fewer than ``least_nbytes`` are better built in this process.
    """

    @property
    def least_nbytes(self) -> int:
        """The least bytes of sources that are worth it."""

    @property
    def remote(self) -> bool:
        """Whether functions and items are pickled."""

    def run(self, make: Callable[[], Callable[[T], R]], items: Sequence[T]) -> Iterator[R]:
        """Yield the function's value for each item, in their order; each process makes the function once."""


class Local:
    """Runs everything in this process, one item after another."""

    remote = False
    least_nbytes = 0

    def run(self, make: Callable[[], Callable[[T], R]], items: Sequence[T]) -> Iterator[R]:
        """Yield the function's value for each item."""
        return map(make(), items)


@dataclass(frozen=True, kw_only=True)
class Hear:
    """Who hears how a build goes: documents and tokens that are done, and sequences of how many are written."""

    documents: Progress | None = None
    sequences: Callable[[int, int], None] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BuildJob:
    """One build: of which files, with what, where, and what it continues.

    ``base`` are the segments that come before the one that is built, of the corpus ``present``; both may be empty.
    ``load`` gives the tokenizer in another process. ``reply`` completes prompts, where the spec wants that.
    """

    store: Store
    spec: CorpusSpec
    files: Sequence[SourceFile]
    tokenizer: Tokenizer
    engine: Engine
    load: Callable[[], Tokenizer]
    on_bad: str = "raise"
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    base: tuple[Segment, ...] = ()
    present: Corpus | None = None
    hear: Hear = field(default_factory=Hear)
    reply: Replying | None = None

    @property
    def folder(self) -> str:
        """Where runs lie below the corpus."""
        return f"{BUILDING}/{self.spec.definition_id}"

    @property
    def nbytes(self) -> int:
        """The size of the sources."""
        return sum(file.nbytes for file in self.files)

    def n_base(self, split: str) -> int:
        """Return how many sequences come before those of this build."""
        return sum(segment.splits[split].n_sequences for segment in self.base)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build stored: the digest of its documents, sizes of its splits, and every listed file."""

    digest: str
    complete: bool
    splits: Mapping[str, SplitInfo]
    files: Mapping[str, ObjectRecord]
    mixture: Mapping[str, Mapping[str, Any]]


def bos_of(spec: CorpusSpec, tokenizer: Tokenizer) -> int | None:
    """Return the id to prepend, None for none; raise ``BadInputError`` for a tokenizer that lacks the BOS asked for."""
    if not spec.prepend_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise BadInputError("prepend_bos = true, but this tokenizer has no BOS token; set prepend_bos = false")
    return int(tokenizer.bos_token_id)


def build(job: BuildJob, check: Callable[[str], None]) -> Built:
    """Write everything but ``corpus.json``; before anything is written, ``check`` gets the digest of the documents.

    Raises ``SourceError`` for unusable sources, and where no document is left to train on.
    """
    place: Place = job.store if job.engine.remote or job.nbytes > IN_MEMORY_NBYTES else Memory()
    order = PartOrder(
        spec=job.spec,
        place=place,
        folder=job.folder,
        n_buckets=plan_buckets(job.nbytes, job.spec.holdout),
        on_bad=job.on_bad,
        replies=job.store if job.spec.replies else None,
        storage_options=job.storage_options,
    )
    records = _tokenise(job, order)
    _check(job, records)
    tokens_of = _summed([record.tokens_by_source for record in records])
    shares = shares_of(job.spec.weights, job.spec.sources, tokens_of)
    merged = _merge(job, place, records, shares)
    check(merged.digest)
    select = SelectOrder(place=place, spec=job.spec, dropped=merged.dropped, shares=shares)
    layouts = {split: _lay_out(job, order, records, select, split) for split in SPLITS}
    if layouts["train"].n_sequences == 0:
        raise SourceError(
            f"all {merged.n_documents} documents are held out by holdout = {job.spec.holdout}; "
            "lower it or add documents"
        )
    bad = [one for record in records for one in record.bad] + list(merged.bad)
    splits, files = _write(job, select, layouts, bad)
    return Built(
        digest=merged.digest,
        complete=layouts["train"].complete,
        splits=splits,
        files=files,
        mixture=_mixture(job.spec, tokens_of, shares) if job.spec.weights or job.spec.quotas else {},
    )


# --- The stages ---------------------------------------------------------------------------------------------------


def part_worker(
    order: PartOrder, load: Callable[[], Tokenizer], progress: Progress | None = None
) -> Callable[[Part], PartRecord]:
    """Return what does a part, with a tokenizer of its own."""
    return partial(tokenise_part, order=order, tokenizer=load(), progress=progress)


def _tokenise(job: BuildJob, order: PartOrder) -> list[PartRecord]:
    """Do the parts that are not done; return the records of all, in the order of the sources."""
    parts = plan_parts(job.files, job.storage_options)
    known = {part.number: record for part in parts if (record := done(order.place, order.folder, part)) is not None}
    total = [0, 0]

    def count(n_documents: int, n_tokens: int) -> None:
        total[0] += n_documents
        total[1] += n_tokens
        if job.hear.documents is not None and n_documents:
            job.hear.documents(*total)

    for record in known.values():
        count(record.n_documents, record.n_tokens)
    missing = [part for part in parts if part.number not in known]
    if missing:
        if order.replies is not None:
            _reply(job, order, missing)
        make = partial(part_worker, order, job.load, None if job.engine.remote else count)
        for part, record in zip(missing, job.engine.run(make, missing), strict=True):
            known[part.number] = record
            if job.engine.remote:
                count(record.n_documents, record.n_tokens)
    return [known[part.number] for part in parts]


def _reply(job: BuildJob, order: PartOrder, parts: Sequence[Part]) -> None:
    """Have the replies generated that are not stored; before the first, every prompt of these parts is looked at."""

    def groups() -> Iterator[Group]:
        fields = Fields.of(job.spec)
        documents = (document for part in parts for document in read_part(part, fields, order))
        return plan_groups(documents, job.tokenizer, job.spec)

    stored, n_replies, n_missing = stored_batches(job.store), 0, 0
    for group in groups():
        bad = next((one for one in group.documents if isinstance(one, BadDocument)), None)
        if bad is not None and job.on_bad == "raise":
            raise bad.error()
        n_replies += sum(len(batch.wanted) for batch in group.batches)
        n_missing += sum(len(batch.wanted) for batch in group.batches if batch.key not in stored)
    if n_replies == 0:
        raise SourceError(
            "replies: the sources hold no prompt that can be used, that is a text, or a chat whose last message is a "
            "user's; leave corpus.replies out, or name other sources"
        )
    if n_missing == 0:
        return
    if job.reply is None:
        raise BadInputError("this corpus has prompts without replies; build it with what generates them (reply=...)")
    job.reply(missing_batches(groups(), stored), n_missing)


def _check(job: BuildJob, records: Sequence[PartRecord]) -> None:
    """Raise for sources without documents, and for fields that no record has."""
    fields = Fields.of(job.spec)
    n_documents = _summed([record.documents_by_source for record in records])
    for record in records:
        fields.seen.fields.update(record.seen)
        fields.seen.metadata.update(record.found)
    for source in sorted({file.source for file in job.files}):
        require_documents(source, n_documents.get(job.spec.sources.index(source), 0), fields)
    if not job.base:
        fields.require_seen()


def _merge(job: BuildJob, place: Place, records: Sequence[PartRecord], shares: Mapping[int, float]) -> Merged:
    blocks: list[Block] = [block for record in records for block in record.blocks]
    if job.present is not None and job.base:
        blocks += present_blocks(job.present, {split: job.n_base(split) for split in SPLITS}, place, job.folder)
    order = MergeOrder(place=place, sources=job.spec.sources, seed=job.spec.seed, shares=shares)
    return merge(job.engine.run(partial(partial, merge_range, order=order), plan_ranges(blocks)), job.on_bad)


def _lay_out(
    job: BuildJob, order: PartOrder, records: Sequence[PartRecord], select: SelectOrder, split: str
) -> SplitLayout:
    limited = _limited(job, select, split)
    first = 0 if split == SPLITS[0] else order.n_buckets[SPLITS[0]]
    slices = [item for record in records for item in record.slices]
    buckets, counts = gather_buckets(slices, first, order.n_buckets[split], limited.n_bos)
    found: Sequence[Counts] = counts
    if select.filters:
        found = list(job.engine.run(partial(partial, count_bucket, order=select), buckets))
    return lay_out(buckets, found, limited, job.n_base(split))


def _limited(job: BuildJob, select: SelectOrder, split: str) -> SelectOrder:
    limit = job.spec.max_tokens if split == SPLITS[0] else None
    if limit is not None:
        limit = max(0, limit - sum(segment.splits[split].n_tokens for segment in job.base))
    return select.limited(quotas_of(job.spec, split), limit)


def _write(
    job: BuildJob, select: SelectOrder, layouts: Mapping[str, SplitLayout], bad: Sequence[BadDocument]
) -> tuple[dict[str, SplitInfo], dict[str, ObjectRecord]]:
    """Write the vocabulary, the sequences and the bad documents; return the new sequences' sizes, and all files."""
    old = {} if job.present is None or not job.base else job.present.files
    files = {key: old[key] for key in old if key.startswith(VOCABULARY_STEM)}
    files |= {} if files else write_vocabulary(job.store, job.tokenizer)
    n_total = sum(layout.n_sequences for layout in layouts.values())
    splits, n_done = {}, 0
    for split, layout in layouts.items():
        order = WriteOrder(
            store=job.store,
            select=_limited(job, select, split),
            bos=bos_of(job.spec, job.tokenizer),
            per_group=SEQUENCES_PER_ROW_GROUP,
            present=job.present if job.base else None,
            redactions={} if job.present is None else job.present.redactions,
        )
        tasks = plan_files(split, layout, job.n_base(split), SEQUENCES_PER_FILE)
        files |= _kept(old, split, tasks[0].first if tasks else job.n_base(split))
        tally = Tally.empty(job.spec)
        for written in job.engine.run(partial(partial, write_file, order=order), tasks):
            files[written.key] = written.record
            tally.add(written.tally)
            n_done += written.tally.n_sequences
            if job.hear.sequences is not None:
                job.hear.sequences(n_done, n_total)
        splits[split] = tally.info()
    replies = {} if job.spec.replies is None else reply_files(job.store)
    return splits, files | replies | _write_quarantine(job, bad)


def _kept(old: Mapping[str, ObjectRecord], split: str, stop: int) -> dict[str, ObjectRecord]:
    """Return the sequence files of a split whose sequences are all before ``stop``."""
    stems = tuple(sequence_stem(split, first) for first in range(0, stop, SEQUENCES_PER_FILE))
    return {key: record for key, record in old.items() if stems and key.startswith(stems)}


def _write_quarantine(job: BuildJob, bad: Sequence[BadDocument]) -> dict[str, ObjectRecord]:
    table = QUARANTINE.empty_table() if not job.base or job.present is None else job.present.quarantine()
    new = pa.table({name: [getattr(one, name) for one in bad] for name in QUARANTINE.names}, schema=QUARANTINE)
    rows = pa.concat_tables([table, new.sort_by([(name, "ascending") for name in ("source", "place", "document")])])
    return write_by_content(job.store, QUARANTINE_STEM, QUARANTINE, [rows.combine_chunks()]) if len(rows) else {}


def write_vocabulary(store: Store, tokenizer: Tokenizer) -> dict[str, ObjectRecord]:
    """Write the pieces by token id."""
    pieces = pieces_of(tokenizer)
    table = pa.table({"token_id": range(len(pieces)), "piece": pieces}, schema=VOCABULARY)
    return write_by_content(store, VOCABULARY_STEM, VOCABULARY, [table])


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    """Return a tokenizer's vocabulary by token id as readable text; SentencePiece's mark of a space becomes a space."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return ["" if piece is None else piece.replace("\u2581", " ") for piece in pieces]


def _mixture(spec: CorpusSpec, n_tokens: Mapping[int, int], shares: Mapping[int, float]) -> dict[str, dict[str, Any]]:
    """Return what ``corpus.json`` says of the mixture: by source its tokens of text, and the share that is kept."""
    return {
        source: {"n_tokens": n_tokens.get(i, 0), "share": shares.get(i, 1.0)} for i, source in enumerate(spec.sources)
    }


def _summed(counts: Sequence[Mapping[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for one in counts:
        for key, n in one.items():
            total[key] = total.get(key, 0) + n
    return total
