"""Chats through a whole job: the rows of a keep mask are those whose tokens the messages say, and no others."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chatting import save_chat_model

import actlake
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import parse_job
from actlake.shards.dataset import ActivationDataset
from actlake.shards.select import where
from actlake.storage.corpus import Corpus
from actlake.storage.errors import BadInputError, SourceError, SpecMismatchError, UnknownNameError
from actlake.storage.rowspace import ROLES
from actlake.storage.stores import resolve_url

CONTEXT = 48


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two narrow layers with a tokenizer of bytes."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "chatty")


def chats() -> list[dict[str, Any]]:
    """Return chats of 1 to 3 turns, some longer than the context, of two categories."""
    said = []
    for i in range(24):
        messages = [
            {"role": "user", "content": f"Question {i}? " + "please " * (i % 5)},
            {"role": "assistant", "content": f"Answer {i}: " + "yes " * (i % 9)},
            {"role": "user", "content": "Thanks."},
        ]
        said.append({"id": f"c{i}", "messages": messages[: 1 + i % 3], "category": ["refusal", "jailbreak"][i % 2]})
    return said


Run = Callable[..., ActivationDataset]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Run:
    """Return a function that ingests the chats under a keep mask."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats())))

    def ingested(name: str, keep: Any, **corpus: Any) -> ActivationDataset:
        job = {
            "dataset": f"{folder}/{name}",
            "model": str(chat_model),
            "hook_points": ["layers.*.resid_post"],
            "capture": {"batch_tokens": 256, "keep": keep},
            "corpus": {
                "sources": [f"{folder}/chats.jsonl"],
                "messages_field": "messages",
                "metadata": ["category"],
                "context_length": CONTEXT,
                "holdout": 0.2,
            }
            | corpus,
            "layout": {"rows_per_shard": 256, "rows_per_chunk": 32},
            "run": {"threads": 1},
        }
        ingest(parse_job(job), engine="local")
        return actlake.open(folder / name)

    return ingested


@pytest.fixture(scope="module")
def whole(run: Run) -> ActivationDataset:
    return run("all", "all")


def columns(ds: ActivationDataset) -> dict[str, npt.NDArray[Any]]:
    return {name: ds[f"rows/{name}"][:] for name in ("sequence", "position", "role", "token_id")}


def in_order(ds: ActivationDataset) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return the place of each row, (sequence, position), ascending, and its activation."""
    rows = columns(ds)
    order = np.lexsort((rows["position"], rows["sequence"]))
    places = np.stack([rows["sequence"], rows["position"]], axis=1)
    return places[order], ds["layers.1.resid_post"][:].astype(np.float32)[order]


def roles_by_hand() -> Mapping[str, list[int]]:
    """Return the role of every token of each chat, BOS first; a token is a byte or a mark of a turn."""
    found = {}
    for record in chats():
        roles = [ROLES["template"]]
        for message in record["messages"]:
            role = "user" if message["role"] == "user" else "model"
            # The mark, the name and a line break; then what was said; then the mark and a line break.
            roles += [ROLES["template"]] * (1 + len(role) + 1)
            roles += [ROLES[role]] * len(message["content"].strip().encode())
            roles += [ROLES["template"]] * 2
        found[record["id"]] = roles
    return found


def test_every_token_of_a_chat_has_the_role_that_its_messages_say(whole: ActivationDataset) -> None:
    corpus = Corpus.open(resolve_url(whole.header.corpus, whole.store))
    by_hand, seen = roles_by_hand(), set()
    for sequence in corpus.sequences("train", 0, corpus.splits["train"].n_sequences):
        roles = by_hand[sequence.document]
        expected = roles[:1] + roles[1 + sequence.offset : sequence.offset + CONTEXT]
        assert sequence.roles.tolist() == expected
        assert sequence.turns is not None
        assert len(sequence.turns) == len(expected)
        assert set(sequence.turns.tolist()) <= set(range(3))
        seen.add(sequence.window)
    assert seen >= {0, 1, 2}
    rows = columns(whole)
    # BOS is excluded as it always is.
    n_kept = sum(int((s.tokens != 2).sum()) for s in corpus.sequences("train", 0, corpus.splits["train"].n_sequences))
    assert len(rows["role"]) == n_kept
    assert set(rows["role"].tolist()) == {ROLES["user"], ROLES["model"], ROLES["template"]}


@pytest.mark.parametrize(
    ("keep", "roles"),
    [("model-turns", {"model"}), ("no-template", {"user", "model"}), (["template"], {"template"})],
)
def test_a_keep_mask_keeps_the_rows_of_its_roles_and_no_others(
    run: Run, whole: ActivationDataset, keep: Any, roles: set[str]
) -> None:
    chosen = run("-".join(roles), keep)
    assert chosen.spec.format_version == 2
    assert chosen.spec.corpus_id == whole.spec.corpus_id
    rows = columns(whole)
    wanted = np.isin(rows["role"], [ROLES[role] for role in roles])
    manual = wanted[np.lexsort((rows["position"], rows["sequence"]))]
    (places, values), (all_places, all_values) = in_order(chosen), in_order(whole)
    np.testing.assert_array_equal(places, all_places[manual])
    # A shard of other sequences has batches of another shape, which rounds otherwise.
    np.testing.assert_allclose(values, all_values[manual], rtol=0.02, atol=0.02)
    rule, reader = where(whole, role=sorted(roles)), whole.reader
    mask = [rule.mask(shard, 0, reader.record(shard).n_rows) for shard in reader.manifest.shards]
    np.testing.assert_array_equal(np.concatenate(mask), wanted)


def test_rows_are_chosen_by_label_and_role_together(whole: ActivationDataset) -> None:
    rows, rule = columns(whole), where(whole, category="jailbreak", role="model")
    labels = np.array(whole.corpus.values("category", rows["sequence"]))
    wanted = (labels == "jailbreak") & (rows["role"] == ROLES["model"])
    n_rows = [whole.reader.record(shard).n_rows for shard in whole.reader.manifest.shards]
    mask = [rule.mask(shard, 0, n) for shard, n in enumerate(n_rows)]
    np.testing.assert_array_equal(np.concatenate(mask), wanted)
    assert wanted.any()
    with pytest.raises(UnknownNameError, match=r"no document has category = 'jailbrake' .* 'jailbreak', 'refusal'"):
        where(whole, category="jailbrake", role="model")


def test_a_mask_that_keeps_nothing_names_the_roles_that_are_there(run: Run) -> None:
    with pytest.raises(
        BadInputError,
        match=r"keeps no token of the corpus: capture\.keep asks for reasoning; its tokens are [\d,]+ of user, "
        r"[\d,]+ of model, [\d,]+ of template; check capture\.keep",
    ):
        run("none", "reasoning")


def test_another_mask_at_the_same_place_is_refused(run: Run, whole: ActivationDataset) -> None:
    with pytest.raises(SpecMismatchError, match=r"keep\.roles: here absent, there \['model', 'reasoning'\]"):
        run("all", "model-turns")


def test_reasoning_is_kept_by_an_expression(run: Run) -> None:
    ds = run("reasoned", "reasoning", reasoning=r"Answer \d+")
    pieces = ds.corpus.pieces()
    found = {pieces[token] for token in columns(ds)["token_id"].tolist()}
    assert set("AnswerĠ") < found < set("AnswerĠ0123456789")


# --- bad documents ---


def test_bad_documents_are_raised_or_put_aside_and_listed(tmp_path: Path, run: Run, whole: ActivationDataset) -> None:
    bad = [
        '{"id": "no json"',
        json.dumps({"id": "robot", "messages": [{"role": "robot", "content": "x"}]}),
        json.dumps({"id": "control", "messages": [{"role": "user", "content": "<end_of_turn>"}]}),
        json.dumps({"id": "c1", "messages": [{"role": "user", "content": "the id of another"}]}),
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join([*map(json.dumps, chats()), *bad]))
    source = {"sources": [f"{tmp_path}/bad.jsonl"]}
    with pytest.raises(SourceError, match=r"bad\.jsonl, line 25 of .*: not JSON .*on_bad = 'quarantine'"):
        run("bad", "all", **source)
    ds = run("bad", "all", on_bad="quarantine", **source)
    corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
    # The same documents survive, so that it is the same corpus.
    assert corpus.corpus_id == whole.spec.corpus_id
    found = corpus.quarantine().to_pylist()
    assert [(one["document"], one["place"]) for one in found] == [
        ("", "bad.jsonl, line 25"), ("robot", "bad.jsonl, line 26"), ("control", "bad.jsonl, line 27"),
        ("c1", "bad.jsonl, line 28"),
    ]  # fmt: skip
    assert {one["source"] for one in found} == {f"{tmp_path}/bad.jsonl"}
    assert "unknown role 'robot'" in found[1]["reason"]
    assert "control token '<end_of_turn>'" in found[2]["reason"]
    with pytest.raises(SourceError, match=r"put bad documents aside, the first is bad\.jsonl, line 25"):
        run("bad", "all", **source)
