"""How large a text model is and how many floating-point operations a token takes, from its shape alone."""

from actlake.ingest.models import ModelShape
from actlake.storage.hookpoints import STREAMS, HookPoint

#: Share of a block's matrix products that has run when a stream's tensor is there: the attention's, then the MLP's.
_AFTER_ATTENTION = STREAMS.index("attn_out")
_AFTER_MLP = STREAMS.index("mlp_out")


def attention_parameters(shape: ModelShape) -> int:
    """Return the numbers in one block's attention: queries and output d x z, keys and values d x kv."""
    return 2 * shape.d_model * (shape.d_attn_z + shape.d_kv)


def mlp_parameters(shape: ModelShape) -> int:
    """Return the numbers in one block's gated MLP: three matrices d x d_ff."""
    return 3 * shape.d_model * shape.d_ff


def block_parameters(shape: ModelShape) -> int:
    """Return the numbers in the matrices of all blocks; norms are less than 0.1 % and left out."""
    return shape.n_layers * (attention_parameters(shape) + mlp_parameters(shape))


def embedding_parameters(shape: ModelShape) -> int:
    """Return the numbers in the table of token embeddings."""
    return shape.vocab_size * shape.d_model


def flops_per_token(shape: ModelShape, points: tuple[str, ...], sequence_tokens: float) -> float:
    """Return the operations of one token's forward pass, stopped after the deepest hook point.

    ``2 N + 4 L z t``: N the numbers in the matrices that are run, L the layers, z the width of all heads, t the keys a
    token attends to. The forward third of Chowdhery et al., PaLM (2022), appendix B, ``6 N + 12 L H Q T`` with causal
    attention, where t is half of the sequence. A table is looked up, not multiplied; logits are not computed; sliding
    windows are not taken off.
    """
    deepest = max((HookPoint.parse(point) for point in points), key=lambda p: (p.layer, STREAMS.index(p.stream)))
    stage = STREAMS.index(deepest.stream)
    n_attention = deepest.layer + (stage >= STREAMS.index("attn_z"))
    n_mlp = deepest.layer + (stage >= _AFTER_MLP)
    matrices = n_attention * attention_parameters(shape) + n_mlp * mlp_parameters(shape)
    return 2.0 * matrices + 4.0 * n_attention * shape.d_attn_z * sequence_tokens / 2
