"""Building corpora: texts to sequences in a fixed order, at a place where ``storage.corpus`` reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from actlake.ingest import corpus_build
from actlake.ingest.corpus_build import BuildJob, Built, Engine, Hear, Local, Replying
from actlake.ingest.corpus_cuts import publish
from actlake.ingest.corpus_spill import remove
from actlake.ingest.corpus_write import Tally
from actlake.ingest.documents import ON_BAD, BadDocument
from actlake.ingest.sources import describe_sources
from actlake.ingest.tokenising import Progress, Tokenizer
from actlake.storage.corpus import FORMAT, Corpus
from actlake.storage.corpus_files import QUARANTINE_COPY, QUARANTINE_STEM
from actlake.storage.corpus_segments import Segment, conflict, segment_id
from actlake.storage.corpus_spec import REDACTIONS_VERSION, SEGMENTS_VERSION, SPLITS, CorpusSpec, SourceFile, SplitInfo
from actlake.storage.errors import (
    BadInputError,
    MissingExtraError,
    NotFoundError,
    SourceError,
    SpecMismatchError,
)
from actlake.storage.stores import Store


def build_corpus(
    store: Store,
    spec: CorpusSpec,
    tokenizer: Tokenizer,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    sequences: Callable[[int, int], None] | None = None,
    on_bad: str = "raise",
    append: bool = False,
    engine: Engine | None = None,
    load: Callable[[], Tokenizer] | None = None,
    reply: Replying | None = None,
) -> Corpus:
    """Build the corpus at that place, or open the one that is there; return it.

    A corpus of the same definition that holds ``max_tokens`` already is opened as it is, even a larger one, and even
    where its sources cannot be reached; a smaller one is extended. With ``append``, files and sources that are new
    become a segment after what is there. Until ``corpus.json`` is replaced, what was there before stays whole, and of
    several builds at once the largest stays. What is tokenised is kept below ``building/`` until the build ends, so
    that one that broke off is taken up.

    ``storage_options`` are those of the sources. ``progress(documents, tokens)`` is called after each batch of
    documents, ``sequences(written, of all)`` after each file. Bad documents are raised, or with ``on_bad =
    "quarantine"`` put aside. ``engine`` says where the work is done, by default in this process; one in other
    processes gets the tokenizer by ``load``. ``reply`` generates replies and stores them, where the spec wants some.

    Raises ``SourceError`` for unusable sources, or such that changed since the corpus was built;
    ``SpecMismatchError`` where another corpus lies; ``BadInputError`` for a tokenizer without the BOS asked for, and
    for a metadata field that no document has.
    """
    if on_bad not in ON_BAD:
        raise BadInputError(f"on_bad = {on_bad!r} is not one of {', '.join(ON_BAD)}")
    corpus_build.bos_of(spec, tokenizer)
    present = _present(store, spec, tokenizer)
    if present is not None and on_bad == "raise":
        _require_clean(present)
    try:
        files = describe_sources(spec.sources, storage_options=storage_options)
    except (SourceError, MissingExtraError):
        if present is not None and present.holds(spec.max_tokens) and not _new_sources(present, spec):
            return present
        raise
    extent = _extent(store, present, spec, files, append)
    if extent is None:
        assert present is not None
        return present
    nbytes = sum(file.nbytes for file in extent.files)
    job = BuildJob(
        store=store,
        spec=spec,
        files=extent.files,
        tokenizer=tokenizer,
        engine=engine if engine is not None and nbytes >= engine.least_nbytes else Local(),
        load=load or (lambda: tokenizer),
        on_bad=on_bad,
        storage_options=storage_options or {},
        base=extent.base,
        present=present,
        hear=Hear(documents=progress, sequences=sequences),
        reply=reply,
    )
    try:
        built = corpus_build.build(job, lambda digest: _require_texts(present, job, digest))
    except NotFoundError:
        # A build that ended beside this one took away what both kept: now its corpus is there to begin with.
        now = _present(store, spec, tokenizer)
        if now is None or (present is not None and now.splits == present.splits):
            raise
        return build_corpus(
            store,
            spec,
            tokenizer,
            storage_options=storage_options,
            progress=progress,
            sequences=sequences,
            on_bad=on_bad,
            append=append,
            engine=engine,
            load=load,
            reply=reply,
        )
    # Another build may have ended there since.
    _require_texts(_present(store, spec, tokenizer), job, built.digest)
    segments = (*extent.base, _segment(job, built))
    corpus = Corpus(store, publish(store, _header(job, built, segments)))
    if conflict(corpus.chain, [segment.segment_id for segment in segments]) is not None:
        raise SourceError(f"other documents were appended to {store.url} at the same time; run this build again")
    _write_quarantine(corpus)
    remove(store)
    return corpus


def _write_quarantine(corpus: Corpus) -> None:
    """Put the list of bad documents under the name that people look for, beside the listed file that readers use."""
    for key in corpus.files:
        if key.startswith(QUARANTINE_STEM):
            corpus.store.write(QUARANTINE_COPY, corpus.store.read(key))


def _require_clean(present: Corpus) -> None:
    bad = [BadDocument(**one) for one in present.quarantine().slice(0, 1).to_pylist()]
    if bad:
        raise SourceError(
            f"the corpus at {present.store.url} put bad documents aside, the first is {bad[0]}; set on_bad = "
            "'quarantine' to use it, or mend them and build it at another place"
        )


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """What is to be built: the files of the last segment, and the segments before it."""

    files: Sequence[SourceFile]
    base: tuple[Segment, ...] = ()


def _present(store: Store, spec: CorpusSpec, tokenizer: Tokenizer) -> Corpus | None:
    """Return the corpus that is there; raise ``SpecMismatchError`` for one of other rules."""
    try:
        present = Corpus.open(store)
    except NotFoundError:
        return None
    known = [set(sources) for sources in accumulate((part.sources for part in present.segments), _union)]
    asked = set(spec.sources)
    same_sources = asked in known or asked > known[-1]
    compared = replace(present.spec, sources=spec.sources) if same_sources else present.spec
    if differences := compared.differences(spec):
        if present.spec.tokenizer != spec.tokenizer:
            differences.append(_first_differing_piece(present, tokenizer))
        raise SpecMismatchError(
            f"another corpus lies at {store.url} ({'; '.join(differences)}); ask for that one, or choose another place"
        )
    return present


def _union(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return (*one, *other)


def _first_differing_piece(present: Corpus, tokenizer: Tokenizer) -> str:
    """Say which token id is the first to stand for another piece."""
    theirs, mine = present.pieces(), corpus_build.pieces_of(tokenizer)
    for i, (there, here) in enumerate(zip(theirs, mine, strict=False)):
        if there != here:
            return f"the first token id that differs is {i}: {there!r} there, {here!r} asked"
    if len(theirs) != len(mine):
        return f"the vocabulary has {len(theirs)} pieces there, {len(mine)} asked; all before are the same"
    return "all pieces of the vocabulary are the same: special ids, or the way texts are cut into pieces, differ"


def _new_sources(present: Corpus, spec: CorpusSpec) -> set[str]:
    return set(spec.sources) - {source for segment in present.segments for source in segment.sources}


def _extent(
    store: Store, present: Corpus | None, spec: CorpusSpec, files: Sequence[SourceFile], append: bool
) -> _Extent | None:
    """Return what is to be built, None where all is there; raise where the sources changed."""
    if present is None:
        return _Extent(files=files)
    known = list(accumulate((segment.source_files for segment in present.segments), lambda one, other: (*one, *other)))
    if any(set(files) == set(before) for before in known):
        whole = present.holds(spec.max_tokens) or set(files) != set(known[-1])
        return None if whole else _Extent(files=present.segments[-1].source_files, base=tuple(present.segments[:-1]))
    changed = set(known[-1]) ^ set(files)
    if append and set(files) > set(known[-1]):
        _require_appendable(present, spec)
        return _Extent(files=[file for file in files if file in changed], base=tuple(present.segments))
    names = sorted({str(file) for file in changed})
    remedy = ", or append the new files with 'actlake corpus build'" if set(files) > set(known[-1]) else ""
    raise SourceError(_changed(store, ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""), remedy))


def _require_appendable(present: Corpus, spec: CorpusSpec) -> None:
    if not present.complete:
        raise BadInputError(
            f"{present.store.url} is cut by max_tokens = {present.spec.max_tokens:,}: documents are appended to a "
            "whole corpus; build it without max_tokens from the sources it has, then append"
        )
    if spec.weights or spec.quotas:
        raise BadInputError(
            f"{present.store.url} is a mixture by weights or quotas, which holds for all of its documents at once; "
            "build the larger mixture at another place"
        )


def _require_texts(present: Corpus | None, job: BuildJob, digest: str) -> None:
    """Raise where the corpus that is there holds other documents than those that were read."""
    ids = [*(segment.segment_id for segment in job.base), _segment_id(job, digest)]
    if present is None or (at := conflict(present.chain, ids)) is None:
        return
    if at == len(job.base) and set(present.segments[at].source_files) == set(job.files):
        raise SourceError(_changed(present.store, "texts of the same size differ"))
    raise SourceError(f"other documents were appended to {present.store.url} at the same time; run this build again")


def _changed(store: Store, what: str, remedy: str = "") -> str:
    return (
        f"sources changed since the corpus at {store.url} was built: {what}; "
        f"restore them, or build the new text at another place{remedy}"
    )


def _segment(job: BuildJob, built: Built) -> Segment:
    earlier = {source for segment in job.base for source in segment.sources}
    return Segment(
        segment_id=_segment_id(job, built.digest),
        sources=tuple(source for source in job.spec.sources if source not in earlier),
        source_files=tuple(job.files),
        splits=built.splits,
    )


def _segment_id(job: BuildJob, digest: str) -> str:
    if not job.base:
        return job.spec.corpus_id(digest)
    return segment_id(job.base[-1].segment_id, job.spec.rules, digest)


def _header(job: BuildJob, built: Built, segments: Sequence[Segment]) -> dict[str, Any]:
    """Return the content of ``corpus.json``."""
    several = len(segments) > 1
    first = job.spec if job.present is None or not several else replace(job.spec, sources=segments[0].sources)
    splits = {split: _total([segment.splits[split] for segment in segments], job.spec).to_json() for split in SPLITS}
    header = {
        "format": FORMAT,
        "format_version": SEGMENTS_VERSION if several else job.spec.format_version,
        "corpus_id": segments[0].segment_id,
        "definition_id": first.definition_id,
        "spec": job.spec.to_json(),
        "complete": built.complete,
        "sequences_per_file": corpus_build.SEQUENCES_PER_FILE,
        "sequences_per_row_group": corpus_build.SEQUENCES_PER_ROW_GROUP,
        "splits": splits,
        "files": {key: {"nbytes": file.nbytes, "crc32c": file.crc32c} for key, file in built.files.items()},
        "source_files": [asdict(file) for segment in segments for file in segment.source_files],
    }
    if built.mixture:
        header["mixture"] = built.mixture
    if job.present is not None and job.present.redactions:
        header |= {"format_version": REDACTIONS_VERSION, "redactions": job.present.redactions}
    if several:
        header["segments"] = [segment.to_json() for segment in segments]
    return header


def _total(parts: Sequence[SplitInfo], spec: CorpusSpec) -> SplitInfo:
    tally = Tally.empty(spec)
    for part in parts:
        tally.add(Tally.of(part))
    return tally.info()
