"""Building corpora: texts to sequences in a fixed order, at a place where ``storage.corpus`` reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from actlake.ingest import corpus_build
from actlake.ingest.corpus_cuts import publish
from actlake.ingest.sources import describe_sources, read_documents
from actlake.ingest.tokenising import Progress, Tokenizer, tokenise
from actlake.storage.corpus import FORMAT, Corpus
from actlake.storage.corpus_spec import CorpusSpec, SourceFile
from actlake.storage.errors import NotFoundError, SourceError, SpecMismatchError
from actlake.storage.stores import Store


def build_corpus(
    store: Store,
    spec: CorpusSpec,
    tokenizer: Tokenizer,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Build the corpus at that place, or open the one that is there; return it.

    A corpus of the same definition that holds ``max_tokens`` already is opened as it is, even a larger one; a smaller
    one is extended. Until ``corpus.json`` is replaced, what was there before stays whole, and of several builds at once
    the largest stays. ``storage_options`` are those of the sources. ``progress(documents, tokens)`` is called after
    each batch of documents.

    Raises ``SourceError`` for unusable sources, or such that changed since the corpus was built;
    ``SpecMismatchError`` where another corpus lies; ``BadInputError`` for a tokenizer without the BOS asked for, and
    for a metadata field that no document has.
    """
    corpus_build.bos_of(spec, tokenizer)
    source_files = describe_sources(spec.sources, storage_options=storage_options)
    present = _present(store, spec, source_files)
    if present is not None and present.holds(spec.max_tokens):
        return present
    read = read_documents(
        spec.sources, text_field=spec.text_field, metadata=spec.metadata, storage_options=storage_options
    )
    documents = tokenise(read, tokenizer, progress)
    corpus_id = spec.corpus_id(documents.digest)
    _require_texts(present, corpus_id)
    objects = corpus_build.write_objects(store, spec, documents, tokenizer)
    header = {
        "format": FORMAT,
        "format_version": spec.format_version,
        "corpus_id": corpus_id,
        "definition_id": spec.definition_id,
        "spec": spec.to_json(),
        **objects,
        "source_files": [asdict(file) for file in source_files],
    }
    # Another build may have ended there since.
    _require_texts(_present(store, spec, source_files), corpus_id)
    return Corpus(store, publish(store, header))


def _present(store: Store, spec: CorpusSpec, source_files: Sequence[SourceFile]) -> Corpus | None:
    try:
        present = Corpus.open(store)
    except NotFoundError:
        return None
    if differences := present.spec.differences(spec):
        raise SpecMismatchError(
            f"another corpus lies at {store.url} ({'; '.join(differences)}); ask for that one, or choose another place"
        )
    changed = set(present.source_files) ^ set(source_files)
    if changed:
        names = sorted({str(file) for file in changed})
        raise SourceError(_changed(store, ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))
    return present


def _require_texts(present: Corpus | None, corpus_id: str) -> None:
    if present is not None and present.corpus_id != corpus_id:
        raise SourceError(_changed(present.store, "texts of the same size differ"))


def _changed(store: Store, what: str) -> str:
    return (
        f"sources changed since the corpus at {store.url} was built: {what}; "
        "restore them, or build the new text at another place"
    )
