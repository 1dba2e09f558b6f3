"""What a dataset's corpus knows of its rows: document, source, labels, tokens and length of their sequences.

A dataset is read without its corpus: where that is gone, only what needs it fails. Columns are read by row groups of
the corpus, when first asked for, and the last ones kept.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import flat
from actlake.storage.corpus_segments import require_one_corpus
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.errors import BadInputError, NotFoundError, SpecMismatchError, UnknownNameError, nearest
from actlake.storage.stores import resolve_url

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset

#: Memory for columns: a label is 4 bytes a sequence, a document's id some 30.
_CACHE_NBYTES = 64 * 1024 * 1024

#: So many of the labels that exist are shown with an unknown one.
_SHOWN = 12


class CorpusRows:
    """The corpus of a dataset, by sequence numbers of its split. Thread-safe, also after a fork; pickles.

    Opened when first used. What needs it raises ``NotFoundError`` where it is gone, ``SpecMismatchError`` where another
    lies there, ``BadInputError`` for sequences that it lacks, ``DataError`` for damage.
    """

    def __init__(self, dataset: "ActivationDataset") -> None:
        self._store, self._header = dataset.store, dataset.header
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_header": self._header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._opened: Corpus | None = None
        self._pieces: list[str] = []
        self._columns: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._nbytes = 0

    # --- what there is ---

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that ``values`` and ``holds`` know: document, source, and the metadata that the corpus keeps."""
        with self._corpus() as corpus:
            return ("document", "source", *corpus.spec.metadata)

    def require_field(self, field: str) -> None:
        """Raise ``UnknownNameError`` for a field that the corpus does not keep."""
        if field not in self.fields:
            raise UnknownNameError(
                f"the corpus keeps no field {field!r}{nearest(field, self.fields)}; a job's [corpus] metadata says "
                "which fields of the documents are kept"
            )

    def require_values(self, field: str, values: Iterable[str | None]) -> None:
        """Raise ``UnknownNameError`` for a value that no document of the split has; it lists those that exist.

        Reads the column of that field until every value was seen; all of it for a value that is not there.
        """
        self.require_field(field)
        missing, seen = set(values), set[str | None]()
        for group in range(self._n_groups()):
            present = set(pc.unique(self._column(field, group)).to_pylist())
            missing -= present
            if not missing:
                return
            seen |= present
        labels = sorted(label for label in seen if label is not None)
        shown = ", ".join(map(repr, labels[:_SHOWN])) + (f", ... ({len(labels):_} in all)" if labels[_SHOWN:] else "")
        first = min(missing, key=str)
        what = f"every document has a {field!r}" if first is None else f"no document has {field} = {first!r}"
        raise UnknownNameError(f"{what} in the {self._header.spec.split} split; there are: {shown or 'none'}")

    # --- by sequence ---

    def lengths(self, sequences: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return how many tokens each of these sequences has, BOS included; int64 [n]."""
        lengths: npt.NDArray[np.int64] = self._take("length", sequences).to_numpy(zero_copy_only=False)
        return lengths

    def values(self, field: str, sequences: npt.ArrayLike) -> list[str | None]:
        """Return a field of the document of each of these sequences, None where it lacks it."""
        self.require_field(field)
        values: list[str | None] = self._take(field, sequences).to_pylist()
        return values

    def holds(self, field: str, values: Iterable[str | None], sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return bool [n]: which of these sequences are of a document with one of the values (None: without any)."""
        self.require_field(field)
        wanted = pa.array(list(values), pa.string())
        found: npt.NDArray[np.bool_] = pc.is_in(self._take(field, sequences), wanted).to_numpy(zero_copy_only=False)
        return found

    def sequence(self, number: int) -> TokenSequence:
        """Return one sequence: tokens, roles, document, window, source and metadata."""
        with self._corpus() as corpus:
            self._require_numbers(corpus, number, number)
            return corpus.sequences(self._header.spec.split, number, number + 1)[0]

    def pieces(self) -> list[str]:
        """Return the readable text of each token, by token id."""
        with self._corpus() as corpus:
            self._pieces = self._pieces or corpus.pieces()
            return self._pieces

    # --- row groups ---

    def _take(self, name: str, sequences: npt.ArrayLike) -> Any:
        """Return a column at these sequences, an Arrow array of text or numbers [n]."""
        distinct, place = np.unique(np.asarray(sequences, dtype=np.int64).reshape(-1), return_inverse=True)
        return pa.chunked_array([*self._parts(name, distinct)], _type(name)).combine_chunks().take(pa.array(place))

    def _parts(self, name: str, ascending: npt.NDArray[np.int64]) -> Iterator[Any]:
        if not len(ascending):
            return
        with self._corpus() as corpus:
            self._require_numbers(corpus, int(ascending[0]), int(ascending[-1]))
            groups, inside = np.divmod(ascending, corpus.sequences_per_group)
        for places in np.split(np.arange(len(ascending)), np.flatnonzero(np.diff(groups)) + 1):
            part = self._column(name, int(groups[places[0]])).take(pa.array(inside[places]))
            yield part if part.type == _type(name) else part.cast(_type(name))

    def _column(self, name: str, group: int) -> Any:
        with self._corpus() as corpus:
            column = self._columns.get((name, group))
            if column is None:
                column = self._read(corpus, name, group)
                self._columns[name, group] = column
                self._nbytes += column.nbytes
                while self._nbytes > _CACHE_NBYTES and len(self._columns) > 1:
                    self._nbytes -= self._columns.popitem(last=False)[1].nbytes
            self._columns.move_to_end((name, group))
            return column

    def _read(self, corpus: Corpus, name: str, group: int) -> Any:
        stored = corpus.columns(self._header.spec.split, group, ["tokens" if name == "length" else name])
        if name == "length":
            return pa.array(np.diff(flat(stored["tokens"])[1]).astype(np.int64))
        return stored[name].combine_chunks()

    def _n_groups(self) -> int:
        with self._corpus() as corpus:
            return corpus.n_groups(self._header.spec.split)

    # --- the corpus ---

    @contextmanager
    def _corpus(self) -> Iterator[Corpus]:
        if self._pid != os.getpid():
            # The lock and the open files may have been in use in the parent.
            self._forget()
        with self._lock:
            self._opened = self._opened or self._open()
            yield self._opened

    def _open(self) -> Corpus:
        store, spec = resolve_url(self._header.corpus, self._store), self._header.spec
        try:
            corpus = Corpus.open(store)
        except NotFoundError as error:
            raise NotFoundError(
                f"{self._store.url} was made from the corpus at {store.url}, which is not there: its rows are read "
                "without it, but not their text, documents and labels; put it back there, or build it again with "
                "'actlake ingest' and the dataset's job file"
            ) from error
        if corpus.corpus_id != spec.corpus_id:
            raise SpecMismatchError(
                f"{self._store.url} was made from corpus {spec.corpus_id[:12]}..., but at {store.url} lies "
                f"{corpus.corpus_id[:12]}...; put the right one there"
            )
        require_one_corpus(self._header.chain, corpus.chain, self._store.url, store.url)
        return corpus

    def _require_numbers(self, corpus: Corpus, first: int, last: int) -> None:
        n_sequences = corpus.splits[self._header.spec.split].n_sequences
        if first < 0 or last >= n_sequences:
            outside = first if first < 0 else last
            raise BadInputError(
                f"sequence {outside} is not in the corpus at {corpus.store.url}; its {self._header.spec.split} split "
                f"has the sequences 0..{n_sequences - 1}"
            )


def _type(name: str) -> pa.DataType:
    return pa.int64() if name == "length" else pa.string()
