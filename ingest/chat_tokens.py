"""Chats to tokens, each with its role and turn; what a speaker said is checked by decoding it again."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from actlake.ingest.chats import GEMMA, ChatFormat, Rendering, chat_format, control_ids
from actlake.ingest.documents import Document
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.errors import BadInputError, SpecMismatchError
from actlake.storage.rowspace import ROLES

_TEMPLATE = ROLES["template"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenisedChat:
    """A chat without BOS: ``tokens`` int32, ``roles`` uint8 and ``turns`` int16 [T]."""

    tokens: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]
    turns: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.tokens)


class ChatTokeniser:
    """Tokenises chats as one format renders them.

    A token whose characters are all of one span has its role and turn. One that reaches over the end of a span has the
    role template and the turn of its last character.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", reasoning: str | None = None) -> None:
        self.format: ChatFormat = chat_format(tokenizer, template, reasoning)
        self._backend = tokenizer.backend_tokenizer
        control = sorted(control_ids(tokenizer))
        # By token id; the last one stands for all that are larger. A search among thousands of ids is slower than BPE.
        self._is_control = np.zeros(max(control, default=-1) + 2, dtype=np.bool_)
        self._is_control[control] = True

    @classmethod
    def of(cls, tokenizer: Any, spec: CorpusSpec) -> Self:
        """Return what tokenises a corpus's chats.

        Raises ``SpecMismatchError`` for a tokenizer whose chats look otherwise than the spec says.
        """
        found = cls(tokenizer, GEMMA if spec.chat_format == GEMMA else "auto", spec.reasoning)
        if found.format.name != spec.chat_format:
            raise SpecMismatchError(
                f"the corpus has chats of the format {spec.chat_format!r}, this tokenizer's are {found.format.name!r}; "
                "use the tokenizer that it was built with"
            )
        return found

    def __call__(self, documents: Sequence[Document], *, prompt: bool = False) -> list[TokenisedChat | str]:
        """Return each chat's tokens, or why it cannot be used; ``prompt`` adds the markup that asks for an answer."""
        laid = [self._layout(document, prompt) for document in documents]
        texts = [rendering.text for rendering in laid if isinstance(rendering, Rendering)]
        # A saved tokenizer, or a call of another user of this one, may have set them.
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [one if isinstance(one, str) else self._tokens(one, next(encodings)) for one in laid]

    def _layout(self, document: Document, prompt: bool) -> Rendering | str:
        try:
            return self.format.layout(document.messages, prompt=prompt)
        except BadInputError as error:
            return str(error)

    def _tokens(self, rendering: Rendering, encoding: Any) -> TokenisedChat | str:
        tokens = np.array(encoding.ids, dtype=np.int32)
        start, stop = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        starts = np.array([span.start for span in rendering.spans])
        span = np.searchsorted(starts, start, side="right") - 1
        # A token without characters of its own, as some byte tokens are, belongs where it stands.
        last = np.searchsorted(starts, np.maximum(stop - 1, start), side="right") - 1
        roles = np.array([one.role for one in rendering.spans], dtype=np.uint8)
        chat = TokenisedChat(
            tokens=tokens,
            roles=np.where(span == last, roles[span], np.uint8(_TEMPLATE)),
            turns=np.array([one.turn for one in rendering.spans], dtype=np.int16)[last],
        )
        said = (chat.roles != _TEMPLATE).nonzero()[0]
        return self._control_token(chat, said) or self._difference(rendering, chat, span, start, stop, said) or chat

    def _control_token(self, chat: TokenisedChat, said: npt.NDArray[np.int64]) -> str | None:
        found = said[self._is_control[np.minimum(chat.tokens[said], len(self._is_control) - 1)]]
        if not len(found):
            return None
        token = self._backend.id_to_token(int(chat.tokens[found[0]]))
        return (
            f"message {chat.turns[found[0]]} holds the control token {token!r}, which would end or begin a turn; "
            "take it out of the text"
        )

    def _difference(
        self,
        rendering: Rendering,
        chat: TokenisedChat,
        span: npt.NDArray[np.int64],
        start: npt.NDArray[np.int64],
        stop: npt.NDArray[np.int64],
        said: npt.NDArray[np.int64],
    ) -> str | None:
        """Say which turn's tokens do not decode to what was said there, None where all do."""
        runs = [run for run in np.split(said, np.flatnonzero(np.diff(span[said])) + 1) if len(run)]
        decoded = self._backend.decode_batch([chat.tokens[run].tolist() for run in runs], skip_special_tokens=False)
        for run, text in zip(runs, decoded, strict=True):
            expected = rendering.text[start[run[0]] : stop[run[-1]]]
            if not _same(text, expected):
                return (
                    f"message {chat.turns[run[0]]} does not survive the tokenizer: {_shown(expected)} becomes "
                    f"{_shown(text)}; mend its text"
                )
        return None


def _same(text: str, expected: str) -> bool:
    # Some tokenizers swallow the space before a text, and some compose characters.
    first, second = text.removeprefix(" "), expected.removeprefix(" ")
    return first == second or unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
