"""Padded against packed batches on documents of mixed lengths: padding, and real tokens a second of Gemma 3 270M.

    python benchmarks/bench_batching.py [--tokens 8192] [--repeats 3]

Mixes: the language reference and package descriptions as they are; "web", log-normal lengths around 400 tokens;
"chats", around 70; and full windows. Documents are cut at the context length, as a corpus does. Padding is counted for
shards of several sizes, and depends on nothing but the lengths. For the speed, one shard of each mix runs to the last
layer in both ways, in turns, each first every other time; only real tokens count. About five minutes on 2 cores.
"""

import argparse
import importlib.metadata
import pydoc_data.topics
import statistics
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from harness import Report, Row, make_parser
from transformers import PreTrainedTokenizerFast

from actlake.ingest.batch_feed import run_batch
from actlake.ingest.batching import choose_batching, plan_batches
from actlake.ingest.capture import Capture
from actlake.ingest.loading import load_model
from actlake.ingest.models import load_tokenizer, resolve_model
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.shard_rows import ShardRows
from actlake.storage.spec import BATCHINGS, PACKED, PADDED

SHARDS = (8_192, 65_536, 262_144)
_SEED = 0


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    ref = resolve_model(options.model)
    tokens, documents = real_tokens(load_tokenizer(ref))
    mixes = make_mixes(documents, options.context)
    with Report(options) as report:
        rows = [padding(name, lengths, n, options) for name, lengths in mixes.items() for n in options.shards]
        report.table("Padding, share of all tokens run", rows)
        model = load_model(ref, device=options.device)
        forward = Capture(model, [f"layers.{model.shape.n_layers - 1}.resid_post"])
        found = [speed(name, lengths, tokens, forward, options) for name, lengths in mixes.items()]
        report.table("Real tokens a second", found, f"{torch.get_num_threads()} threads, {model.kernels}.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="gemma-3-270m-gguf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the forward pass; default: torch's")
    parser.add_argument("--tokens", type=int, default=8192, help="real tokens of the shard of each mix that is run")
    parser.add_argument("--context", type=int, default=1024, help="documents are cut at so many tokens")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--shards", type=int, nargs="+", default=SHARDS, help="tokens of the shards of the first table")
    return parser.parse_args(arguments)


def real_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Return all token ids of the language reference and package descriptions, and the documents' lengths."""
    described = (str(found.metadata.json.get("description", "")) for found in importlib.metadata.distributions())
    texts = [*pydoc_data.topics.topics.values(), *described]
    ids: list[list[int]] = tokenizer([text for text in texts if text], verbose=False).input_ids
    return np.concatenate([np.asarray(one, dtype=np.int32) for one in ids]), [len(one) for one in ids]


def make_mixes(documents: Sequence[int], context: int) -> dict[str, list[int]]:
    """Return the lengths of each mix's sequences in random order, enough for the largest shard."""
    random = np.random.default_rng(_SEED)

    def log_normal(middle: int, sigma: float) -> list[int]:
        drawn = random.lognormal(np.log(middle), sigma, 12_000)
        return windows(np.clip(drawn, 8, 20_000).astype(int).tolist(), context)

    real = windows(documents, context)
    random.shuffle(real)
    return {
        "reference and descriptions": real,
        "web": log_normal(400, 1.1),
        "chats": log_normal(70, 0.5),
        "full windows": [context] * 300,
    }


def windows(documents: Sequence[int], context: int) -> list[int]:
    """Cut documents of so many tokens, BOS included, at the context; every window has a BOS."""
    found: list[int] = []
    for n_tokens in documents:
        left = n_tokens - 1
        while left > 0:
            found.append(1 + min(left, context - 1))
            left -= context - 1
    return found


def shard(lengths: Sequence[int], n_tokens: int) -> list[int]:
    """Return the first sequences that have at least so many tokens together, or all."""
    return list(lengths[: int(np.searchsorted(np.cumsum(lengths), n_tokens)) + 1])


def padding(name: str, lengths: Sequence[int], n_tokens: int, options: argparse.Namespace) -> Row:
    mine = shard(lengths, n_tokens)
    row: dict[str, object] = {"documents": name, "shard, tokens": sum(mine), "sequences": len(mine)}
    for batching in BATCHINGS:
        batches = plan_batches(mine, options.batch_tokens, options.context, batching)
        row[batching] = f"{1 - sum(mine) / sum(batch.n_run for batch in batches):.1%}"
    return row | {"auto": choose_batching(mine, options.batch_tokens, options.context)}


def speed(
    name: str, lengths: Sequence[int], tokens: npt.NDArray[np.int32], forward: Capture, options: argparse.Namespace
) -> Row:
    """Run one shard in both ways, in turns."""
    mine = shard(lengths, options.tokens)
    rows, seconds = make_rows(mine, tokens), {batching: list[float]() for batching in BATCHINGS}
    for repeat in range(options.repeats):
        for batching in BATCHINGS if repeat % 2 == 0 else reversed(BATCHINGS):
            seconds[batching].append(run(rows, batching, forward, options))
    rates = {batching: sum(mine) / statistics.median(found) for batching, found in seconds.items()}
    pairs = [padded / packed for padded, packed in zip(seconds[PADDED], seconds[PACKED], strict=True)]
    return {
        "documents": name,
        "tokens": sum(mine),
        **{f"{batching}, tokens/s": rate for batching, rate in rates.items()},
        "packed / padded": statistics.median(pairs),
        "lowest": min(pairs),
        "highest": max(pairs),
        "auto": choose_batching(mine, options.batch_tokens, options.context),
    }


def make_rows(lengths: Sequence[int], tokens: npt.NDArray[np.int32]) -> ShardRows:
    """Return sequences of these lengths out of one stream of tokens."""
    sequences, start = [], 0
    for number, n_tokens in enumerate(lengths):
        start = start if start + n_tokens <= len(tokens) else 0
        sequences.append(
            TokenSequence(
                index=number,
                tokens=tokens[start : start + n_tokens],
                roles=np.zeros(n_tokens, dtype=np.uint8),
                document=str(number),
                window=0,
                offset=0,
                source="",
                metadata={},
            )
        )
        start += n_tokens
    every = tuple(np.arange(n_tokens) for n_tokens in lengths)
    return ShardRows(sequences=tuple(sequences), positions=every, places=every)


def run(rows: ShardRows, batching: str, forward: Capture, options: argparse.Namespace) -> float:
    """Return the seconds that the batches of a shard take."""
    lengths = [len(sequence.tokens) for sequence in rows.sequences]
    start = time.perf_counter()
    for batch in plan_batches(lengths, options.batch_tokens, options.context, batching):
        run_batch(forward, batch, rows, options.device)
    if forward.model.device.type == "cuda":
        torch.cuda.synchronize(forward.model.device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
