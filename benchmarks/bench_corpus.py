"""What building a corpus costs beside tokenising alone, and whether its memory is flat, with Gemma 3's tokenizer.

    python benchmarks/bench_corpus.py [--mb 100 300 1000] [--mean-kb 3]

Text of each size is generated as JSON lines (paragraphs of the Python documentation, shuffled) into files of 64 MB. A
fresh process builds a corpus of it with the local engine, as 'actlake corpus build --engine local' does, and reports
its peak resident memory. Before and after, the tokenizer alone runs over a part of the same text in batches of 1,000
documents, on all CPUs; the ratio is of the text's bytes per second. Above 64 MB a build keeps its runs on disk.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from harness import Report, Row, leave_result, make_parser, peak_rss, reset_peak_rss, run_child

MODEL = "gemma-3-270m-gguf"
FILE_NBYTES = 64_000_000
BATCH = 1_000


def main() -> None:
    options = parse()
    if options.child:
        leave_result(build_once(Path(options.child), options.sample_mb * 1e6))
        return
    with Report(options) as report, tempfile.TemporaryDirectory(dir=options.workdir) as temporary:
        rows = [measure(mb, Path(temporary) / str(mb), options) for mb in options.mb]
        note = "MB are of UTF-8 text; the ratio is that of the rates. Resident memory includes tokenizer and imports."
        report.table("Building a corpus", rows, note)
    over = [row for row in rows if row["peak, MiB"] > options.most_mib]
    sys.exit("\n".join(f"{row['text, MB']} MB: over {options.most_mib} MiB" for row in over) or 0)


def measure(mb: float, folder: Path, options: argparse.Namespace) -> Row:
    """Generate text, and build its corpus in a fresh process."""
    write_text(folder / "in", mb * 1e6, options.mean_kb * 1000)
    found = run_child(__file__, ["--child", folder, "--sample-mb", options.sample_mb], timeout_s=14_400)
    for path in (folder / "in").iterdir():
        path.unlink()
    return {
        "text, MB": found["nbytes"] / 1e6,
        "documents": found["n_documents"],
        "tokens": found["n_tokens"],
        "tokenizer alone, MB/s": found["bare"] / 1e6,
        "whole build, MB/s": found["nbytes"] / found["seconds"] / 1e6,
        "ratio": found["nbytes"] / found["seconds"] / found["bare"],
        "of it tokenising, s": found["tokenising_s"],
        "build, s": found["seconds"],
        "peak, MiB": found["peak"] / 2**20,
        "before, MiB": found["before"] / 2**20,
    }


def write_text(folder: Path, nbytes: float, mean_nbytes: float) -> None:
    """Write JSON lines of shuffled paragraphs: documents of half to one and a half times the mean size."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    paragraphs = [one.strip() for text in topics.values() for one in text.split("\n\n") if one.strip()]
    source, written, number = random.Random(0), 0, 0
    while written < nbytes:
        with (folder / f"{number:08d}.jsonl").open("w", encoding="utf-8") as file:
            stop = min(nbytes, written + FILE_NBYTES)
            while written < stop:
                document = _document(source, paragraphs, mean_nbytes)
                file.write(json.dumps({"id": f"d{number}", "text": document}, ensure_ascii=False) + "\n")
                written += len(document.encode())
                number += 1


def _document(source: random.Random, paragraphs: Sequence[str], mean_nbytes: float) -> str:
    wanted, chosen, n = mean_nbytes * source.uniform(0.5, 1.5), [], 0
    while n < wanted:
        chosen.append(source.choice(paragraphs))
        n += len(chosen[-1])
    return "\n\n".join(chosen)


def build_once(folder: Path, sample_nbytes: float) -> dict[str, float]:
    """Build the corpus of a folder once, between two runs of the tokenizer alone; return sizes, seconds and bytes."""
    from actlake.ingest.corpus import build_corpus
    from actlake.ingest.models import load_tokenizer, resolve_model, tokenizer_fingerprint
    from actlake.storage.corpus_spec import CorpusSpec
    from actlake.storage.stores import Store

    tokenizer = load_tokenizer(resolve_model(MODEL))
    spec = CorpusSpec(sources=(f"{folder}/in/*.jsonl",), tokenizer=tokenizer_fingerprint(tokenizer))
    bare = [bare_rate(folder, tokenizer, sample_nbytes)]
    before, tokenised = reset_peak_rss(), [0.0]
    started = perf_counter()

    def heard(_documents: int, _tokens: int) -> None:
        tokenised[0] = perf_counter() - started

    corpus = build_corpus(Store(folder / "corpus"), spec, tokenizer, progress=heard)
    seconds, peak = perf_counter() - started, peak_rss()
    bare.append(bare_rate(folder, tokenizer, sample_nbytes))
    return {
        "nbytes": sum(len(text.encode()) for text in texts(folder)),
        "n_documents": sum(info.n_documents for info in corpus.splits.values()),
        "n_tokens": sum(info.n_tokens for info in corpus.splits.values()),
        "bare": sum(bare) / len(bare),
        "seconds": seconds,
        "tokenising_s": tokenised[0],
        "before": before,
        "peak": peak,
    }


def texts(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "in").iterdir()):
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)


def bare_rate(folder: Path, tokenizer: object, nbytes: float) -> float:
    """Return the bytes of text per second that the tokenizer alone does; reading them is not counted."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    batch: list[str] = []
    done, seconds = 0, 0.0
    for text in texts(folder):
        batch.append(text)
        done += len(text.encode())
        if len(batch) == BATCH or done >= nbytes:
            started = perf_counter()
            backend.encode_batch_fast(batch, add_special_tokens=False)
            seconds += perf_counter() - started
            batch = []
        if done >= nbytes:
            break
    return done / seconds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--mb", type=float, nargs="+", default=[100, 300, 1000], help="sizes of the text")
    parser.add_argument("--mean-kb", type=float, default=3, help="mean size of a document")
    parser.add_argument("--sample-mb", type=float, default=20, help="text that the tokenizer alone runs over")
    parser.add_argument("--most-mib", type=float, default=2048, help="exit with 1 where the peak is above")
    parser.add_argument("--workdir", type=Path, help="folder for text and corpora, which are removed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
