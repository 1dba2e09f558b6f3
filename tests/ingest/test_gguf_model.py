"""The packaged weights: read from GGUF exactly, converted once, published whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from actlake.ingest import gguf_model
from actlake.ingest.gguf_file import GgufFile
from actlake.storage.errors import ModelAccessError

SPACE = "\u2581"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACTLAKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    index = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.asarray(np.sin(index), dtype=np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "gemma3")
    writer.add_uint32("gemma3.block_count", 3)
    writer.add_float32("gemma3.epsilon", 0.5)
    writer.add_bool("flag", True)
    writer.add_array("words", ["a", "é", SPACE, ""])
    writer.add_array("kinds", [1, 3, 4])
    writer.add_tensor("plain", values(5, 7))
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0):
        writer.add_tensor(kind.name, quantize(values(4, 64), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read_as_written(file: Path) -> None:
    found = GgufFile(file)
    assert found.metadata["gemma3.block_count"] == 3
    assert found.metadata["gemma3.epsilon"] == 0.5
    assert found.metadata["flag"] is True
    assert found.metadata["words"] == ["a", "é", SPACE, ""]
    assert found.metadata["kinds"] == [1, 3, 4]
    assert np.array_equal(found.tensor("plain"), values(5, 7))
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0):
        expected = dequantize(quantize(values(4, 64), kind), kind)
        assert found.tensor(kind.name).dtype == np.float32
        assert np.array_equal(found.tensor(kind.name), expected)


@pytest.mark.parametrize("n_bytes", [24, 60, 150])
def test_a_truncated_header_is_refused(file: Path, n_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:n_bytes])
    with pytest.raises(ModelAccessError, match="is a damaged GGUF file"):
        GgufFile(file)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ModelAccessError, match="is no GGUF file"):
        GgufFile(tmp_path / "x.gguf")


def test_another_model_in_the_package_is_refused() -> None:
    with pytest.raises(ModelAccessError, match=r"is not Gemma 3 270M: .*'gemma3\.block_count': 26"):
        gguf_model._check_metadata({"gemma3.block_count": 26})


# --- The tokenizer ------------------------------------------------------------------------------------------------


def small_vocabulary() -> dict[str, Any]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mark>", "\n", "\n\n", "  ", "   "]
    kinds = [3, 3, 3, 3, 3, 4, 4, 4, 4]
    normal = ["ab", "abc", "bc", f"{SPACE}a", "a", "b", "c", SPACE, *(f"<0x{i:02X}>" for i in range(256))]
    ids = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    return {
        "tokenizer.ggml.tokens": pieces + normal,
        "tokenizer.ggml.token_type": kinds + [1] * len(normal),
        **{f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ids.items()},
    }


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["abc"]),
        ("cab", ["c", "ab"]),
        ("b a", ["b", f"{SPACE}a"]),
        ("a   b", ["a", SPACE * 3, "b"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("é", ["<0xC3>", "<0xA9>"]),
        ("a<mark>b", ["a", "<mark>", "b"]),
    ],
)
def test_the_tokenizer_merges_in_the_order_of_the_vocabulary(text: str, pieces: list[str]) -> None:
    tokenizer = gguf_model.build_tokenizer(small_vocabulary())
    assert tokenizer.encode(text).tokens == ["<bos>", *pieces]
    assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces
    if "<" not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_runs_of_white_space_merge_from_the_longest() -> None:
    pieces = ["\n", "\n\n", "\n\n\n", "ab", "a", "b"]
    merges = gguf_model._merges(pieces, {piece: i for i, piece in enumerate(pieces)})
    assert merges == [("\n\n", "\n"), ("\n", "\n\n"), ("\n", "\n"), ("a", "b")]


# --- Publishing ---------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(f"{name} of {folder.name}")


def listing(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir())


def test_the_conversion_runs_once_and_shows_the_terms(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, heard = [], list[str]()

    def convert(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    monkeypatch.setattr(gguf_model, "_convert", convert)
    first = gguf_model.converted(heard.append)
    assert "Gemma Terms of Use" in heard[0]
    terms = Path(heard[0].partition("Terms of Use: ")[2].partition(" (")[0])
    assert "Gemma" in terms.read_text()
    n_heard = len(heard)
    assert gguf_model.converted(heard.append) == first
    assert (len(calls), len(heard)) == (1, n_heard)
    assert listing(cache) == [first.name] == ["gemma-3-270m-gguf-a5fd3b62"]


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError("disk full")

    monkeypatch.setattr(gguf_model, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        gguf_model.converted(lambda message: None)
    assert listing(cache) == []


def test_of_two_conversions_the_first_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(folder: Path) -> None:
        fill(folder)
        winner = cache / "models" / "gemma-3-270m-gguf-a5fd3b62"
        winner.mkdir()
        fill(winner)

    monkeypatch.setattr(gguf_model, "_convert", lose)
    found = gguf_model.converted(lambda message: None)
    assert (found / "config.json").read_text() == "config.json of gemma-3-270m-gguf-a5fd3b62"
    assert listing(cache) == [found.name]


def test_a_folder_that_lost_a_file_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "_convert", fill)
    found = gguf_model.converted(lambda message: None)
    (found / "model.safetensors").unlink()
    assert gguf_model.converted(lambda message: None) == found
    assert (found / "model.safetensors").is_file()
    assert listing(cache) == [found.name]


def test_only_old_leftovers_are_swept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "_convert", fill)
    old, young = (cache / "models" / f".gemma-3-270m-gguf-a5fd3b62-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    yesterday = time.time() - 86_400
    os.utime(old, (yesterday, yesterday))
    found = gguf_model.converted(lambda message: None)
    assert listing(cache) == sorted([young.name, found.name])


_KILLED = """
import sys, time
from pathlib import Path
from actlake.ingest import gguf_model

def convert(folder):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("half")
    print("written", flush=True)
    time.sleep(60)

gguf_model._convert = convert
gguf_model.converted(lambda message: None)
"""


def test_a_killed_conversion_is_not_taken_for_a_whole_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    monkeypatch.setattr(gguf_model, "_convert", fill)
    found = gguf_model.converted(lambda message: None)
    assert (found / "model.safetensors").read_text() != "half"


def test_the_packaged_config_is_complete_and_plain_json() -> None:
    config = json.loads(json.dumps(gguf_model.PACKAGED_CONFIG))
    assert config == gguf_model.PACKAGED_CONFIG
    assert config["layer_types"].count("full_attention") == 3
    assert [config["layer_types"][layer] for layer in (4, 5, 17)] == [
        "sliding_attention",
        "full_attention",
        "full_attention",
    ]
