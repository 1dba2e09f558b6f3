"""Which byte ranges of an object are asked for together."""

from collections.abc import Iterable

Span = tuple[int, int]


def merge(spans: Iterable[Span], gap: int, limit: int) -> list[tuple[int, int, list[Span]]]:
    """Return the requests for ascending, disjoint spans ``(start, stop)``: start, stop and the spans of each.

    A span joins the request before it where at most ``gap`` bytes lie between, and the whole stays within ``limit``.
    """
    requests: list[tuple[int, int, list[Span]]] = []
    for start, stop in spans:
        if requests:
            first, last, members = requests[-1]
            if last <= start <= last + gap and stop - first <= limit:
                requests[-1] = first, stop, [*members, (start, stop)]
                continue
        requests.append((start, stop, [(start, stop)]))
    return requests
