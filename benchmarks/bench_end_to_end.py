"""Tokens to a trained autoencoder: live SAELens, SAELens' own cache, and actlake, on the real Gemma 3 270M.

    make .venv-rivals/.done; .venv-rivals/bin/python benchmarks/bench_end_to_end.py

The same autoencoder (SAELens' TopK, trained by SAELens' own trainer) sees the same tokens with the same seeds, fed in
three ways. Every phase is a fresh process, timed after its imports, with the model's loading included:

- once: actlake ingests, SAELens writes its cache; live has nothing to do;
- each: one autoencoder is trained from the feed; live runs the model for each again.

Totals for 1, 4 and 16 autoencoders are once + n x each, from the mean of ``--runs`` measured ones. SAELens gets: the
tokens for nothing, float32 weights (its default; where the CPU lacks bfloat16 instructions torch's bfloat16 is five
times slower), hooks on one module alone, and a forward pass that stops there, which it does not do on its own with this
model. All feeds are standardised per channel with the statistics that actlake stored. Variance explained is that of
documents that are held out of every feed.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, Row, Stopwatch, leave_result, make_parser, run_child
from torch import Tensor

import actlake

MODEL = "gemma-3-270m-gguf"
LAYER = 9
POINT, HOOK = f"layers.{LAYER}.resid_post", f"model.layers.{LAYER}"
FEEDS = {"live": "SAELens, live", "cache": "SAELens, its cache", "actlake": "actlake"}
HOLDOUT = 0.05
#: Sequences of one forward pass of SAELens, and passes of one buffer of its cache: 32 sequences are one unit.
_SEQUENCES, _PASSES = 8, 4


def main() -> None:
    options = parse()
    if options.child:
        warnings.simplefilter("ignore")
        what, *rest = options.child
        phases: dict[str, Callable[..., Row]] = {"prepare": prepare, "once": once, "each": each}
        leave_result(phases[what](options, *rest))
        return
    with Report(options) as report, tempfile.TemporaryDirectory() as temporary:
        options.workdir = options.workdir or Path(temporary)
        size = _run(options, "prepare")
        # The statistics of actlake's dataset standardise all feeds, so it goes first.
        first = {feed: _run(options, "once", feed) for feed in ("actlake", "cache")}
        first["live"] = {"seconds": 0.0, "cpu_s": 0.0, "nbytes": 0}
        later = {feed: [_run(options, "each", feed, str(seed)) for seed in range(options.runs)] for feed in FEEDS}
        note = (
            f"{size['n_rows']:,} rows of {options.context} tokens a sequence at most; {size['n_steps']} steps of "
            f"{options.batch_size:,} rows; {options.latents:,} latents, {options.k} active; {options.runs} seeds."
        )
        report.table("Phases", [_phases(FEEDS[feed], first[feed], later[feed]) for feed in FEEDS], note)
        for what, title in (("seconds", "wall seconds"), ("cpu_s", "CPU seconds")):
            report.table(f"Autoencoders from one set of tokens, {title}", _totals(first, later, what, options.saes))


def _run(options: argparse.Namespace, *what: str) -> dict[str, Any]:
    arguments: list[object] = ["--child", *what, "--workdir", options.workdir]
    for name in ("tokens", "context", "batch_size", "latents", "k", "mixing_rows"):
        arguments += [f"--{name.replace('_', '-')}", getattr(options, name)]
    found: dict[str, Any] = run_child(__file__, arguments, timeout_s=7200)
    return found


def _phases(name: str, first: Row, later: Sequence[Row]) -> Row:
    return {
        "feed": name,
        "once, s": first["seconds"],
        "once, CPU s": first["cpu_s"],
        "stored, MB": first["nbytes"] / 1e6,
        "each, s": statistics.mean(run["seconds"] for run in later),
        "each, CPU s": statistics.mean(run["cpu_s"] for run in later),
        "variance explained, held out": ", ".join(f"{run['explained']:.4f}" for run in later),
    }


def _totals(first: dict[str, Any], later: dict[str, list[Any]], what: str, saes: Sequence[int]) -> list[Row]:
    each_ = {feed: statistics.mean(run[what] for run in runs) for feed, runs in later.items()}
    rows: list[Row] = []
    for feed, name in FEEDS.items():
        totals = {f"{n} SAEs": first[feed][what] + n * each_[feed] for n in saes}
        live = [n * each_["live"] for n in saes]
        ratios = ", ".join(f"{a / b:.2f}x" for a, b in zip(live, totals.values(), strict=True))
        saved = each_["live"] - each_[feed]
        pays = "-" if feed == "live" else f"{first[feed][what] / saved:.2f} SAEs" if saved > 0 else "never"
        rows.append({"feed": name, **totals, "live over it": ratios, "breaks even with live after": pays})
    return rows


# --- phases, each in its process ---


def make_job(options: argparse.Namespace) -> Any:
    from actlake.jobs.jobfile import CorpusOptions, Job

    corpus = CorpusOptions(
        sources=("builtin:python-docs",),
        context_length=options.context,
        holdout=HOLDOUT,
        url=str(options.workdir / "corpus"),
    )
    return Job(dataset=str(options.workdir / "dataset"), model=MODEL, hook_points=(POINT,), corpus=corpus)


def make_corpus(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """Return the corpus, its keep rule, and how many sequences all feeds use: whole units of SAELens' cache."""
    from actlake.ingest.corpus import build_corpus
    from actlake.ingest.models import load_tokenizer, model_shape, resolve_model, tokenizer_fingerprint
    from actlake.jobs.planning import plan_keep, special_ids
    from actlake.storage.corpus_spec import CorpusSpec
    from actlake.storage.stores import Store

    job, tokenizer = make_job(options), load_tokenizer(resolve_model(MODEL))
    spec = CorpusSpec(
        sources=job.corpus.sources,
        context_length=options.context,
        holdout=HOLDOUT,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    corpus = build_corpus(Store(job.corpus.url), spec, tokenizer)
    keep = plan_keep(job, special_ids(tokenizer), model_shape(MODEL).vocab_size)
    unit = _SEQUENCES * _PASSES
    wanted = int(np.searchsorted(corpus.row_index("train", keep).first_row, options.tokens))
    n_sequences = min(-(-wanted // unit) * unit, corpus.splits["train"].n_sequences // unit * unit)
    return corpus, keep, n_sequences


def prepare(options: argparse.Namespace) -> dict[str, int]:
    """Tokenise the text, and store it as SAELens reads it: padded to one length, whose padding it leaves out later."""
    import datasets

    corpus, keep, n_sequences = make_corpus(options)
    tokens = np.zeros((n_sequences, options.context), dtype=np.int64)
    for place, sequence in enumerate(corpus.sequences("train", 0, n_sequences)):
        tokens[place, : len(sequence.tokens)] = sequence.tokens
    datasets.Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(options.workdir / "tokens"))
    n_rows = int(corpus.row_index("train", keep).first_row[n_sequences])
    return {"n_rows": n_rows, "n_steps": n_steps(n_rows, options)}


def n_steps(n_rows: int, options: argparse.Namespace) -> int:
    """Return the steps of one pass, less what SAELens' mixing buffer still holds at the end of it."""
    steps = (n_rows - options.mixing_rows) // options.batch_size
    if steps < 1:
        raise ValueError(f"{n_rows} rows make no step of {options.batch_size} rows; give more --tokens")
    return int(steps)


def once(options: argparse.Namespace, feed: str) -> Row:
    """Write the dataset, or the cache."""
    run = _ingest if feed == "actlake" else _cache
    prepared = run(options)
    with Stopwatch() as watch:
        prepared()
    place = options.workdir / ("dataset" if feed == "actlake" else "cache")
    nbytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return {"seconds": watch.seconds, "cpu_s": watch.cpu_s, "nbytes": nbytes}


def _ingest(options: argparse.Namespace) -> Any:
    from dataclasses import replace

    from actlake.jobs.ingestion import ingest

    corpus, keep, n_sequences = make_corpus(options)
    n_rows = int(corpus.row_index("train", keep).first_row[n_sequences])
    job = replace(make_job(options), max_rows=n_rows)
    return lambda: ingest(job, engine="local")


def _cache(options: argparse.Namespace) -> Any:
    import datasets
    from sae_lens import cache_activations_runner as runner
    from sae_lens.config import CacheActivationsRunnerConfig

    tokens = datasets.load_from_disk(str(options.workdir / "tokens"))
    sequence_nbytes = options.context * 640 * 4
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=MODEL,
        model_batch_size=_SEQUENCES,
        hook_name=HOOK,
        d_in=640,
        training_tokens=len(tokens) * options.context,
        context_size=options.context,
        model_class_name="AutoModelForCausalLM",
        new_cached_activations_path=str(options.workdir / "cache"),
        device="cpu",
        buffer_size_gb=(_SEQUENCES * _PASSES * sequence_nbytes + 1) / 1e9,
        streaming=False,
    )

    def run() -> None:
        # Ours stops after the hook; its own would run the whole model, with 262,144 logits a token.
        runner.load_model = lambda **_: hooked_model()
        runner.CacheActivationsRunner(config, override_dataset=tokens).run()

    return run


def hooked_model() -> Any:
    """Return the model as SAELens wants it, with one hook, stopping there."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actlake.ingest.models import resolve_model

    base: Any = HookedProxyLM

    class Stopping(base):  # type: ignore[misc]
        def forward(self, tokens: Tensor, **settings: Any) -> Any:
            return super().forward(tokens, **settings | {"stop_at_layer": LAYER + 1})

    path = resolve_model(MODEL).path
    # Comes in evaluation mode.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Stopping(model, AutoTokenizer.from_pretrained(path), hook_names=[HOOK])


def each(options: argparse.Namespace, feed: str, seed: str) -> Row:
    """Train one autoencoder from a feed, and judge it on held-out rows."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    ds = actlake.open(options.workdir / "dataset")
    moments = ds.statistics(POINT)
    mean, std = (torch.from_numpy(x).float() for x in (moments.mean, np.sqrt(moments.variance)))
    open_feed = _saelens if feed != "actlake" else _actlake
    torch.manual_seed(int(seed))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=len(mean), d_sae=options.latents, k=options.k, device="cpu"))
    samples = n_steps(ds.n_rows, options) * options.batch_size
    config = SAETrainerConfig(
        total_training_samples=samples, train_batch_size_samples=options.batch_size, lr=1e-3, lr_end=1e-4
    )
    with Stopwatch() as watch:
        batches = ((batch.float() - mean) / std for batch in open_feed(options, feed, int(seed)))
        SAETrainer(config, sae, batches).fit()
    held = (ds.heldout.tensor(POINT, slice(0, ds.heldout.n_rows)).float() - mean) / std
    with torch.no_grad():
        left = (sae.decode(sae.encode(held)) - held).square().sum()
        explained = 1 - float(left / (held - held.mean(0)).square().sum())
    return {"seconds": watch.seconds, "cpu_s": watch.cpu_s, "explained": explained}


def _actlake(options: argparse.Namespace, _feed: str, seed: int) -> Iterator[Tensor]:
    ds = actlake.open(options.workdir / "dataset")
    for batch in ds.stream(POINT, batch_size=options.batch_size, seed=seed, epochs=None):
        yield batch[POINT]


def _saelens(options: argparse.Namespace, feed: str, seed: int) -> Iterator[Tensor]:
    import datasets
    from sae_lens.training.activations_store import ActivationsStore

    live = feed == "live"
    model = hooked_model() if live else None
    tokens = datasets.load_from_disk(str(options.workdir / "tokens")).shuffle(seed=seed) if live else None
    store: Iterator[Tensor] = ActivationsStore(
        model=model,
        dataset=tokens,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=options.context,
        d_in=640,
        n_batches_in_buffer=-(-options.mixing_rows // options.context),
        total_training_tokens=options.tokens,
        store_batch_size_prompts=_SEQUENCES,
        train_batch_size_tokens=options.batch_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=None if live else str(options.workdir / "cache"),
        # Padding, EOS and BOS, as actlake's keep rule has it.
        exclude_special_tokens=torch.tensor([0, 1, 2]),
    )
    yield from store


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="rows, about; the text has 170,000")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--mixing-rows", type=int, default=4096, help="SAELens' mixing buffer")
    parser.add_argument("--runs", type=int, default=2, help="autoencoders that are really trained from each feed")
    parser.add_argument("--saes", type=int, nargs="+", default=[1, 4, 16], help="totals for so many")
    parser.add_argument("--workdir", type=Path, help="folder for corpus, dataset and cache; must be empty")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
