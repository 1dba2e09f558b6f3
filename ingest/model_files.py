"""The files of a model: where they lie, whether they are all there, and the hash of what they hold."""

import contextlib
import difflib
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actlake.ingest.extras import needs
from actlake.ingest.gemma3 import GEMMA_3
from actlake.ingest.gguf_model import PACKAGED, cache_root
from actlake.ingest.only_one import only_one
from actlake.storage.errors import BadInputError, ModelAccessError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INDEX = "model.safetensors.index.json"
_WANTED = (
    "config.json",
    "*.safetensors",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
)
#: The same weights once more, in the layout of their makers' own code.
_UNWANTED = ("consolidated*", "original/*")
#: Keys of a config.json that say nothing about the computation.
_CHANGEABLE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict", "output_hidden_states")


def local_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder that ``name`` points to, or None for the name of a model on the Hub.

    Raises ``ModelAccessError`` for what is neither, ``BadInputError`` for a folder with a revision.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise BadInputError(f"model {name!r} is a folder, which has no revision {revision!r}; leave revision out")
        return folder.resolve()
    if _HUB_NAME.fullmatch(name) and not name.startswith("."):
        return None
    raise ModelAccessError(
        f"no model {name!r}: no such folder, and not a Hub name such as 'google/gemma-3-4b-pt'; "
        f"the packaged model is {PACKAGED!r}"
    )


def check_folder(folder: Path, name: str) -> None:
    """Raise ``ModelAccessError`` naming what is missing of config.json, safetensors weights and tokenizer.json."""
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.insert(0, "*.safetensors")
    elif (folder / _INDEX).is_file():
        files: Sequence[str] = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        missing += sorted(file for file in set(files) if not (folder / file).is_file())
    if missing:
        raise ModelAccessError(f"model {name!r} lacks {', '.join(missing)} in {folder}{_remedy(folder, missing)}")


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ``ModelAccessError`` for a config.json whose model needs code of its own, or has quantised weights."""
    if config.get("auto_map"):
        code = ", ".join(sorted(str(value) for value in config["auto_map"].values()))
        raise ModelAccessError(
            f"{path} asks for code from the model's repository ({code}), which is never run (no trust_remote_code): "
            "use a model of a class that transformers itself has, or convert it to one and save_pretrained() it"
        )
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "unknown")
        raise ModelAccessError(
            f"{path} is of quantised weights ({kind}); activations are taken of the full ones: use the model that it "
            "was made from, or dequantise it in transformers and save_pretrained() it"
        )


def _remedy(folder: Path, missing: Sequence[str]) -> str:
    if "*.safetensors" in missing and any(p.suffix in (".bin", ".pt", ".pth") for p in folder.iterdir()):
        return "; pickled weights are never read: load them in transformers once and save_pretrained() them here"
    return "; save the model and its fast tokenizer there with transformers' save_pretrained()"


def download(name: str, revision: str | None) -> Path:
    """Return the local snapshot of a Hub model, fetching what is not cached; its folder's name is the commit."""
    with needs("ingest", f"the Hub model {name!r}"):
        import huggingface_hub
    with _explained(name, revision):
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    return Path(folder)


def download_config(name: str, revision: str | None) -> Path:
    """Return the local copy of a Hub model's config.json."""
    with needs("ingest", f"the Hub model {name!r}"):
        import huggingface_hub
    with _explained(name, revision):
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into ``ModelAccessError`` with what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        shown = repr(name) if revision is None else f"{name!r} at revision {revision!r}"
        raise ModelAccessError(_explanation(error, name, shown)) from error


def _explanation(error: Exception, name: str, shown: str) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    sign_in = "sign in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"model {shown} is gated: accept its terms on {page}, then {sign_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model {shown}: no such revision; the valid ones are on {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no model {shown} on the Hub, or it is private{_resembling(name)}: check the name, or {sign_in}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"model {shown} has no config.json; give a model in the transformers format"
    return (
        f"model {shown} is no folder here, is not in the local cache and could not be fetched "
        f"({type(error).__name__}){_resembling(name)}: check the network and HF_HUB_OFFLINE, or fetch it elsewhere "
        "and give its folder"
    )


def _resembling(name: str) -> str:
    close = [] if name in GEMMA_3 else difflib.get_close_matches(name, GEMMA_3, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# --- Fingerprints -------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """Return the sha256 over the names and hashes of the weight files and what config.json says of the computation."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    meaning = _semantic(json.loads((folder / "config.json").read_text()))
    digest.update(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def _semantic(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _CHANGEABLE and not key.startswith("_")}
        return {key: _semantic(item) for key, item in kept.items()}
    return [_semantic(item) for item in value] if isinstance(value, list) else value


def file_sha256(path: Path) -> str:
    """Return a file's sha256, remembered by its path, size and time of change.

    A file in the Hub's cache bears its sha256 as its name; it is taken from there.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    stat = real.stat()
    key = hashlib.sha256(f"{real}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_root() / "sha256" / key
    if memo.is_file():
        return memo.read_text()
    # The workers of a machine start together, and weights may be 54 GB.
    with only_one(cache_root() / "locks", key):
        if memo.is_file():
            return memo.read_text()
        with real.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _remember(memo, found)
    return found


def _remember(memo: Path, found: str) -> None:
    # Where the cache cannot be written the next run hashes again, which costs time only.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_name(f".{memo.name}-{uuid.uuid4().hex}")
        temporary.write_text(found)
        temporary.replace(memo)
