"""Takes documents out of a corpus: every file that holds one is written anew, then listed, then the old one deleted.

Run again after any interruption: what is left of the old files goes then.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.ingest.corpus_build import SEQUENCES_PER_FILE
from actlake.ingest.corpus_cuts import publish
from actlake.ingest.corpus_spill import remove
from actlake.ingest.corpus_write import encoded, plain_schema
from actlake.ingest.replies import redact_replies
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import sequence_stem, sequences_schema, write_by_content
from actlake.storage.corpus_spec import REDACTIONS_VERSION, SPLITS
from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.redaction import Redactions, hash_of, redact, redacted_name
from actlake.storage.stores import Store

I64 = npt.NDArray[np.int64]

#: Document ids among which the nearest to an unknown one is looked for.
_IDS_COMPARED = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class RedactedCorpus:
    """A corpus without some documents; ``sequences`` are the numbers of theirs by split, ascending."""

    corpus: Corpus
    sequences: Mapping[str, I64]


def redact_corpus(store: Store, documents: Sequence[str], kept_ids: Sequence[int] = ()) -> RedactedCorpus:
    """Take documents out of a corpus for good; no row of any dataset of it moves.

    ``kept_ids`` are token ids that keep rules leave out, besides BOS and marks of a chat: they stay, for in their place
    there would be rows. A corpus must not be built and redacted at the same time.

    Raises ``UnknownNameError`` for a document that the corpus does not have, before anything is changed.
    """
    corpus = Corpus.open(store)
    if not documents:
        raise BadInputError("no document is named; give at least one id")
    found = {split: _sequences_of(corpus, split, documents) for split in SPLITS}
    _require_all(corpus, documents, found)
    numbers = {split: np.flatnonzero(mask.any(axis=0)) for split, mask in found.items()}
    redactions = dict(corpus.redactions) | {
        hash_of(name): sorted({*kept_ids, *corpus.redactions.get(hash_of(name), ())}) for name in documents
    }
    files = dict(corpus.files)
    for split, chosen in numbers.items():
        for first in np.unique(chosen // SEQUENCES_PER_FILE * SEQUENCES_PER_FILE).tolist():
            stem = sequence_stem(split, first)
            written = write_by_content(store, stem, _schema(corpus), _redacted(corpus, split, first, redactions))
            files = {key: record for key, record in files.items() if not key.startswith(stem)} | written
    if corpus.spec.replies is not None:
        files |= redact_replies(store, documents, corpus.spec.metadata)
    _publish(store, files, redactions)
    _delete_old(store, files)
    return RedactedCorpus(corpus=Corpus.open(store), sequences=numbers)


def _schema(corpus: Corpus) -> pa.Schema:
    return sequences_schema(corpus.spec.metadata, chats=corpus.spec.chats)


def _sequences_of(corpus: Corpus, split: str, documents: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return bool [documents, sequences of the split]: which sequences are of which document, redacted or not."""
    n_sequences = corpus.splits[split].n_sequences
    found = np.zeros((len(documents), n_sequences), dtype=bool)
    for group, names in _document_names(corpus, split):
        first = group * corpus.sequences_per_group
        for i, name in enumerate(documents):
            is_of = pc.is_in(names, pa.array([name, redacted_name(name)]))
            found[i, first : first + len(names)] = is_of.to_numpy(zero_copy_only=False)
    return found


def _document_names(corpus: Corpus, split: str) -> Iterator[tuple[int, pa.Array]]:
    for group in range(corpus.n_groups(split)):
        yield group, corpus.columns(split, group, ["document"])["document"].combine_chunks()


def _require_all(corpus: Corpus, documents: Sequence[str], found: Mapping[str, npt.NDArray[np.bool_]]) -> None:
    for i, name in enumerate(documents):
        if not any(mask[i].any() for mask in found.values()):
            known = set[str]()
            for split in SPLITS:
                for _, names in _document_names(corpus, split):
                    if len(known) < _IDS_COMPARED:
                        known.update(names.to_pylist())
            raise UnknownNameError(f"{corpus.store.url} has no document {name!r}{nearest(name, known)}")


def _redacted(corpus: Corpus, split: str, first: int, redactions: Redactions) -> Iterator[pa.Table]:
    schema, per_group = _schema(corpus), corpus.sequences_per_group
    for group in range(first // per_group, min((first + SEQUENCES_PER_FILE) // per_group, corpus.n_groups(split))):
        stored = corpus.columns(split, group, schema.names).cast(plain_schema(schema))
        yield encoded(redact(stored, redactions, int(corpus.spec.prepend_bos)), group * per_group, schema)


def _publish(store: Store, files: Mapping[str, Any], redactions: Redactions) -> None:
    header = json.loads(store.read("corpus.json"))
    header |= {
        "format_version": REDACTIONS_VERSION,
        "files": {key: {"nbytes": file.nbytes, "crc32c": file.crc32c} for key, file in files.items()},
        "redactions": {name: list(ids) for name, ids in sorted(redactions.items())},
    }
    if publish(store, header)["files"] != header["files"]:
        raise BadInputError(f"{store.url} was extended at the same time; run this redaction again")


def _delete_old(store: Store, files: Mapping[str, Any]) -> None:
    # Not only the files that were replaced now: a redaction that broke off left others.
    for name in store.names("sequences"):
        if f"sequences/{name}" not in files:
            store.delete(f"sequences/{name}")
    remove(store)
