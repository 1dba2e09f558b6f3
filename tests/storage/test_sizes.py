"""Sizes in bytes as people write them."""

import pytest

from actlake.storage.errors import BadInputError
from actlake.storage.sizes import parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GiB", 16 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5kB", 1500),
        ("1.5GiB", 3 * 2**29),
        ("2P", 2 * 10**15),
        ("7B", 7),
        ("1_000", 1000),
        (12, 12),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "3 parsecs", "1 iB", "_1", 0, -5, True])
def test_no_sizes_are_refused_by_name(text: str | int) -> None:
    with pytest.raises(BadInputError, match=r"shard_memory = .* is no size in bytes; write e\.g\."):
        parse_nbytes(text, "shard_memory")
