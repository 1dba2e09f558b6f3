"""Chats for tests: a tokenizer of bytes that loses nothing, templates of several kinds, and what each token is."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from actlake.ingest.chat_tokens import TokenisedChat
from actlake.ingest.documents import Document, Message
from actlake.storage.rowspace import ROLES

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

#: One turn after the other, contents as they are.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)

#: Reasoning stays in the last turn alone, with white space of the template's own, as Qwen 3's template has it.
THINKING = """\
{%- for m in messages %}
{%- set content = m.content %}
{%- set thought = '' %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<start_of_turn>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content + '<end_of_turn>\n' }}
{%- endfor %}"""


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token a byte, but for two line breaks, which are one token, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet, "ĊĊ"])}
    backend = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*said: tuple[str, str], name: str = "c") -> Document:
    """Return a chat of (role, content) pairs."""
    return Document(id=name, source="s", messages=tuple(Message(role=role, content=content) for role, content in said))


def runs(tokenizer: Any, found: TokenisedChat | str) -> list[tuple[str, str, int]]:
    """Return the text of each run of tokens of one role and turn, with both."""
    assert not isinstance(found, str), found
    names = {code: name for name, code in ROLES.items()}
    ids: list[tuple[list[int], str, int]] = []
    for token, role, turn in zip(found.tokens.tolist(), found.roles.tolist(), found.turns.tolist(), strict=True):
        if not ids or ids[-1][1:] != (names[role], turn):
            ids.append(([], names[role], turn))
        ids[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special_tokens=False), role, turn) for tokens, role, turn in ids]


def save_chat_model(folder: Path, **changes: Any) -> Path:
    """Save a Gemma 3 of two narrow layers with a tokenizer of bytes; return the folder."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        **changes,
    )
    torch.manual_seed(0)
    model: Any = Gemma3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
