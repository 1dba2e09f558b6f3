"""Documents taken out of a corpus: what stays of their sequences, so that no other row moves.

A redacted sequence keeps its place, its length and its roles. Its tokens become ``REDACTED``, but for those that say
nothing of the text: BOS, marks of a chat template, and ids that keep rules leave out, without which the sequence would
get more rows. All rows of such a sequence are void.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.storage.corpus_files import SEQUENCES, TURNS, flat
from actlake.storage.corpus_spec import REDACTED
from actlake.storage.rowspace import ROLES

#: Shown in its place.
REDACTED_PIECE = "\u2588"

#: By sha256 of the document's id: the token ids that stay.
Redactions = Mapping[str, Sequence[int]]


def hash_of(document: str) -> str:
    """Return what names a redacted document in ``corpus.json``: the sha256 of its id, in hex."""
    return hashlib.sha256(document.encode()).hexdigest()


def redacted_name(document: str) -> str:
    """Return the id that the sequences of a redacted document bear."""
    return f"redacted:{hash_of(document)[:16]}"


def piece_of(pieces: Sequence[str], token: int) -> str:
    """Return a token's text from the vocabulary."""
    return REDACTED_PIECE if token == REDACTED else pieces[token]


def redact(table: pa.Table, redactions: Redactions, n_bos: int) -> pa.Table:
    """Return sequences (columns of a ``sequences_schema``, labels as strings) less the text of redacted documents.

    ``n_bos`` tokens at the start of a sequence are BOS. Sequences of other documents are returned as they are.
    """
    names = table["document"].to_pylist()
    hashes = {name: hash_of(name) for name in set(names)} if redactions else {}
    chosen = np.array([hashes.get(name) in redactions for name in names], dtype=bool)
    if not chosen.any():
        return table
    tokens, offsets = flat(table["tokens"])
    roles, tokens = flat(table["roles"])[0], tokens.copy()
    for i in np.flatnonzero(chosen):
        part = slice(offsets[i], offsets[i + 1])
        _clear(tokens[part], roles[part] == ROLES["template"], redactions[hashes[names[i]]], n_bos)
    columns = {name: table[name] for name in table.column_names}
    columns["tokens"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), tokens)
    columns["document"] = [redacted_name(name) if chosen[i] else name for i, name in enumerate(names)]
    for name in set(table.column_names).difference(SEQUENCES.names, [TURNS.name] if TURNS in table.schema else []):
        columns[name] = pa.array(np.where(chosen, None, table[name].to_numpy()), pa.string())
    return pa.table(columns, schema=table.schema)


def _clear(tokens: npt.NDArray[np.int32], marks: npt.NDArray[np.bool_], kept: Sequence[int], n_bos: int) -> None:
    stays = marks | np.isin(tokens, kept)
    stays[:n_bos] = True
    # One token at least tells that the sequence is redacted.
    stays[-1] = False
    tokens[~stays] = REDACTED
