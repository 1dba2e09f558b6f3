import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from actlake.storage.codecs import Codec
from actlake.storage.errors import BadInputError, FormatVersionError, SpecMismatchError, UnknownNameError
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec, PointSpec

MakeSpec = Callable[..., DatasetSpec]

# One other valid value for every field.
CHANGES: dict[str, Any] = {
    "model": "another",
    "model_revision": "abc",
    "model_fingerprint": "2" * 64,
    "architecture": "Other",
    "corpus_id": "3" * 64,
    "split": "heldout",
    "keep": KeepRule(exclude=(2,)),
    "hook_points": (PointSpec(name="layers.0.resid_post", width=8, rows_per_chunk=16),),
    "dtype": "float32",
    "seed": 8,
    "order": "sequence",
    "rows_per_shard": 128,
    "rows_per_block": 64,
    "batch_tokens": 512,
    "codec": Codec(name="none"),
    "batching": "packed",
}
ROW_SPACE = {"corpus_id", "split", "keep", "seed", "order", "rows_per_shard", "rows_per_block"}


def test_every_field_has_a_change() -> None:
    assert set(CHANGES) == {field.name for field in fields(DatasetSpec)}


def test_a_spec_reads_its_own_json(make_spec: MakeSpec) -> None:
    for spec in (make_spec(), *(make_spec(**{name: value}) for name, value in CHANGES.items())):
        found = DatasetSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert found.dataset_id == spec.dataset_id
        assert found.difference(spec) == []


def test_padded_batches_are_not_written_down(make_spec: MakeSpec) -> None:
    padded, packed = make_spec(), make_spec(batching="packed")
    assert "batching" not in padded.to_json()
    assert packed.to_json()["batching"] == "packed"
    assert (padded.format_version, packed.format_version) == (1, 2)
    assert padded.difference(packed) == ["batching: here 'padded', there 'packed'"]


@pytest.mark.parametrize("name", CHANGES)
def test_each_field_is_part_of_the_identity(name: str, make_spec: MakeSpec) -> None:
    spec, other = make_spec(), make_spec(**{name: CHANGES[name]})
    assert other.dataset_id != spec.dataset_id
    assert (other.row_space_id != spec.row_space_id) == (name in ROW_SPACE)


@pytest.mark.parametrize("name", CHANGES)
def test_a_mismatch_names_the_field_and_both_values(name: str, make_spec: MakeSpec) -> None:
    spec, other = make_spec(), make_spec(**{name: CHANGES[name]})
    with pytest.raises(SpecMismatchError) as caught:
        spec.require_equal(other, "gs://bucket/demo")
    message = str(caught.value)
    assert message.startswith("gs://bucket/demo holds a dataset with another spec")
    assert name in message
    assert "'dataset' URL" in message
    if name == "seed":
        assert "  seed: here 7, there 8\n" in message


def test_equal_specs_pass(make_spec: MakeSpec) -> None:
    make_spec().require_equal(make_spec(), "u")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "split = 'test' is not one of train, heldout"),
        ({"dtype": "float16"}, "dtype = 'float16' is not one of bfloat16, float32"),
        ({"order": "shufled"}, "did you mean 'shuffled'"),
        ({"batching": "auto"}, "batching = 'auto' is not one of padded, packed"),
        ({"hook_points": ()}, "at least one hook point"),
        (
            {"hook_points": 2 * (PointSpec(name="layers.0.mlp_in", width=8, rows_per_chunk=8),)},
            "more than once: layers.0.mlp_in",
        ),
        ({"seed": -1}, "seed = -1 does not fit"),
        ({"seed": 2**64}, "does not fit 64 bits"),
        ({"batch_tokens": 0}, "batch_tokens = 0 must be > 0"),
        ({"rows_per_block": 48}, "block of 48 rows does not divide rows_per_shard = 64; use e.g. 64 or 32"),
        ({"rows_per_block": 0}, "block of 0 rows"),
        (
            {"rows_per_shard": 80, "rows_per_block": 80},
            r"rows_per_chunk = 32 \(layers.3.mlp_out\) does not divide rows_per_shard = 80",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str, make_spec: MakeSpec) -> None:
    with pytest.raises(BadInputError, match=message):
        make_spec(**changes)


@pytest.mark.parametrize(("width", "rows_per_chunk"), [(0, 8), (8, 0)])
def test_a_point_has_a_width_and_chunks(width: int, rows_per_chunk: int) -> None:
    with pytest.raises(BadInputError, match="must be > 0"):
        PointSpec(name="layers.0.mlp_in", width=width, rows_per_chunk=rows_per_chunk)


def test_fields_of_another_format_are_named(make_spec: MakeSpec) -> None:
    value = make_spec().to_json()
    with pytest.raises(FormatVersionError, match="gains"):
        DatasetSpec.from_json(value | {"gains": 1})
    del value["seed"]
    with pytest.raises(FormatVersionError, match="seed"):
        DatasetSpec.from_json(value)


def test_arrays_are_the_hook_points_then_the_row_columns(make_spec: MakeSpec) -> None:
    spec = make_spec()
    arrays = spec.arrays()
    assert {name: (array.dtype, array.width, array.rows_per_chunk) for name, array in arrays.items()} == {
        "layers.0.resid_post": ("bfloat16", 8, 16),
        "layers.3.mlp_out": ("bfloat16", 4, 32),
        "rows/token_id": ("int32", None, 32),
        "rows/position": ("int32", None, 32),
        "rows/sequence": ("int64", None, 32),
        "rows/role": ("uint8", None, 32),
    }
    assert all(array.rows_per_shard == 64 and array.codec == spec.codec for array in arrays.values())
    assert spec.nbytes_per_row == 2 * 8 + 2 * 4 + 4 + 4 + 8 + 1


def test_select_and_row_space(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert spec.select("layers.*.mlp_out") == ("layers.3.mlp_out",)
    with pytest.raises(UnknownNameError, match="layers are 0, 3"):
        spec.select("layers.1.mlp_out")
    space = spec.row_space(150)
    assert (space.n_shards, space.rows_per_block, space.seed, space.order) == (3, 32, 7, "shuffled")
    assert replace(spec, order="sequence").row_space(150).order == "sequence"
