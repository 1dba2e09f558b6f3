import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import ROLE_CHOICES, KeepRule, RowSpace, block_places, content_hash, mix64

SPACES = st.builds(
    lambda n_blocks, rows_per_block, n_rows, seed: RowSpace(
        n_rows=n_rows,
        rows_per_shard=n_blocks * rows_per_block,
        rows_per_block=rows_per_block,
        seed=seed,
        order="shuffled",
    ),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(0, 2**64 - 1),
)


def test_mix64_known_answers() -> None:
    # The first two outputs of splitmix64 seeded with 0, as its authors' own program prints them.
    assert int(mix64(0)) == 0xE220A8397B1DCDAF
    assert int(mix64(0x9E3779B97F4A7C15)) == 0x6E789E6AA1B965F4
    assert mix64(np.arange(3, dtype=np.uint64)).tolist() == [
        16294208416658607535,
        10451216379200822465,
        10905525725756348110,
    ]


def test_block_places_known_answers() -> None:
    assert block_places(0, 0, 8).tolist() == [0, 1, 6, 3, 5, 4, 2, 7]
    assert block_places(7, 3, 8).tolist() == [6, 1, 0, 4, 5, 7, 3, 2]
    assert block_places(2**64 - 1, 2**40, 5).tolist() == [4, 2, 3, 0, 1]


@given(SPACES)
def test_places_permute_each_block_and_nothing_else(space: RowSpace) -> None:
    seen = 0
    for shard in range(space.n_shards):
        places = space.places(shard)
        assert len(places) == len(space.rows_of(shard))
        for start in range(0, len(places), space.rows_per_block):
            block = places[start : start + space.rows_per_block]
            assert sorted(block.tolist()) == list(range(start, start + len(block)))
        seen += len(places)
    assert seen == space.n_rows


@given(SPACES)
def test_shards_tile_the_rows_and_only_the_last_is_short(space: RowSpace) -> None:
    parts = [space.rows_of(shard) for shard in range(space.n_shards)]
    assert [row for part in parts for row in part] == list(range(space.n_rows))
    assert all(len(part) == space.rows_per_shard for part in parts[:-1])
    assert 0 < len(parts[-1]) <= space.rows_per_shard


@given(SPACES, st.integers(1, 500))
def test_growth_moves_no_row_of_a_full_block(space: RowSpace, more: int) -> None:
    grown = RowSpace(
        n_rows=space.n_rows + more,
        rows_per_shard=space.rows_per_shard,
        rows_per_block=space.rows_per_block,
        seed=space.seed,
        order="shuffled",
    )
    for shard in range(space.n_shards):
        whole = len(space.rows_of(shard)) // space.rows_per_block * space.rows_per_block
        np.testing.assert_array_equal(space.places(shard)[:whole], grown.places(shard)[:whole])


def test_blocks_and_seeds_are_permuted_differently() -> None:
    permutations = {tuple(block_places(seed, block, 64).tolist()) for seed in range(4) for block in range(4)}
    assert len(permutations) == 16
    assert tuple(range(64)) not in permutations


def test_block_numbers_run_through_the_shards() -> None:
    space = RowSpace(n_rows=128, rows_per_shard=64, rows_per_block=32, seed=5, order="shuffled")
    np.testing.assert_array_equal(space.places(1)[:32], block_places(5, 2, 32))
    np.testing.assert_array_equal(space.places(1)[32:], 32 + block_places(5, 3, 32))


def test_a_permutation_mixes() -> None:
    # Of a random permutation a neighbour stays a neighbour about twice in n; the mean way moved is n / 3.
    places = block_places(1, 1, 4096)
    assert np.count_nonzero(np.abs(np.diff(places)) == 1) < 12
    assert abs(np.abs(places - np.arange(4096)).mean() / 4096 - 1 / 3) < 0.02


def test_sequence_order_keeps_every_row_in_its_place() -> None:
    space = RowSpace(n_rows=100, rows_per_shard=64, rows_per_block=32, seed=5, order="sequence")
    np.testing.assert_array_equal(space.places(0), np.arange(64))
    np.testing.assert_array_equal(space.places(1), np.arange(36))


@pytest.mark.parametrize("shard", [-1, 2])
def test_a_shard_out_of_range_is_refused_with_the_range(shard: int) -> None:
    space = RowSpace(n_rows=100, rows_per_shard=64, rows_per_block=32, seed=5, order="shuffled")
    with pytest.raises(BadInputError, match=rf"shard {shard} is out of range; the shards are 0\.\.1"):
        space.rows_of(shard)


def test_keep_rule_masks_ids_and_first_positions() -> None:
    tokens = np.array([2, 2, 9, 0, 5, 1], dtype=np.int32)
    roles = np.array([4, 1, 1, 2, 5, 4], dtype=np.uint8)
    assert KeepRule(exclude=(2, 0)).mask(tokens, roles).tolist() == [False, False, True, False, True, True]
    assert KeepRule(skip_first=3).mask(tokens, roles).tolist() == [False, False, False, True, True, True]
    assert KeepRule(skip_first=9).mask(tokens, roles).tolist() == [False] * 6
    assert KeepRule().mask(tokens, roles).all()
    positions = np.array([0, 1, 2, 0, 1, 2])
    assert KeepRule(skip_first=2).mask(tokens, roles, positions).tolist() == [False, False, True, False, False, True]


def test_keep_rule_masks_roles() -> None:
    tokens, roles = np.arange(6, dtype=np.int32), np.array([4, 1, 1, 2, 5, 4], dtype=np.uint8)
    assert KeepRule(roles=("user",)).mask(tokens, roles).tolist() == [False, True, True, False, False, False]
    rule = KeepRule(roles=("model", "reasoning", "user"), exclude=(4,), skip_first=2)
    assert rule.mask(tokens, roles).tolist() == [False, False, True, True, False, False]


def test_keep_rule_has_no_roles_in_its_json_where_it_takes_all() -> None:
    plain, chosen = KeepRule(exclude=(2,)), KeepRule(exclude=(2,), roles=("reasoning", "model", "model"))
    assert plain.to_json() == {"exclude": [2], "skip_first": 0}
    assert chosen.to_json() == {"exclude": [2], "skip_first": 0, "roles": ["model", "reasoning"]}
    assert chosen.keep_id == KeepRule(exclude=(2,), roles=("model", "reasoning")).keep_id != plain.keep_id
    for rule in (plain, chosen):
        assert KeepRule.from_json(rule.to_json()) == rule


def test_keep_rule_refuses_roles_that_no_row_can_have() -> None:
    with pytest.raises(BadInputError, match=r"no role 'modle'; did you mean 'model'\?"):
        KeepRule(roles=("modle",))
    with pytest.raises(BadInputError, match=r"no role 'void'; valid names: model, reasoning, system, template, text"):
        KeepRule(roles=("void",))


def test_the_names_of_role_choices_are_rules() -> None:
    assert KeepRule(roles=ROLE_CHOICES["all"]) == KeepRule()
    assert {role for roles in ROLE_CHOICES.values() for role in KeepRule(roles=roles).roles} == {
        "text", "user", "model", "system", "reasoning",
    }  # fmt: skip


def test_keep_rule_is_the_set_of_its_ids() -> None:
    rule = KeepRule(exclude=(5, 2, 5))
    assert rule == KeepRule(exclude=(2, 5))
    assert rule.keep_id == KeepRule(exclude=(2, 5)).keep_id
    assert len({rule.keep_id, KeepRule(exclude=(2,)).keep_id, KeepRule(exclude=(2, 5), skip_first=1).keep_id}) == 3


def test_keep_rule_refuses_a_negative_skip() -> None:
    with pytest.raises(BadInputError, match="skip_first = -2 is negative; use 0"):
        KeepRule(skip_first=-2)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_content_hash_does_not_see_the_order_of_keys(value: dict[str, object]) -> None:
    assert content_hash(value) == content_hash(dict(reversed(value.items())))


def test_content_hash_known_answer_and_not_a_number() -> None:
    # sha256 of {"a":null,"b":[1,"ü"]} in UTF-8.
    assert (
        content_hash({"b": [1, "ü"], "a": None}) == "6bafd57c7869b3aca54e576a5157b40cc195c8486124cab93d52f1b59556838e"
    )
    with pytest.raises(ValueError, match="JSON"):
        content_hash({"a": float("nan")})
