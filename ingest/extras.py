"""Optional packages: a missing one is answered with the ``pip install`` that brings it."""

from collections.abc import Iterator
from contextlib import contextmanager

from actlake.storage.errors import MissingExtraError


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Import optional packages inside this block.

    Raises ``MissingExtraError`` that names the package, what it is for and the extra that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        remedy = f"pip install 'actlake[{extra}]'"
        raise MissingExtraError(f"{purpose} needs {package}, which is absent; {remedy}") from error
