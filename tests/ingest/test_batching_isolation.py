"""Sequences that share a row or a batch are computed as if each were alone: every architecture, both kinds of layer."""

from typing import Any

import pytest
import tiny_gemma
import tiny_models
import torch
from transformers import PreTrainedModel, masking_utils

from actlake.ingest.capture import Capture
from actlake.ingest.hooks import ARCHITECTURES
from actlake.ingest.loading import LoadedModel
from actlake.ingest.models import shape_of
from actlake.storage.errors import BadInputError

# Longer than the sliding window of 6 tokens, shorter, and of a single token; the second row has one sequence.
PACKED = ((19, 21), (40,), (1, 35, 4))
IDS = tiny_gemma.token_ids(3, 40)
POSITIONS = torch.tensor([[place for length in row for place in range(length)] for row in PACKED])
SPANS = [(b, sum(row[:i]), sum(row[: i + 1])) for b, row in enumerate(PACKED) for i in range(len(row))]
every_model = pytest.mark.parametrize("name", [*tiny_models.MODELS, "gemma3-27b, eager", "alternating"])


def loaded(name: str, dtype: torch.dtype) -> LoadedModel:
    """A tiny model as ``load_model`` gives it; ``alternating`` has layers with and without a sliding window."""
    name, _, attention = name.partition(", ")
    whole: PreTrainedModel
    if name == "alternating":
        whole, architecture = tiny_gemma.build("Gemma3ForCausalLM"), "Gemma3ForCausalLM"
    else:
        whole, architecture = tiny_models.build(name), tiny_models.MODELS[name].architecture
    if attention:
        whole.set_attn_implementation(attention)
    config: Any = whole.config.get_text_config()
    text: Any = whole.get_submodule(ARCHITECTURES[architecture].text)
    shape, cpu = shape_of(config.to_dict(), architecture), torch.device("cpu")
    return LoadedModel(text=text.to(dtype), shape=shape, device=cpu, dtype=dtype, kernels="native")


@every_model
def test_every_stream_is_that_of_the_sequence_alone(name: str) -> None:
    # In float64, so that only what is computed otherwise shows; attention by hand takes its softmax in float32.
    model = loaded(name, torch.float64)
    config: Any = model.text.config
    tolerance = 1e-5 if config._attn_implementation == "eager" else 1e-12
    capture = Capture(model, ["layers.*"])
    packed, unmasked = capture(IDS, POSITIONS), capture(IDS)
    for b, start, stop in SPANS:
        alone = capture(IDS[b : b + 1, start:stop])
        for point, expected in alone.items():
            limit = tolerance * expected.abs().max()
            assert (packed[point][b, start:stop] - expected[0]).abs().max() <= limit, point
            if start == 0:
                # What follows is padding to it.
                assert (unmasked[point][b, start:stop] - expected[0]).abs().max() <= limit, point
        if start > 0 and stop - start > 1:
            deepest = next(reversed(alone))
            assert (unmasked[deepest][b, start:stop] - alone[deepest][0]).norm() > 0.01 * alone[deepest][0].norm()


@every_model
def test_a_neighbours_tokens_change_no_bit_of_mine(name: str) -> None:
    capture = Capture(loaded(name, torch.bfloat16), ["layers.*"])
    before = capture(IDS, POSITIONS)
    for changed in SPANS[1], SPANS[4]:
        ids = IDS.clone()
        mine = ids[changed[0], slice(*changed[1:])]
        mine.copy_((mine + 1) % tiny_gemma.VOCABULARY)
        after = capture(ids, POSITIONS)
        for point in before:
            for b, start, stop in SPANS:
                same = torch.equal(after[point][b, start:stop], before[point][b, start:stop])
                assert same == ((b, start, stop) != changed), point


def test_an_attention_that_lets_sequences_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama", torch.float32)
    with monkeypatch.context() as broken:
        broken.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        with pytest.raises(BadInputError, match=r"see each other; use capture\.batching = 'padded'"):
            Capture(model, ["layers.1.resid_post"])(IDS, POSITIONS)
    assert Capture(model, ["layers.1.resid_post"])(IDS, POSITIONS)


def test_the_attention_is_tried_once_and_for_packed_rows_alone() -> None:
    model = loaded("llama", torch.float32)
    given: list[tuple[int, bool]] = []
    model.text.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append((len(kwargs["input_ids"]), "position_ids" in kwargs)),
        with_kwargs=True,
    )
    capture = Capture(model, ["layers.1.resid_post"])
    capture(IDS)
    assert given == [(3, False)]
    for _ in range(2):
        capture(IDS, POSITIONS)
    assert given[1:] == [(2, True), (2, True), (3, True), (3, True)]


def test_positions_of_another_shape_are_refused() -> None:
    capture = Capture(loaded("llama", torch.float32), ["layers.1.resid_post"])
    for wrong in (POSITIONS[:1], POSITIONS.int()):
        with pytest.raises(BadInputError, match="positions must be int64"):
            capture(IDS, wrong)
