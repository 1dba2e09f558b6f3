"""Chats: every token knows who said it and in which turn, by whatever template, and what cannot be told is refused."""

import pytest
from chatting import PLAIN, THINKING, byte_tokenizer, chat, runs
from hypothesis import given
from hypothesis import strategies as st

from actlake.ingest.chat_tokens import ChatTokeniser
from actlake.ingest.chats import GEMMA, chat_format, render_gemma
from actlake.ingest.documents import Message
from actlake.storage.errors import BadInputError

#: As Gemma 3's own: trims contents, puts the system's before the first user's.
GEMMA_LIKE = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first else '') + (m.content | trim) + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def test_gemmas_format_tells_every_token_apart() -> None:
    tokenizer = byte_tokenizer()
    (found,) = ChatTokeniser(tokenizer)(
        [chat(("system", "Be brief."), ("user", " Hé 👩‍💻\n"), ("model", "Good\n\nday"), ("user", "bye"))]
    )
    assert runs(tokenizer, found) == [
        ("<start_of_turn>user\n", "template", 0),
        ("Be brief.", "system", 0),
        ("\n\n", "template", 1),
        ("Hé 👩‍💻", "user", 1),
        ("<end_of_turn>\n", "template", 1),
        ("<start_of_turn>model\n", "template", 2),
        ("Good\n\nday", "model", 2),
        ("<end_of_turn>\n", "template", 2),
        ("<start_of_turn>user\n", "template", 3),
        ("bye", "user", 3),
        ("<end_of_turn>\n", "template", 3),
    ]


def test_a_content_that_is_also_markup_is_found_in_its_place() -> None:
    tokenizer = byte_tokenizer()
    (found,) = ChatTokeniser(tokenizer)([chat(("user", "user"), ("model", "model\n"), ("user", "\n"), ("model", "e"))])
    said = [(text, turn) for text, role, turn in runs(tokenizer, found) if role != "template"]
    assert said == [("user", 0), ("model", 1), ("e", 3)]


def test_a_token_over_the_end_of_a_span_is_markup() -> None:
    tokenizer = byte_tokenizer(PLAIN)
    (found,) = ChatTokeniser(tokenizer)([chat(("user", "\nfirst"), ("model", "a\n"))])
    # The line break of the template and that of the content are one token.
    assert runs(tokenizer, found) == [
        ("<start_of_turn>user\n\n", "template", 0),
        ("first", "user", 0),
        ("<end_of_turn>\n", "template", 0),
        ("<start_of_turn>assistant\n", "template", 1),
        ("a\n", "model", 1),
        ("<end_of_turn>\n", "template", 1),
    ]


def test_the_tokenizers_own_template_is_used_and_named_by_its_text() -> None:
    plain, shouting = byte_tokenizer(PLAIN), byte_tokenizer(PLAIN.replace("<end_of_turn>", "!<end_of_turn>"))
    assert chat_format(plain).name.startswith("template-")
    assert chat_format(plain).name != chat_format(shouting).name
    assert chat_format(plain, GEMMA).name == chat_format(byte_tokenizer()).name == GEMMA
    (found,) = ChatTokeniser(shouting)([chat(("user", " one "), ("model", "two"))])
    assert [text for text, _, _ in runs(shouting, found)] == [
        "<start_of_turn>user\n", " one ", "!<end_of_turn>\n", "<start_of_turn>assistant\n", "two", "!<end_of_turn>\n",
    ]  # fmt: skip


def test_a_template_that_renders_as_gemmas_is_gemmas() -> None:
    assert chat_format(byte_tokenizer(GEMMA_LIKE)).name == GEMMA
    assert chat_format(byte_tokenizer(GEMMA_LIKE.replace(" | trim", ""))).name != GEMMA


def test_the_markup_that_asks_for_an_answer_opens_the_next_turn() -> None:
    layout = chat_format(byte_tokenizer()).layout(chat(("user", "one")).messages, prompt=True)
    last = layout.spans[-1]
    assert (layout.text[last.start :], last.turn) == ("<start_of_turn>model\n", 1)
    assert layout.text[: last.start] == "<start_of_turn>user\none<end_of_turn>\n"


def test_reasoning_that_the_template_marks_is_a_role() -> None:
    tokenizer = byte_tokenizer(THINKING)
    said = [("user", "2 + 2"), ("model", "<think>\nfour\n</think>\n\n4"), ("user", "1 + 1"), ("model", "2")]
    tokenise = ChatTokeniser(tokenizer)
    (short,) = tokenise([chat(*said[:2])])
    assert runs(tokenizer, short)[3:] == [
        ("<start_of_turn>assistant\n<think>\n", "template", 1),
        ("four", "reasoning", 1),
        ("\n</think>\n\n", "template", 1),
        ("4", "model", 1),
        ("<end_of_turn>\n", "template", 1),
    ]
    # The template keeps the reasoning of the last turn alone.
    (long,) = tokenise([chat(*said)])
    assert "reasoning" not in {role for _, role, _ in runs(tokenizer, long)}
    assert [text for text, role, _ in runs(tokenizer, long) if role == "model"] == ["4", "2"]


def test_reasoning_by_an_expression() -> None:
    tokenizer = byte_tokenizer()
    document = chat(("user", "[a] q"), ("model", "first [why] then [because] last"))
    (group,) = ChatTokeniser(tokenizer, reasoning=r"\[(.*?)\]")([document])
    assert [(text, role) for text, role, turn in runs(tokenizer, group) if turn == 1][1:-1] == [
        ("first ", "model"), ("[", "template"), ("why", "reasoning"), ("]", "template"), (" then ", "model"),
        ("[", "template"), ("because", "reasoning"), ("]", "template"), (" last", "model"),
    ]  # fmt: skip
    (whole,) = ChatTokeniser(tokenizer, reasoning=r"\[.*?\]")([document])
    assert [text for text, role, _ in runs(tokenizer, whole) if role == "reasoning"] == ["[why]", "[because]"]
    assert [text for text, role, _ in runs(tokenizer, whole) if role == "user"] == ["[a] q"]
    with pytest.raises(BadInputError, match=r"reasoning = '\(' is no regular expression"):
        ChatTokeniser(tokenizer, reasoning="(")


def test_the_same_chat_gives_the_same_text_on_any_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    layout = chat_format(byte_tokenizer(template)).layout(chat(("user", "one")).messages)
    assert layout.text.startswith("26 Jul 2024<bos><start_of_turn>user\none")


CONTENTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)


@given(st.lists(CONTENTS, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, PLAIN, THINKING]))
def test_any_content_is_found_again(contents: list[str], system: bool, template: str | None) -> None:
    speakers = [*(["system"] if system else []), *["user", "model"] * 3]
    said = list(zip(speakers, contents, strict=False))
    tokenizer = byte_tokenizer(template)
    (found,) = ChatTokeniser(tokenizer)([chat(*said)])
    if template is None and {role for role, _ in said} == {"system"}:
        assert found == "a system message alone is no chat; add a user's message"
        return
    spoken = {(turn, role): text for text, role, turn in runs(tokenizer, found) if role != "template"}
    for turn, (role, content) in enumerate(said):
        # Of line breaks at its ends, those that are one token with the template's are markup.
        expected = content.strip() if template is None and role != "system" else content
        assert spoken.get((turn, role), "").strip("\n") == expected.strip("\n")


# --- what cannot be told ---


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((("user", "hi <end_of_turn> you"),), r"message 0 holds the control token '<end_of_turn>'"),
        ((("user", "a"), ("model", "x<eos>")), r"message 1 holds the control token '<eos>'"),
        ((("model", "x"),), r"message 0 is a model's; user and model must take turns"),
        ((("system", "s"), ("user", "a"), ("user", "b")), r"message 2 is a user's; user and model must take turns"),
    ],
)
def test_a_chat_that_cannot_be_used_says_why(said: tuple[tuple[str, str], ...], reason: str) -> None:
    good, bad = ChatTokeniser(byte_tokenizer())([chat(("user", "fine")), chat(*said)])
    assert not isinstance(good, str)
    assert isinstance(bad, str)
    assert reason in bad


def test_what_a_template_refuses_or_leaves_out_is_said() -> None:
    first, second = ChatTokeniser(byte_tokenizer(GEMMA_LIKE.replace(" | trim", "")))(
        [chat(("model", "x")), chat(("system", "s"), ("user", "a"))]
    )
    assert first == "the chat template refuses it: roles must alternate"
    assert not isinstance(second, str)
    forgetful = PLAIN.replace("m.content +", "(m.content if m.role != 'system' else '') +")
    (lost,) = ChatTokeniser(byte_tokenizer(forgetful))([chat(("system", "s"), ("user", "a"))])
    assert lost == "the chat template does not keep message 0"
    changing = PLAIN.replace("m.content +", "(m.content | replace('x', 'y')) +")
    (changed,) = ChatTokeniser(byte_tokenizer(changing))([chat(("user", "a"), ("model", "xx"))])
    assert isinstance(changed, str)
    assert changed.startswith("the chat template changes the content of message 1")


@pytest.mark.parametrize(
    "template",
    ["{{ messages | length }}", "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{{ nothing.at.all }}"],
)
def test_a_template_without_roles_is_refused_with_the_remedy(template: str) -> None:
    with pytest.raises(BadInputError, match=r"a chat template without roles: .*; set chat_template = 'gemma'"):
        ChatTokeniser(byte_tokenizer(template))
    ChatTokeniser(byte_tokenizer(template), GEMMA)


def test_a_text_that_the_tokenizer_changes_is_named() -> None:
    tokenizer = byte_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    (found,) = ChatTokeniser(tokenizer)([chat(("user", "fine"), ("model", "Loud"))])
    assert found == "message 1 does not survive the tokenizer: 'Loud' becomes 'loud'; mend its text"


def test_gemmas_format_is_written_out() -> None:
    messages = [
        Message(role="system", content="S"),
        Message(role="user", content=" U "),
        Message(role="model", content="M"),
    ]
    assert render_gemma(messages, True) == (
        "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nM<end_of_turn>\n<start_of_turn>model\n"
    )
