"""The stored row index of a corpus: what of it cannot be is named, with the remedy."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fakes import make_corpus, write_documents

from actlake.storage.corpus import Corpus
from actlake.storage.corpus_files import ROW_INDEX, write_parquet
from actlake.storage.errors import CorruptObjectError
from actlake.storage.rowspace import KeepRule
from actlake.storage.stores import Store


@pytest.mark.parametrize(
    ("first_row", "why"),
    [([0, None, 5], "first_row lacks values"), ([0, 5, 3], "falls somewhere"), ([], "must be one-dimensional")],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, first_row: list[Any], why: str) -> None:
    corpus, keep = (
        make_corpus(Store(tmp_path / "corpus"), write_documents(tmp_path / "texts", n_documents=5)),
        KeepRule(),
    )
    sound = corpus.row_index("train", keep).first_row.tolist()
    key, schema = f"rows/{keep.keep_id}/train.parquet", ROW_INDEX.with_metadata({"corpus_id": corpus.corpus_id})
    write_parquet(corpus.store, key, schema, [pa.table({"first_row": first_row}, schema=schema)])
    with pytest.raises(CorruptObjectError, match=f"{key} is damaged .*{why}.*delete it: it is made again"):
        Corpus.open(corpus.store).row_index("train", keep)
    corpus.store.delete(key)
    assert Corpus.open(corpus.store).row_index("train", keep).first_row.tolist() == sound
