"""Runs a model to answer prompts: batches padded on the left, tokens drawn by random numbers of each reply's own."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from actlake.ingest.chats import ChatFormat, control_ids
from actlake.ingest.documents import Message
from actlake.ingest.loading import LoadedModel
from actlake.ingest.replies import Reply, ReplyBatch, Wanted
from actlake.storage.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ReplyGenerator:
    """Answers batches of prompts with a model that has its head.

    A reply ends with the model's own end of sequence, or with what closes a model's turn in the chat format. Other
    control tokens are never drawn: no text could stand for them. The same batch gives the same replies wherever the
    same logits come out: on CPUs with the same software and threads; on GPUs as far as the kernels reproduce.
    """

    def __init__(self, model: LoadedModel, tokenizer: "PreTrainedTokenizerFast", chats: ChatFormat) -> None:
        if model.whole is None:
            raise BadInputError("this model was loaded without its head; load_model(..., head=True) can write replies")
        self._model, self._tokenizer = model, tokenizer
        self._whole: Any = model.whole
        self._stops = stop_ids(self._whole, tokenizer, chats)
        self._never = sorted(control_ids(tokenizer) - set(self._stops))

    def __call__(self, batch: ReplyBatch) -> list[Reply]:
        """Return the replies of a batch, in its order."""
        width = max(len(one.prompt.tokens) for one in batch.wanted)
        pad = self._stops[0]
        ids_BT = torch.full((len(batch.wanted), width), pad, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for i, one in enumerate(batch.wanted):
            ids_BT[i, width - len(one.prompt.tokens) :] = torch.from_numpy(one.prompt.tokens.astype(np.int64))
            mask_BT[i, width - len(one.prompt.tokens) :] = 1
        # The model's own defaults would fill in what is left out.
        self._whole.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=batch.rule.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._stops),
            pad_token_id=pad,
            use_cache=True,
        )
        with torch.inference_mode():
            out_BT = self._whole.generate(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
                logits_processor=LogitsProcessorList([self._drawing(batch, width)]),
            )
        return [self._reply(row) for row in out_BT[:, width:].cpu().numpy().astype(np.int32)]

    def _drawing(self, batch: ReplyBatch, width: int) -> LogitsProcessor:
        numbers_BT = np.stack([random_numbers(one, batch) for one in batch.wanted])
        return _Drawing(numbers_BT, batch.rule.temperature, width, self._never, len(self._tokenizer))

    def _reply(self, tokens: npt.NDArray[np.int32]) -> Reply:
        ends = np.flatnonzero(np.isin(tokens, self._stops))
        said = tokens[: ends[0]] if len(ends) else tokens
        text = self._tokenizer.backend_tokenizer.decode(said.tolist(), skip_special_tokens=False)
        return Reply(text=text, ending="eos" if len(ends) else "length", tokens=said)


def stop_ids(whole: Any, tokenizer: "PreTrainedTokenizerFast", chats: ChatFormat) -> tuple[int, ...]:
    """Return the ids that end a reply, ascending: the model's and tokenizer's end of sequence, and the end of a turn.

    Raises ``BadInputError`` for a model without any.
    """
    own = whole.generation_config.eos_token_id
    stops = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id, _closing(tokenizer, chats)}
    found = tuple(sorted(stop for stop in stops if stop is not None))
    if not found:
        raise BadInputError("this model names no token that ends a reply; give its tokenizer an eos_token")
    return found


def _closing(tokenizer: "PreTrainedTokenizerFast", chats: ChatFormat) -> int | None:
    """Return the first control token after what a model said, None for a format without."""
    laid = chats.layout([Message(role="user", content="A"), Message(role="model", content="B")])
    start = next(span.start for span in reversed(laid.spans) if laid.text.startswith("B", span.start))
    ids = tokenizer.backend_tokenizer.encode(laid.text[start + 1 :], add_special_tokens=False).ids
    control = control_ids(tokenizer)
    return next((token for token in ids if token in control), None)


def random_numbers(one: Wanted, batch: ReplyBatch) -> npt.NDArray[np.float64]:
    """Return the random numbers of a reply in [0, 1), one a token: of the seed, the prompt's id and ``k`` alone."""
    name = f"{batch.rule.seed}/{one.k}/{one.prompt.document.id}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    # 32 bits: times a sum just below 1 they stay below that sum.
    drawn = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**32, batch.rule.max_new_tokens)
    numbers: npt.NDArray[np.float64] = drawn / 2**32
    return numbers


class _Drawing(LogitsProcessor):
    """Leaves one token possible in each row: the likeliest, or the one that the row's next random number falls on."""

    def __init__(
        self, numbers_BT: npt.NDArray[np.float64], temperature: float, width: int, never: list[int], n_pieces: int
    ) -> None:
        self._numbers_BT, self._temperature, self._width = torch.from_numpy(numbers_BT), temperature, width
        self._never, self._n_pieces = never, n_pieces

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] of 0 for the token that is drawn, and minus infinity for all others."""
        scores_BV = scores.double()
        scores_BV[:, [token for token in self._never if token < scores.shape[1]]] = -torch.inf
        # Tables of some models are longer than the vocabulary.
        scores_BV[:, self._n_pieces :] = -torch.inf
        drawn_B1 = self._draw(scores_BV, input_ids.shape[1] - self._width)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)

    def _draw(self, scores_BV: torch.Tensor, step: int) -> torch.Tensor:
        if self._temperature == 0:
            return scores_BV.argmax(dim=1, keepdim=True)
        sums_BV = torch.softmax(scores_BV / self._temperature, dim=1).cumsum(dim=1)
        numbers_B1 = self._numbers_BT[:, step : step + 1].to(sums_BV.device)
        return torch.searchsorted(sums_BV, numbers_B1 * sums_BV[:, -1:], right=True)
