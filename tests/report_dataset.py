"""A small dataset for tests of the report: several streams, labels, gaps, and text that is out for harm."""

import json
from dataclasses import dataclass
from pathlib import Path

from fakes import FormulaModel, WordTokenizer, make_spec

from actlake.ingest.build import ShardBuilder
from actlake.ingest.corpus import build_corpus
from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.header import Header, prepare
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>\u2028&amp;"

#: Layers 0 to 2 of one stream and layer 1 of two others.
POINTS = ("layers.0.resid_post", "layers.1.attn_z", "layers.1.mlp_out", "layers.1.resid_post", "layers.2.resid_post")


class HostileTokenizer(WordTokenizer):
    """Every other token reads as an attack."""

    def convert_ids_to_tokens(self, ids: list[int], /) -> list[str]:
        return [HOSTILE if token % 2 else f"▁w{token}\n" for token in ids]


@dataclass(frozen=True)
class Made:
    """What was built: the training split in ``url``, its corpus, and the builders of both splits."""

    url: str
    corpus: Corpus
    train: ShardBuilder
    heldout: ShardBuilder


def make(folder: Path, name: str = "a <b>bold & hostile <script>alert(1)<") -> Made:
    """Prepare a dataset in ``folder`` of which no shard is built yet."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {
            "id": f"{HOSTILE}{i}",
            "text": " ".join(f"word{i * j % 31}" for j in range(20 + i)),
            "kind": HOSTILE[: 5 + i % 3],
        }
        for i in range(40)
    ]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    spec = CorpusSpec(
        sources=(str(folder / "texts.jsonl"),),
        context_length=33,
        holdout=0.1,
        tokenizer="words",
        metadata=("kind",),
    )
    corpus = build_corpus(Store(folder / "corpus"), spec, HostileTokenizer())
    url = str(folder / name)
    return Made(url=url, corpus=corpus, train=_builder(url, corpus, "train"), heldout=_builder(url, corpus, "heldout"))


def _builder(url: str, corpus: Corpus, split: str) -> ShardBuilder:
    points = tuple(PointSpec(name=name, width=6 if "attn" in name else 4, rows_per_chunk=64) for name in POINTS)
    spec = make_spec(corpus, split=split, hook_points=points, rows_per_shard=256, rows_per_block=128)
    place = Store(url) if split == "train" else Store(url).child("heldout")
    header = Header(spec=spec, n_rows=corpus.row_index(split, spec.keep).n_rows, corpus="../corpus")
    prepare(place, header)
    return ShardBuilder(store=place, corpus=corpus, forward=FormulaModel(points))
