"""Numbers as people read them."""


def format_nbytes(nbytes: float) -> str:
    """Return e.g. ``1.4 GB`` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if nbytes < 1000 or unit == "PB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError(nbytes)


def duration(seconds: float) -> str:
    """Return e.g. ``40 s``, ``1.5 min`` or ``3.0 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds / 60:,.1f} min"


def count_of(n: int, what: str) -> str:
    """Return e.g. ``1 shard`` or ``1,024 shards``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
