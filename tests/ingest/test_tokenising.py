"""Documents to tables of tokens: what is taken, what is put aside, and that nothing depends on the batch."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest
from chatting import PLAIN, byte_tokenizer, chat
from fakes import WordTokenizer

from actlake.ingest.chats import GEMMA
from actlake.ingest.documents import BadDocument, Document, Message, parse_messages
from actlake.ingest.tokenising import TOKENISED, batches, token_ids, tokenise_batch
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError, SpecMismatchError
from actlake.storage.rowspace import content_hash


def _spec(**changes: Any) -> CorpusSpec:
    return CorpusSpec(**({"sources": ("s",), "tokenizer": "t"} | changes))


CHATS = {"messages_field": "messages", "chat_format": GEMMA}


def _text(text: str, **changes: Any) -> Document:
    return Document(**({"id": text, "source": "s", "text": text, "place": f"line {text!r}"} | changes))


def test_texts_and_chats_are_rows_of_one_table() -> None:
    tokenizer = byte_tokenizer()
    documents = [_text("one", metadata={"kind": "a"}), chat(("user", "two")), _text("three", metadata={"kind": None})]
    table, bad = tokenise_batch(documents, tokenizer, _spec(**CHATS))
    assert bad == []
    assert table.schema == TOKENISED
    assert table["document"].to_pylist() == ["one", "c", "three"]
    assert table["metadata"].to_pylist() == [[("kind", "a")], [], [("kind", None)]]
    text = "<start_of_turn>user\ntwo<end_of_turn>\n"
    assert table["tokens"].to_pylist() == token_ids(["one", text, "three"], tokenizer)
    assert table["roles"].to_pylist() == [None, [4] * 6 + [1] * 3 + [4] * 2, None]
    assert table["turns"].to_pylist() == [None, [0] * 11, None]
    expected = [hashlib.sha256(b"one").digest(), None, hashlib.sha256(b"three").digest()]
    expected[1] = bytes.fromhex(content_hash([{"role": "user", "content": "two"}]))
    assert table["text_sha256"].to_pylist() == expected


def test_what_cannot_be_used_is_put_aside_with_its_reason() -> None:
    documents = [
        _text("fine"), _text("much too long"), chat(("user", "a <eos>"), name="c1"), chat(("user", "good")),
        chat(("model", "b"), name="c2"),
    ]  # fmt: skip
    table, bad = tokenise_batch(documents, byte_tokenizer(), _spec(max_document_tokens=12, **CHATS))
    assert table["document"].to_pylist() == ["fine", "c"]
    assert [one.document for one in bad] == ["much too long", "c1", "c2"]
    assert bad[0] == BadDocument(
        document="much too long",
        source="s",
        place="line 'much too long'",
        reason="it has 13 tokens, max_document_tokens = 12; cut it, or raise the limit",
    )
    assert "control token '<eos>'" in bad[1].reason
    (empty,) = tokenise_batch([_text(" ")], WordTokenizer(), _spec())[1]
    assert empty.reason == "it gives no tokens; remove it"


def test_no_documents_are_no_rows() -> None:
    table, bad = tokenise_batch([], byte_tokenizer(), _spec())
    assert (len(table), table.schema, bad) == (0, TOKENISED, [])


def test_a_tokenizer_of_another_chat_format_is_refused() -> None:
    with pytest.raises(
        SpecMismatchError, match="has chats of the format 'template-0', this tokenizer's are 'template-"
    ):
        tokenise_batch(
            [chat(("user", "x"))], byte_tokenizer(PLAIN), _spec(messages_field="m", chat_format="template-0")
        )
    table, _ = tokenise_batch([chat(("user", "x"))], byte_tokenizer(PLAIN), _spec(**CHATS))
    assert len(table) == 1


def test_what_others_set_on_the_tokenizer_cuts_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert [len(ids) for ids in token_ids(["four", "five5"], tokenizer)] == [4, 5]
    tokenizer.backend_tokenizer.enable_truncation(2)
    table, _ = tokenise_batch([chat(("user", "four"))], tokenizer, _spec(**CHATS))
    assert len(table["tokens"][0]) == 12


def test_batches_end_at_a_number_of_documents_or_characters() -> None:
    many = [_text("x", id=str(i)) for i in range(2500)]
    assert [len(batch) for batch in batches(many)] == [1000, 1000, 500]
    long = [chat(("user", "x" * 300_000), ("model", "y" * 100_000)) for _ in range(6)]
    assert [len(batch) for batch in batches(long)] == [3, 3]


# --- messages ---


def test_messages_are_of_known_speakers() -> None:
    value = [
        {"role": "developer", "content": "S", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "M"},
        {"role": "model", "content": ""},
    ]
    roles = [(message.role, message.content) for message in parse_messages(value)]
    assert roles == [("system", "S"), ("user", "one two"), ("model", "M"), ("model", "")]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([], "its messages are"),
        ("hello", "its messages are 'hello'; they must be a list"),
        (["hello"], "message 0 is 'hello'; it must have a role and a content"),
        ([{"role": "user"}], "message 0 is .* must have a role and a content"),
        ([{"role": "tool", "content": "x"}], "message 0 has the unknown role 'tool'; .*assistant, developer, human"),
        ([{"role": "assistent", "content": "x"}], "unknown role 'assistent'; did you mean 'assistant'"),
        ([{"role": None, "content": "x"}], "unknown role None"),
        ([{"role": "user", "content": None}], "the content of message 0 is None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has a part of type 'image'; only text"),
        ([{"role": "user", "content": " "}, {"role": "model", "content": ""}], "all of its messages are empty"),
    ],
)
def test_messages_that_cannot_be_used_are_named(value: Any, match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        parse_messages(value)


def test_half_a_character_in_a_message_is_named() -> None:
    with pytest.raises(BadInputError, match="the message 1 holds half of a surrogate pair"):
        Document(id="a", source="s", messages=tuple(Message(role="user", content=x) for x in ("fine", "\ud800")))


def test_who_speaks_is_part_of_a_chats_hash() -> None:
    said: Mapping[str, Document] = {role: chat((role, "x")) for role in ("user", "model")}
    assert said["user"].sha256 != said["model"].sha256 != Document(id="c", source="s", text="x").sha256


def test_table_is_the_same_in_any_batch() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    documents = [chat(("user", "q" * i), ("model", "r"), name=str(i)) if i % 2 else _text("t" * i) for i in range(1, 9)]
    spec = _spec(messages_field="m", chat_format=GEMMA)
    whole, _ = tokenise_batch(documents, tokenizer, spec)
    parts = [tokenise_batch(documents[i : i + 3], tokenizer, spec)[0] for i in range(0, 8, 3)]
    assert pa.concat_tables(parts).combine_chunks() == whole.combine_chunks()
