"""Listing everything below a URL, on every kind of store, page by page; and what each key means."""

import re
from pathlib import Path
from uuid import uuid4

import pytest
from servers import Servers
from stored import make_whole

from actlake.storage import listing
from actlake.storage.listing import list_objects, modified_at
from actlake.storage.places import Place, kind_of, place_of
from actlake.storage.stores import Store

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")

#: Names that lie near each other, and names that URLs quote.
NAMES = ["a", "ab", "a/b/c/d/e/f", "a b/%41+#", "déjà/vu", "z/.actlake-0", *(f"many/{number}/0" for number in range(7))]


@pytest.mark.parametrize("kind", ["file", "memory", "gs", "s3"])
def test_every_object_is_listed_with_size_and_age(
    kind: str, tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Services give them in several answers.
    monkeypatch.setattr(listing, "_PAGE", 3)
    if kind in ("gs", "s3"):
        folder = servers.folder(kind)
    else:
        folder = Store(tmp_path) if kind == "file" else Store(f"memory://{uuid4().hex}")
    place = folder.child("data")
    names = NAMES if kind == "s3" else [name for name in NAMES if name != "a"]
    for number, name in enumerate(names):
        place.write(name, b"x" * number)
    folder.write("data-2/a", b"not below it")
    found = list(list_objects(place))
    assert {item.key: item.nbytes for item in found} == {name: number for number, name in enumerate(names)}
    assert len(found) == len(names)
    for item in found:
        now = modified_at(place, item.key)
        assert item.modified is not None
        assert now is not None
        assert abs(now - item.modified) < 1
    assert {item.key for item in list_objects(place, "many")} == {f"many/{number}/0" for number in range(7)}
    assert list(list_objects(place, "nothing")) == []
    assert modified_at(place, "nothing") is None


def test_pages_are_asked_for_as_they_are_used(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_PAGE", 2)
    place, calls = servers.folder("gs"), []
    for number in range(5):
        place.write(str(number), b"")
    original = Store.call

    def counting(store: Store, *args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(store, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "call", counting)
    names = list_objects(place)
    assert [next(names).key for _ in range(2)] == ["0", "1"]
    assert len(calls) == 1
    assert [item.key for item in names] == ["2", "3", "4"]
    assert len(calls) == 3


# --- what keys mean ---


def test_every_key_of_a_dataset_has_a_meaning_and_every_row_of_the_table_a_kind(tmp_path: Path) -> None:
    made = make_whole(str(tmp_path / "demo"))
    kinds = {place.kind for item in list_objects(made.store) if (place := place_of(item.key.removeprefix("heldout/")))}
    assert kinds == {"spec", "root", "metadata", "object", "statistics", "commit", "index"}
    assert all(place_of(item.key.removeprefix("heldout/")) for item in list_objects(made.store))
    table = PAGE.split("## Objects")[1].split("\n## ")[0]
    filled = {
        "<name>": "rows/role",
        "<hook point>": "layers.3.mlp_out",
        "<column>": "role",
        "<k>": "1500",
        "<k, 10 digits>": "0000001500",
        "<k // 1024, 8 digits>": "00000001",
        "<g, 8 digits>": "00000001",
        "<i, 8 digits>": "00000000",
        "<n, 5 digits>": "01500",
    }
    keys = [
        key
        for line in table.splitlines()
        if line.startswith("| `")
        for key in re.findall("`([^`]+)`", line.split("|")[1])
    ]
    assert len(keys) > 9
    for key in keys:
        for name, value in filled.items():
            key = key.replace(name, value)
        assert place_of(key) is not None or key == "heldout/", key


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("arrays/layers.3.mlp_out/c/0/0", Place(kind="object", array="layers.3.mlp_out", number=0)),
        ("arrays/rows/role/c/12", Place(kind="object", array="rows/role", number=12)),
        ("commits/00000001/0000001024.json", Place(kind="commit", number=1024)),
        ("any/where/.actlake-12ab", Place(kind="temporary")),
        ("commits/00000000/0000001024.json", None),
        ("arrays/layers.3.mlp_out/c/0", None),
        ("arrays/layers.3.mlp_out/c/00/0", None),
        ("arrays/layers.03.mlp_out/c/0/0", None),
        ("arrays/layers.3.other/c/0/0", None),
        ("arrays/rows/other/c/0", None),
        ("arrays/rows/role/c/0/0", None),
        ("stats/1.parquet", None),
        ("spec.json/x", None),
        ("x/spec.json", None),
        ("spec.json\n", None),
        ("", None),
    ],
)
def test_a_key_means_what_its_whole_name_says(key: str, place: Place | None) -> None:
    assert place_of(key) == place


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("spec.json", "dataset"),
        ("arrays/layers.0.mlp_out/zarr.json", "dataset"),
        ("corpus.json", "corpus"),
        ("sequences/train-0000000000-0123abcd.parquet", "corpus"),
        ("building/0123456789abcdef/runs/0", "corpus"),
        ("arrays/mine.npy", None),
        ("sequences/mine.parquet", None),
        ("building/notes.txt", None),
    ],
)
def test_what_lies_there_is_known_by_its_names(key: str, kind: str | None, tmp_path: Path) -> None:
    place = Store(tmp_path / "folder")
    assert kind_of(place) is None
    place.write(key, b"")
    assert kind_of(place) == kind
