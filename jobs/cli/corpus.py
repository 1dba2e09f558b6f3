"""``actlake corpus``: building corpora apart from datasets, and looking at them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlake.jobs.cli.app import ERRORS, OUT, app
from actlake.jobs.cli.options import AsJson, Options, parse_options, print_table
from actlake.storage.errors import NotFoundError

if TYPE_CHECKING:
    from actlake.storage.corpus import Corpus
    from actlake.storage.corpus_spec import TokenSequence

corpus = typer.Typer(help="Build corpora, and look at them: tokenised texts in a fixed order.", no_args_is_help=True)
app.add_typer(corpus, name="corpus")

Url = Annotated[str, typer.Argument(help="Path or fsspec URL of a corpus.", show_default=False)]

#: Labels of a field, and bad documents, that 'show' names.
_SHOWN = 10
#: Characters of a turn that 'head' shows.
_CHARACTERS = 300


@corpus.command()
def build(
    job: Annotated[Path, typer.Argument(help="Job file (TOML): its model and [corpus] are read.", show_default=False)],
    url: Annotated[str | None, typer.Option(help="Where to build it, instead of the job's corpus.url.")] = None,
    engine: Annotated[str, typer.Option(help="'ray', or 'local' for this process alone.")] = "ray",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster ('auto' or host:port) instead of this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build a job's corpus and nothing else; files and sources that are new are appended to one that is there."""
    from actlake.ingest.models import load_tokenizer, resolve_model
    from actlake.jobs.cli.listener import listening
    from actlake.jobs.corpus import open_corpus, read_corpus_job, require_engine

    require_engine(engine, address)
    checked = read_corpus_job(job, url)
    with listening(ERRORS if as_json else OUT) as listener:
        model = resolve_model(checked.model, revision=checked.revision, notify=listener.note)
        tokenizer = load_tokenizer(model)
        built = open_corpus(checked, model, tokenizer, listener, engine=engine, address=address, append=True)
    _show(built, as_json)


@corpus.command()
def show(url: Url, options: Options = None, as_json: AsJson = False) -> None:
    """Show what a corpus is made of: tokens by source and label, segments, roles, bad documents."""
    _show(_open(url, options), as_json)


@corpus.command()
def head(
    url: Url,
    n: Annotated[int, typer.Option("-n", min=1, help="How many sequences.")] = 5,
    split: Annotated[str, typer.Option(help="'train' or 'heldout'.")] = "train",
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Show the first sequences of a corpus as text, turn by turn where they are of chats."""
    found = _open(url, options)
    pieces = found.pieces()
    n_there = found.splits[split].n_sequences if split in found.splits else n
    shown = [_described(one, pieces) for one in found.sequences(split, 0, min(n, n_there))]
    if as_json:
        typer.echo(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    if not shown:
        OUT.print(f"no sequences in the split {split!r} of {found.store.url}")
    for one in shown:
        labels = "".join(f", {name} {value}" for name, value in one["metadata"].items() if value is not None)
        OUT.print(
            f"sequence {one['sequence']}: {one['n_tokens']} tokens of {one['document']!r} from token {one['offset']}, "
            f"{one['source']}{labels}",
            style="bold",
        )
        for span in one["spans"]:
            OUT.print(f"  {span['role']}: {_cut(span['text'])}")


@corpus.command()
def redact(
    url: Url,
    document: Annotated[list[str], typer.Option("--document", help="Id of a document; may be repeated.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="A dataset of this corpus to void its rows in; may be repeated."),
    ] = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Take documents out of a corpus for good, and void their rows in the datasets that are named.

    Whole shards are rewritten; no other row moves or changes. Not while the corpus or a dataset is being built.
    """
    from actlake.jobs.redact import redact as run
    from actlake.jobs.removal import users_of
    from actlake.storage.stores import Store

    parsed = parse_options(options)
    place, named = Store(url, parsed), [Store(name, parsed) for name in dataset or ()]
    done = run(place, document, named, lambda where, shard: ERRORS.print(f"{where}: shard {shard} rewritten"))
    others = sorted(set(users_of(place)) - {store.url for store in named})
    if as_json:
        typer.echo(json.dumps({**vars(done), "not_named": others}, indent=1))
        return
    OUT.print(f"{done.corpus}: {done.n_sequences} sequences of {len(done.documents)} documents hold no text any more")
    for name, n_rows in done.rows.items():
        OUT.print(f"{name}: {n_rows:,} rows are void, in {done.shards[name]} shards")
    for name in others:
        OUT.print(f"{name} uses this corpus and was not named: it still holds these rows; name it with --dataset")


def _open(url: str, options: list[str] | None) -> "Corpus":
    from actlake.jobs.catalog import explain
    from actlake.storage.corpus import Corpus
    from actlake.storage.stores import Store

    store = Store(url, parse_options(options))
    try:
        return Corpus.open(store)
    except NotFoundError as error:
        if (found := explain(store, wanted="corpus")) is None:
            raise
        raise NotFoundError(f"no corpus at {url}: {found}") from error


# --- show ---------------------------------------------------------------------------------------------------------


def _show(found: "Corpus", as_json: bool) -> None:
    summary = summarise(found)
    if as_json:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    spec = found.spec
    whole = "" if found.complete else f", cut by max_tokens = {spec.max_tokens:,}"
    OUT.print(f"{summary['url']}: corpus {found.corpus_id[:12]}{whole}", style="bold")
    OUT.print(f"sequences of at most {spec.context_length} tokens, tokenizer {spec.tokenizer[:12]}, seed {spec.seed}")
    sizes = [(name, f"{i.n_documents:,}", f"{i.n_sequences:,}", f"{i.n_tokens:,}") for name, i in found.splits.items()]
    print_table(["split", "documents", "sequences", "tokens"], sizes)
    print_table(["tokens of", "train", "heldout"], list(_token_rows(summary)))
    if len(found.segments) > 1:
        print_table(["segment", "sequences", "tokens", "files"], list(_segment_rows(found)))
    if summary["n_quarantined"]:
        OUT.print(f"{summary['n_quarantined']:,} bad documents were set aside:")
        for bad in summary["quarantine"]:
            OUT.print(f"  {bad['document'] or '?'} ({bad['place']} of {bad['source']}): {bad['reason']}")


def summarise(found: "Corpus") -> dict[str, Any]:
    """Return what ``show`` shows, as JSON values."""
    bad = found.quarantine()
    return {
        "url": found.store.url,
        "corpus_id": found.corpus_id,
        "tokenizer": found.spec.tokenizer,
        "complete": found.complete,
        "spec": found.spec.to_json(),
        "splits": {name: info.to_json() for name, info in found.splits.items()},
        "tokens_by_role": {name: found.tokens_by_role(name) for name in found.splits},
        "segments": [segment.to_json() for segment in found.segments],
        "mixture": found.mixture,
        "n_quarantined": len(bad),
        "quarantine": bad.slice(0, _SHOWN).to_pylist(),
    }


def _token_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    splits, roles = summary["splits"], summary["tokens_by_role"]
    counts: dict[str, dict[str, Mapping[str, int]]] = {
        "source": {name: info["tokens_by_source"] for name, info in splits.items()},
        "role": roles,
    }
    for field in splits["train"].get("tokens_by_label", {}):
        counts[field] = {name: info.get("tokens_by_label", {}).get(field, {}) for name, info in splits.items()}
    for field, by_split in counts.items():
        values = list(dict.fromkeys(value for of in by_split.values() for value in of))
        for value in values[:_SHOWN]:
            train, heldout = (f"{by_split[name].get(value, 0):,}" for name in ("train", "heldout"))
            yield f"{field} {value}", train, heldout
        if len(values) > _SHOWN:
            yield f"{field}: {len(values) - _SHOWN} more (--json)", "", ""


def _segment_rows(found: "Corpus") -> Iterator[tuple[str, ...]]:
    for number, segment in enumerate(found.segments):
        n_sequences = sum(info.n_sequences for info in segment.splits.values())
        n_tokens = sum(info.n_tokens for info in segment.splits.values())
        yield str(number), f"{n_sequences:,}", f"{n_tokens:,}", f"{len(segment.source_files):,}"


# --- head ---------------------------------------------------------------------------------------------------------


def _described(sequence: "TokenSequence", pieces: list[str]) -> dict[str, Any]:
    return {
        "sequence": sequence.index,
        "document": sequence.document,
        "window": sequence.window,
        "offset": sequence.offset,
        "source": sequence.source,
        "metadata": dict(sequence.metadata),
        "n_tokens": len(sequence.tokens),
        "spans": list(_spans(sequence, pieces)),
    }


def _spans(sequence: "TokenSequence", pieces: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the stretches of one role and turn."""
    import numpy as np

    from actlake.storage.redaction import piece_of
    from actlake.storage.rowspace import ROLES

    names = {code: name for name, code in ROLES.items()}
    turns = np.zeros(len(sequence.tokens), np.int16) if sequence.turns is None else sequence.turns
    changes = np.flatnonzero((np.diff(sequence.roles) != 0) | (np.diff(turns) != 0)) + 1
    for start, stop in zip([0, *changes.tolist()], [*changes.tolist(), len(turns)], strict=True):
        text = "".join(piece_of(pieces, token) for token in sequence.tokens[start:stop].tolist())
        yield {"role": names[int(sequence.roles[start])], "turn": int(turns[start]), "text": text}


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."
