"""Sizes in bytes as people write them."""

import re

from actlake.storage.errors import BadInputError

_SIZE = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(?:([KMGTP])(i?))?B?\s*", re.IGNORECASE)
_PREFIXES = ("", "K", "M", "G", "T", "P")


def parse_nbytes(value: int | str, what: str = "size") -> int:
    """Return a size in bytes > 0: a number, or text such as ``"512MiB"`` (powers of 1,024) or ``"1.5GB"`` (of 1,000).

    Raises ``BadInputError`` that names ``what`` for anything else.
    """
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value))
    nbytes = 0
    if match is not None:
        nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES.index((match[2] or "").upper()))
    if nbytes < 1:
        raise BadInputError(f"{what} = {value!r} is no size in bytes; write e.g. '16GiB' or 1_073_741_824")
    return nbytes
