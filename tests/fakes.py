"""A tokenizer and a model whose every activation is a formula, so that tests compare exact arrays."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.build import ShardBuilder
from actlake.ingest.corpus import build_corpus
from actlake.storage.codecs import Codec
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.header import Header, prepare
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec
from actlake.storage.stores import Store

BF16 = np.dtype(ml_dtypes.bfloat16)
VOCABULARY = 1000


class WordTokenizer:
    """One token a word, its id a checksum of the word; BOS 2, EOS 1, PAD 0."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 2, 1, 0, 3

    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> Mapping[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [[self.token_id(word) for word in one.split()] for one in text]}

    @staticmethod
    def token_id(word: str) -> int:
        return 10 + zlib.crc32(word.encode()) % (VOCABULARY - 10)

    def __len__(self) -> int:
        return VOCABULARY

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return [f"▁w{token}" for token in ids]


def formula(tokens: npt.ArrayLike, positions: npt.ArrayLike, point: int, width: int) -> npt.NDArray[Any]:
    """Return bfloat16 [..., width]: different for every token, position, hook point and channel."""
    t, p = np.asarray(tokens, dtype=np.float64)[..., None], np.asarray(positions, dtype=np.float64)[..., None]
    channel = np.arange(width)
    return (np.sin(t * 0.37 + channel) * (1 + point) + p * 0.5 - channel).astype(BF16)


@dataclass
class FormulaModel:
    """A forward pass that computes the formula; counts its calls and fails on demand."""

    points: Sequence[PointSpec]
    shapes: list[tuple[int, int]] = field(default_factory=list)
    fail_after: int | None = None
    nan_at: int | None = None

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, /
    ) -> Mapping[str, torch.Tensor]:
        if self.fail_after is not None and len(self.shapes) >= self.fail_after:
            raise RuntimeError("planted failure")
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        tokens = input_ids.numpy()
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if position_ids is not None:
            positions = position_ids.numpy()
        out = {}
        for number, point in enumerate(self.points):
            values = formula(tokens, positions, number, point.width)
            if self.nan_at is not None:
                values[tokens == self.nan_at] = np.nan
            out[point.name] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return out


def write_documents(folder: Any, n_documents: int = 40, seed: int = 0) -> str:
    """Write documents of 1..59 words as .txt files; return the glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(n_documents):
        words = random.integers(0, 500, size=random.integers(1, 60))
        (folder / f"{number:04d}.txt").write_text(" ".join(f"word{word}" for word in words))
    return f"{folder}/*.txt"


def make_corpus(store: Store, source: str, **options: Any) -> Corpus:
    """Build a corpus of short windows."""
    chosen: dict[str, Any] = {"context_length": 17, "holdout": 0.1, "tokenizer": "words"} | options
    return build_corpus(store, CorpusSpec(sources=(source,), **chosen), WordTokenizer())


def make_spec(corpus: Corpus, **changes: Any) -> DatasetSpec:
    """Return a spec of two narrow hook points over a corpus; 64 rows a shard in blocks of 32 and chunks of 16."""
    points = (
        PointSpec(name="layers.0.attn_z", width=6, rows_per_chunk=16),
        PointSpec(name="layers.1.resid_post", width=4, rows_per_chunk=8),
    )
    values: dict[str, Any] = {
        "model": "formula",
        "model_revision": None,
        "model_fingerprint": "f" * 64,
        "architecture": "Formula",
        "corpus_id": corpus.corpus_id,
        "split": "train",
        "keep": KeepRule(exclude=(0, 1, 2)),
        "hook_points": points,
        "dtype": "bfloat16",
        "seed": 0,
        "order": "shuffled",
        "rows_per_shard": 64,
        "rows_per_block": 32,
        "batch_tokens": 128,
        "codec": Codec(),
    }
    return DatasetSpec(**(values | changes))


def make_data_demo() -> Corpus:
    """Build ``data/demo`` below the working directory: of formulas, as wide and as split as the real one."""
    source = write_documents(Path.cwd() / "texts", n_documents=200)
    corpus = make_corpus(Store("data/corpora/words"), source, context_length=64)
    point = PointSpec(name="layers.9.resid_post", width=640, rows_per_chunk=512)
    for split, url in (("train", "data/demo"), ("heldout", "data/demo/heldout")):
        spec = make_spec(
            corpus, split=split, hook_points=(point,), rows_per_shard=2048, rows_per_block=2048, batch_tokens=4096
        )
        n_rows = corpus.row_index(split, spec.keep).n_rows
        prepare(Store(url), Header(spec=spec, n_rows=n_rows, corpus="../corpora/words"))
        builder = ShardBuilder(store=Store(url), corpus=corpus, forward=FormulaModel((point,)))
        for shard in range(builder.space.n_shards):
            builder.build(shard)
    return corpus
