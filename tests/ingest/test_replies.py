"""Replies: what completes which prompt, in which batch, and that generating agrees with transformers' own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chatting import byte_tokenizer, chat
from tiny_gemma import multimodal
from transformers import GenerationConfig, PreTrainedModel

from actlake.ingest.chat_tokens import ChatTokeniser
from actlake.ingest.chats import control_ids
from actlake.ingest.corpus_windows import split_id
from actlake.ingest.documents import BadDocument, Document
from actlake.ingest.generating import ReplyGenerator, random_numbers, stop_ids
from actlake.ingest.hooks import architecture
from actlake.ingest.loading import LoadedModel
from actlake.ingest.models import shape_of
from actlake.ingest.replies import (
    BATCH_REPLIES,
    Group,
    Prompt,
    Reply,
    ReplyBatch,
    Wanted,
    missing_batches,
    plan_batches,
    plan_groups,
    redact_replies,
    replied,
    reply_files,
    stored_batches,
    write_replies,
)
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError, CorruptObjectError, MissingObjectError
from actlake.storage.redaction import redacted_name
from actlake.storage.reply_rule import ReplyRule
from actlake.storage.stores import Store

TOKENIZER = byte_tokenizer()


def spec_of(context_length: int = 200, metadata: tuple[str, ...] = (), **rule: Any) -> CorpusSpec:
    return CorpusSpec(
        sources=("s",),
        tokenizer="t",
        chat_format="gemma",
        context_length=context_length,
        metadata=metadata,
        replies=ReplyRule(**{"model": "m", "max_new_tokens": 8, **rule}),
    )


def group_of(documents: list[Any], spec: CorpusSpec) -> Group:
    (group,) = plan_groups(documents, TOKENIZER, spec)
    return group


def asking(name: str, text: str) -> Document:
    return Document(id=name, source="s", text=text)


def prompt_of(name: str, text: str) -> Prompt:
    (found,) = group_of([asking(name, text)], spec_of()).documents
    assert isinstance(found, Prompt)
    return found


def said(text: str, ending: str = "eos") -> Reply:
    return Reply(text=text, ending=ending, tokens=np.array([7, 8], np.int32))


# --- planning ---


def test_texts_and_chats_that_ask_are_prompts_and_others_stay_as_they_are() -> None:
    answered = chat(("user", "Hi"), ("model", "Hello"), name="answered")
    bad = BadDocument(document="b", source="s", place="p", reason="r")
    twice = chat(("user", "a"), ("model", "b"), ("user", "c"), name="twice")
    group = group_of([asking("text", "Why?"), answered, bad, twice], spec_of())
    text, kept, still_bad, asked = group.documents
    assert (kept, still_bad) == (answered, bad)
    assert isinstance(text, Prompt)
    assert isinstance(asked, Prompt)
    assert TOKENIZER.decode(text.tokens.tolist(), skip_special_tokens=False) == (
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert asked.document == twice
    assert [one.id for batch in group.batches for one in batch.wanted] == ["text#0", "twice#0"]


def test_a_batch_has_prompts_of_about_one_length_and_follows_from_them_alone() -> None:
    prompts = [prompt_of(f"p{i}", "x" * (1 + i * 7 % 40)) for i in range(40)]
    rule = ReplyRule(model="m", max_new_tokens=8, n=2)
    batches = list(plan_batches(prompts, rule))
    assert [len(batch.wanted) for batch in batches] == [BATCH_REPLIES, BATCH_REPLIES, 16]
    lengths = [len(one.prompt.tokens) for batch in batches for one in batch.wanted]
    assert lengths == sorted(lengths)
    assert {batch.key for batch in plan_batches(prompts[::-1], rule)} == {batch.key for batch in batches}
    others = [replace(rule, seed=1), replace(rule, temperature=0.5), replace(rule, model="n"), replace(rule, n=3)]
    keys = {batch.key for other in [rule, *others] for batch in plan_batches(prompts[:3], other)}
    assert len(keys) == len(others) + 1
    assert list(missing_batches([Group(documents=(), batches=tuple(batches))], {batches[0].key})) == batches[1:]


def test_long_prompts_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actlake.ingest.replies.BATCH_TOKENS", 100)
    prompts = [prompt_of(f"p{i}", "x") for i in range(5)]
    (width,) = {len(one.tokens) + 8 for one in prompts}
    sizes = [len(batch.wanted) for batch in plan_batches(prompts, ReplyRule(model="m", max_new_tokens=8))]
    assert sizes[0] == 100 // width
    assert sum(sizes) == 5


def test_a_prompt_without_room_for_a_reply_is_a_bad_document() -> None:
    n_tokens = len(prompt_of("p", "x" * 9).tokens)
    spec = spec_of(context_length=n_tokens + 8)
    fits, long, control = group_of(
        [asking("a", "x" * 9), asking("b", "x" * 10), asking("c", "<end_of_turn>")], spec
    ).documents
    assert isinstance(fits, Prompt)
    assert isinstance(long, BadDocument)
    assert f"its prompt has {n_tokens + 1} tokens, with replies.max_new_tokens = 8" in long.reason
    assert isinstance(control, BadDocument)
    assert "control token" in control.reason


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"max_new_tokens": 0}, r"replies\.max_new_tokens = 0 gives no reply"),
        ({"n": 0}, r"replies\.n = 0 gives no reply"),
        ({"temperature": -1.0}, r"replies\.temperature = -1\.0"),
        ({"temperature": 0, "n": 2}, "gives the same reply 2 times"),
        ({"max_new_tokens": 199}, "leaves no room for a prompt in context_length = 200"),
    ],
)
def test_rules_that_give_nothing_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        spec_of(**rule)


def test_replies_are_part_of_the_definition_and_not_of_the_identity_of_the_sequences() -> None:
    spec, plain = spec_of(), replace(spec_of(), replies=None, messages_field="messages")
    assert spec.format_version == 3
    assert CorpusSpec.from_json(spec.to_json()) == spec
    assert "replies" not in plain.to_json()
    assert spec.definition_id != plain.definition_id
    # The same conversations, read as a source elsewhere, are the same corpus.
    assert spec.corpus_id("digest") == plain.corpus_id("digest")


# --- at rest ---


def test_conversations_are_read_back_in_the_place_of_their_prompts(tmp_path: Any) -> None:
    store, spec = Store(tmp_path), spec_of(metadata=("ending", "kind"), n=2)
    answered = chat(("user", "Hi"), ("model", "Hello"), name="answered")
    documents = [replace(asking("a", "longer"), metadata={"kind": "k"}), answered, asking("b", "x")]
    (batch,) = group_of(documents, spec).batches
    with pytest.raises(MissingObjectError, match=r"replies/.* is absent.*build again"):
        list(replied(documents, TOKENIZER, spec, store, print))
    write_replies(store, batch, [said("0"), said("1", "length"), said("2"), said("3")], spec.metadata)
    assert stored_batches(store) == {batch.key}
    seen: list[str] = []
    found = list(replied(documents, TOKENIZER, spec, store, seen.append))
    assert all(isinstance(one, Document) for one in found)
    by_id = {one.id: one for one in found if isinstance(one, Document)}
    # The shorter prompt comes first in its batch.
    assert list(by_id) == ["a#0", "a#1", "answered", "b#0", "b#1"]
    assert [message.content for message in by_id["b#1"].messages] == ["x", "1"]
    assert [message.role for message in by_id["a#0"].messages] == ["user", "model"]
    assert by_id["b#1"].metadata == {"ending": "length"}
    assert by_id["a#1"].metadata == {"kind": "k", "ending": "eos"}
    assert seen == ["ending"]


def test_all_replies_to_a_prompt_share_its_split() -> None:
    together = replace(spec_of(n=2), split_by="prompt")
    assert split_id(together, "p#1#12") == "p#1"
    assert split_id(together, "asked #why") == "asked #why"
    # What was built before keeps its splits and its identity; those that differ in splits are two corpora.
    assert split_id(spec_of(n=2), "p#0") == "p#0"
    assert "split_by" not in spec_of(n=2).definition
    assert together.corpus_id("digest") != spec_of(n=2).corpus_id("digest")


def test_redacted_conversations_are_gone_for_good(tmp_path: Any) -> None:
    store, spec = Store(tmp_path), spec_of(metadata=("kind",), n=2)
    documents = [replace(asking("secret", "x"), metadata={"kind": "label"})]
    (batch,) = group_of(documents, spec).batches
    write_replies(store, batch, [said("first"), said("other")], spec.metadata)
    before = reply_files(store)
    files = redact_replies(store, ["secret#0"], spec.metadata)
    assert files == reply_files(store) != before
    (row, other) = _rows(store, batch)
    assert row == {"id": redacted_name("secret#0"), "messages": [], "ending": None, "tokens": [], "kind": None}
    assert (other["id"], other["messages"][-1]["content"], other["kind"]) == ("secret#1", "other", "label")
    with pytest.raises(BadInputError, match="document 'secret#0' was redacted"):
        list(replied(documents, TOKENIZER, spec, store, print))


def test_a_damaged_batch_is_named(tmp_path: Any) -> None:
    store, spec = Store(tmp_path), spec_of()
    (batch,) = group_of([asking("a", "x")], spec).batches
    write_replies(store, batch, [said("first")], ())
    data = bytearray(store.read(batch.key))
    data[20] ^= 1
    store.write(batch.key, bytes(data))
    with pytest.raises(CorruptObjectError, match=batch.key):
        list(replied([asking("a", "x")], TOKENIZER, spec, store, print))


def _rows(store: Store, batch: ReplyBatch) -> list[dict[str, Any]]:
    import io

    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(store.read(batch.key))).to_pylist()
    return rows


# --- generating ---


@pytest.fixture(scope="module", params=["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A Gemma 3 in float32 of either class, one of whose layers sees a few tokens only."""
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=len(TOKENIZER) + 5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        initializer_range=0.5,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    found: Any = Gemma3ForCausalLM(config)
    if request.param == "Gemma3ForConditionalGeneration":
        weights = found.model.state_dict()
        found = Gemma3ForConditionalGeneration(multimodal(config))
        found.model.language_model.load_state_dict(weights)
    made: PreTrainedModel = found.eval()
    return made


@pytest.fixture
def generator(model: PreTrainedModel) -> ReplyGenerator:
    config: Any = model.config
    name = type(model).__name__
    loaded = LoadedModel(
        text=model.get_submodule(architecture(name).text),
        shape=shape_of(config.get_text_config().to_dict(), name),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels="native",
        whole=model,
    )
    return ReplyGenerator(loaded, TOKENIZER, ChatTokeniser(TOKENIZER).format)


def batch_of(texts: list[str], **rule: Any) -> ReplyBatch:
    wanted = tuple(Wanted(prompt=prompt_of(text, text), k=0) for text in texts)
    return ReplyBatch(rule=ReplyRule(**{"model": "m", "max_new_tokens": 12, **rule}), wanted=wanted)


TEXTS = ["a", "What is this?", "Why?", "A much longer prompt than all of the others here."]


def test_greedy_replies_are_those_of_transformers_one_prompt_at_a_time(
    model: PreTrainedModel, generator: ReplyGenerator
) -> None:
    batch = batch_of(TEXTS, temperature=0)
    replies = generator(batch)
    stops = stop_ids(model, TOKENIZER, ChatTokeniser(TOKENIZER).format)
    assert stops == (1, 5)
    never = [*sorted(control_ids(TOKENIZER) - set(stops)), *range(len(TOKENIZER), len(TOKENIZER) + 5)]
    own: Any = model
    own.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=12, do_sample=False, eos_token_id=list(stops), pad_token_id=0, suppress_tokens=never
    )
    for one, reply in zip(batch.wanted, replies, strict=True):
        ids = torch.from_numpy(one.prompt.tokens.astype(np.int64))[None]
        out = own.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
        ended = out[-1] in stops
        assert reply.tokens.tolist() == (out[:-1] if ended else out)
        assert reply.ending == ("eos" if ended else "length")
        assert reply.text == TOKENIZER.decode(reply.tokens.tolist(), skip_special_tokens=False)
    assert len({tuple(reply.tokens.tolist()) for reply in replies}) == len(TEXTS)


def test_a_reply_that_ends_by_itself_ends_before_the_token_that_says_so(generator: ReplyGenerator) -> None:
    replies = generator(batch_of(TEXTS * 8, temperature=1.5, max_new_tokens=40))
    assert {reply.ending for reply in replies} == {"eos", "length"}
    for reply in replies:
        assert (len(reply.tokens) == 40) == (reply.ending == "length")
        assert not set(reply.tokens.tolist()) & control_ids(TOKENIZER)
        assert (reply.tokens < len(TOKENIZER)).all()


def test_draws_belong_to_the_reply_and_not_to_its_batch(generator: ReplyGenerator) -> None:
    alone, together = generator(batch_of(TEXTS[:1])), generator(batch_of(TEXTS))
    assert together[0].tokens.tolist() == alone[0].tokens.tolist()
    again = [reply.tokens.tolist() for reply in generator(batch_of(TEXTS))]
    assert again == [reply.tokens.tolist() for reply in together]
    assert [reply.tokens.tolist() for reply in generator(batch_of(TEXTS, seed=1))] != again
    one = batch_of(["a"]).wanted[0]
    numbers = [random_numbers(replace(one, k=k), batch_of(["a"], seed=seed)) for k in (0, 1) for seed in (0, 1)]
    assert len({tuple(drawn) for drawn in numbers}) == 4
    assert all(((drawn >= 0) & (drawn < 1)).all() for drawn in numbers)


def test_tokens_are_drawn_by_their_probabilities(generator: ReplyGenerator) -> None:
    """Of many first tokens as many are the likeliest one as its probability says."""
    wanted = tuple(Wanted(prompt=prompt_of("p", "Why?"), k=k) for k in range(1_000))
    rule = ReplyRule(model="m", max_new_tokens=1, temperature=2.0)
    replies = generator(ReplyBatch(rule=rule, wanted=wanted))
    ids = torch.from_numpy(wanted[0].prompt.tokens.astype(np.int64))[None]
    whole: Any = generator._whole
    with torch.no_grad():
        logits = whole(input_ids=ids).logits[0, -1].double()
    logits[[0, 2, 3, 4]] = -torch.inf
    logits[len(TOKENIZER) :] = -torch.inf
    likely = torch.softmax(logits / 2.0, dim=0)
    best = int(likely.argmax())
    share = float(likely[best])
    n_best = sum(reply.tokens.tolist() == [best] for reply in replies)
    # Four standard deviations; the draws are fixed.
    assert abs(n_best - 1_000 * share) < 4 * (1_000 * share * (1 - share)) ** 0.5
    assert 0.02 < share < 0.98


def test_a_model_without_its_head_is_refused(model: PreTrainedModel, generator: ReplyGenerator) -> None:
    with pytest.raises(BadInputError, match="without its head"):
        ReplyGenerator(replace(generator._model, whole=None), TOKENIZER, ChatTokeniser(TOKENIZER).format)
