"""Names and references that were made to lead elsewhere: no key, hook point or reference leaves its folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from actlake.storage.errors import ActlakeError, BadInputError, CorruptObjectError, NotFoundError
from actlake.storage.header import Header
from actlake.storage.hookpoints import HookPoint
from actlake.storage.stored_json import parse_object, require_fields
from actlake.storage.stores import Store, resolve_url

OUTSIDE = ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "//x", "..\\x", "a\\b", "C:\\x", "a\0b", "\0"]
#: Ugly, and nothing but names: they stay where they are, whatever other programs make of them.
INSIDE = [
    *("%2e%2e/x", "%2e%2e%2fx", "..%c0%afx", "\uff0e\uff0e/x", "\uff0e\uff0e\uff0fx", "\u2024\u2024/x", "\u2215x"),
    *("...", "..x", "x..", ". .", "~/x", "$HOME/x", "a b", "a#b?c=d", "\u202ex", "-rf", "http:/x", "e\u0301"),
]


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> Store:
    return Store(tmp_path / "data" if request.param == "file" else memory_url)


@pytest.mark.parametrize("key", OUTSIDE)
def test_no_key_leaves_its_folder(store: Store, key: str) -> None:
    calls: list[Any] = [store.path, store.child, store.read, store.exists, store.nbytes, store.names, store.delete]
    for call in calls:
        with pytest.raises(BadInputError, match="leaves its folder"):
            call(key)
    with pytest.raises(BadInputError, match="leaves its folder"):
        store.write(key, b"x")


@pytest.mark.parametrize("key", INSIDE)
def test_odd_names_are_names_and_nothing_else(store: Store, key: str) -> None:
    store.write(key, b"x")
    assert store.path(key).startswith(f"{store.root}/")
    assert store.read(key) == b"x"
    if store.local:
        inside = Path(store.root).resolve()
        assert [path for path in inside.parent.rglob("*") if path.is_file()] == [inside / key]


@pytest.mark.parametrize("name", ["x" * 5000, "/".join(["x" * 200] * 50)])
def test_a_name_that_is_too_long_for_the_disk_is_bad_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="File name too long"):
        Store(tmp_path).read(name)


@pytest.mark.parametrize(
    "name",
    [
        *("layers.0", "layers.0.resid_post/../../x", "../layers.0.resid_post", "layers.-1.resid_post", ""),
        *("layers.00.resid_post", "layers.\u0661.resid_post", "layers.0.resid_post\n", "layers.0.resid_p\u043est"),
        *("layers.99999.resid_post", "layers.0.x", "Layers.0.resid_post", "layers.0.resid_post "),
    ],
)
def test_a_hook_point_has_one_spelling(name: str) -> None:
    with pytest.raises(BadInputError):
        HookPoint.parse(name)


# --- where the corpus is said to be --------------------------------------------------------------------------------

ELSEWHERE = [
    ("gs://bucket/data", "gs://other/corpus"),
    ("gs://bucket/data", "../../other/corpus"),
    ("gs://bucket/data", "gs://bucket/../other/corpus"),
    ("gs://bucket/data", "gs://bucket2/corpus"),
    ("gs://bucket/data", "s3://bucket/corpus"),
    ("gs://bucket/data", "http://169.254.169.254/corpus"),
    ("gs://bucket/data", "/etc"),
    ("gs://bucket/data", "file:///etc"),
    ("gs://bucket/data", "simplecache::http://example.org/x"),
    ("gs://bucket/data", "memory://x"),
    ("https://example.org/data", "https://example.com/corpus"),
    ("hf://datasets/me/mine/data", "hf://datasets/you/yours/corpus"),
    ("/data/demo", "http://example.org/x"),
    ("/data/demo", "gs://bucket/corpus"),
    ("/data/demo", "a\0b"),
]


@pytest.mark.parametrize(("base", "reference"), ELSEWHERE)
def test_a_reference_leads_to_no_other_place(base: str, reference: str) -> None:
    with pytest.raises(BadInputError):
        resolve_url(reference, Store(base))


@pytest.mark.parametrize(
    ("base", "reference", "url"),
    [
        ("gs://bucket/a/data", "../corpus", "gs://bucket/a/corpus"),
        ("gs://bucket/a/data", "gs://bucket/corpus", "gs://bucket/corpus"),
        ("gs://bucket/a/data", "gcs://bucket/corpus", "gcs://bucket/corpus"),
        ("hf://datasets/me/mine/data", "hf://datasets/me/mine/corpus", "hf://datasets/me/mine/corpus"),
        ("/a/data", "../../b/corpus", "/b/corpus"),
        ("/a/data", "/b/corpus", "/b/corpus"),
    ],
)
def test_a_reference_leads_to_its_own_place(base: str, reference: str, url: str) -> None:
    assert resolve_url(reference, Store(base)).url == url


@pytest.mark.parametrize("roots", ["gs://other/corpora", "s3://x, gs://other/corpora/", "gs://other"])
def test_places_that_the_user_names_are_followed(roots: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTLAKE_CORPUS_ROOTS", roots)
    assert resolve_url("gs://other/corpora/x", Store("gs://bucket/data")).url == "gs://other/corpora/x"
    for reference in ("gs://other2/corpora/x", "gs://othe", "http://example.org/x"):
        with pytest.raises(BadInputError, match=f"ACTLAKE_CORPUS_ROOTS={reference}"):
            resolve_url(reference, Store("gs://bucket/data"))


def test_no_credential_is_sent_elsewhere() -> None:
    with pytest.raises(BadInputError) as caught:
        resolve_url("http://example.org/x", Store("gs://bucket/data", {"token": "geheim"}))
    assert "geheim" not in str(caught.value)


# --- strict JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "does not fit"),
        ('{"a": 18446744073709551616}', "does not fit"),
        ('{"a": ' + "9" * 10_000 + "}", "does not fit"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("[1]", "it is a list"),
        ("", "Expecting value"),
        ("\ufeff{}", "BOM|Expecting value"),
    ],
)
def test_json_of_others_is_read_strictly(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_object(text.encode())


def test_json_of_ours_is_read() -> None:
    value = {"a": [1, -1, 2**64 - 1, 0.5, None, True, "x", "\U0001f600"], "b": {}}
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("value", [{"n_rows": "7"}, {"n_rows": True}, {"n_rows": 7.0}, {"n_rows": None}, {"corpus": 1}])
def test_fields_are_of_their_types(value: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(value))} = "):
        require_fields(Header, value)


def test_an_object_that_is_too_large_is_not_read(store: Store) -> None:
    store.write("x", b"y" * 1000)
    assert store.read("x", 1000) == b"y" * 1000
    with pytest.raises(CorruptObjectError, match="more than 999 bytes"):
        store.read("x", 999)
    with pytest.raises(NotFoundError):
        store.read("z", 999)
    store.write("x", b"")
    assert store.read("x", 0) == b""
    with pytest.raises(ActlakeError):
        Header.read(store)
