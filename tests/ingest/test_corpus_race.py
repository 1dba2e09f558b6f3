"""Two builds of one large corpus at once: the one that ends first takes away what both kept, and both end well."""

from pathlib import Path
from typing import Any

import pytest
from fakes import make_corpus, write_documents

from actlake.ingest import corpus_build
from actlake.storage.corpus import Corpus
from actlake.storage.errors import NotFoundError
from actlake.storage.stores import Store


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["_tokenise", "_merge", "_lay_out", "_write"])
def test_a_build_that_ends_inside_another_leaves_it_whole(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_documents(tmp_path / "texts")
    make_corpus(Store(tmp_path / "alone"), source)
    # As a corpus whose sources do not fit into memory: what is tokenised lies below building/.
    monkeypatch.setattr(corpus_build, "IN_MEMORY_NBYTES", -1)
    real, others = getattr(corpus_build, stage), list[Corpus]()

    def beside(*arguments: Any, **named: Any) -> Any:
        if not others:
            with monkeypatch.context() as patched:
                patched.setattr(corpus_build, stage, real)
                others.append(make_corpus(Store(tmp_path / "both"), source))
        return real(*arguments, **named)

    monkeypatch.setattr(corpus_build, stage, beside)
    corpus = make_corpus(Store(tmp_path / "both"), source)
    assert corpus.corpus_id == others[0].corpus_id
    assert files(tmp_path / "both") == files(tmp_path / "alone")


def test_what_is_lost_without_another_build_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = write_documents(tmp_path / "texts"), corpus_build._merge
    monkeypatch.setattr(corpus_build, "IN_MEMORY_NBYTES", -1)

    def lossy(job: Any, *rest: Any) -> Any:
        for path in (tmp_path / "corpus/building").rglob("*"):
            if path.is_file():
                path.unlink()
        return real(job, *rest)

    monkeypatch.setattr(corpus_build, "_merge", lossy)
    with pytest.raises(NotFoundError, match=r"nothing stored at .*building"):
        make_corpus(Store(tmp_path / "corpus"), source)
