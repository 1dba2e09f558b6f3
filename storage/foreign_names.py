"""Hook points as other tools name them: ``gs2:9/attn_out``, ``tl:blocks.9.hook_resid_post``.

What is stored always bears our names. Gemma Scope 2 keeps each dictionary in a folder such as
``attn_out_all/layer_9_width_16k_l0_small``, whose config names the tensor: there ``attn_out`` is the input of
``o_proj``, our ``attn_z``. TransformerLens' tensors (3.9) were compared with ours in float32 on tiny models of seven
architectures: equal bit for bit as it loads them, within 1.4e-5 with its usual processing of weights. Names of tensors
that are not equal are refused with the difference.
"""

import re
from collections.abc import Mapping

from actlake.storage.errors import UnknownNameError, nearest

_GS2_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "attn_out": ("attn_z",),
    "mlp_out": ("mlp_out",),
    "resid_post": ("resid_post",),
    "transcoder": ("mlp_in", "mlp_out"),
}
_FOLDER = f"({'|'.join(_GS2_FOLDERS)})(?:_all)?"
_GS2 = re.compile(rf"(\*|\d+)/{_FOLDER}|{_FOLDER}/layer_(\*|\d+)(?:_[\w.]+)?")

_TL = re.compile(r"blocks\.(\*|\d+)\.([\w.]+)")
_TL_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}
_FOLDED = "is before the norm's gain, which TransformerLens folds into the weights behind it"
_TL_OTHERS = {
    "hook_mlp_in": "is the residual before the norm (layers.{L}.resid_mid); what the MLP reads is layers.{L}.mlp_in",
    "ln1.hook_normalized": f"{_FOLDED}; no stream of ours is what attention reads",
    "ln2.hook_normalized": f"{_FOLDED}; with its gain it is layers.{{L}}.mlp_in",
    "ln1_post.hook_normalized": "is before the norm's gain; with it, it is layers.{L}.attn_out",
    "ln2_post.hook_normalized": "is before the norm's gain; with it, it is layers.{L}.mlp_out",
}
#: Qwen 2 adds a bias to its values; TransformerLens moves what it adds to each head behind the heads.
_VALUE_BIAS = (
    "lacks the bias of the values, which TransformerLens folds into the one behind o_proj; layers.{L}.attn_z has it"
)
_TL_DIFFERS = {("Qwen2ForCausalLM", "attn.hook_z"): _VALUE_BIAS}

PREFIXES = ("gs2", "tl")


def translate(name: str, architecture: str = "") -> tuple[str, ...]:
    """Return the hook points, in our names, that a foreign name stands for; any other name as it is.

    ``*`` may stand for the layer. ``architecture`` is the model's class where it is known. Raises ``UnknownNameError``
    for a name that no hook point is equal to, with the difference.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        return (name,)
    if prefix == "gs2":
        return _gemma_scope_2(name, rest, architecture)
    if prefix == "tl":
        return _transformer_lens(name, rest, architecture)
    raise UnknownNameError(f"no prefix {prefix!r} in {name!r}{nearest(prefix, PREFIXES)}")


def foreign_names(stream: str, architecture: str) -> tuple[str, ...]:
    """Return the foreign names of a stream, with ``{L}`` for the layer; Gemma Scope 2 has none for other models."""
    found = [f"gs2:{{L}}/{folder}" for folder, streams in _GS2_FOLDERS.items() if streams == (stream,)]
    if not architecture.startswith("Gemma3"):
        found = []
    for hook, equal in _TL_HOOKS.items():
        if equal == stream and (architecture, hook) not in _TL_DIFFERS:
            found.append(f"tl:blocks.{{L}}.{hook}")
    return tuple(found)


def _gemma_scope_2(name: str, rest: str, architecture: str) -> tuple[str, ...]:
    if architecture and not architecture.startswith("Gemma3"):
        raise UnknownNameError(f"{name!r} is a name of Gemma Scope 2, which is of Gemma 3, not of {architecture}")
    match = _GS2.fullmatch(rest)
    if match is None:
        raise UnknownNameError(
            f"{name!r} is no folder of Gemma Scope 2; write gs2:<layer>/<folder> or gs2:<folder>/layer_<layer>_..., "
            f"with a folder of {', '.join(_GS2_FOLDERS)}"
        )
    layer, folder = (match[1], match[2]) if match[1] else (match[4], match[3])
    return tuple(f"layers.{layer}.{stream}" for stream in _GS2_FOLDERS[folder])


def _transformer_lens(name: str, rest: str, architecture: str) -> tuple[str, ...]:
    match = _TL.fullmatch(rest)
    if match is None:
        raise UnknownNameError(f"{name!r} is no hook of a block; write e.g. tl:blocks.9.hook_resid_post")
    layer, hook = match[1], match[2]
    if difference := _TL_DIFFERS.get((architecture, hook)) or _TL_OTHERS.get(hook):
        raise UnknownNameError(f"{name!r} has no equal here: it {difference.format(L=layer)}")
    if hook not in _TL_HOOKS:
        raise UnknownNameError(
            f"{name!r} has no equal here: it is inside attention, the MLP or a norm, where no hook point of ours is"
            f"{nearest(hook, _TL_HOOKS)}"
        )
    return (f"layers.{layer}.{_TL_HOOKS[hook]}",)
