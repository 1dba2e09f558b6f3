"""Object stores for tests: servers on the loopback, each started when it is first asked for."""

from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
from emulators import Server, azurite, emulator

from actlake.storage.stores import Store

#: What a store of the contract is: a protocol, and the client that reads where it is not fsspec's.
REMOTE = ("gs", "s3", "az", "gs+obstore", "s3+obstore")
_BUCKET = "actlake-tests"


class Servers:
    """The servers of a test session; ``folder`` is a place in a bucket of one that no other test uses."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[str, Server] = {}

    def __getitem__(self, protocol: str) -> Server:
        """Return a running server; skip the test where it cannot run here."""
        if protocol not in self._running:
            if protocol == "az" and azurite() is None:
                pytest.skip("no azurite here: 'make test' installs it where npm works")
            server = self._stack.enter_context(emulator(protocol))
            server.make_bucket(_BUCKET)
            self._running[protocol] = server
        return self._running[protocol]

    def folder(self, kind: str, port: int | None = None, **options: Any) -> Store:
        """Return a new, empty folder on the server of ``kind``, or through a proxy's port."""
        protocol, _, client = kind.partition("+")
        chosen = ({"client": client} if client else {}) | options
        return self[protocol].store(f"{protocol}://{_BUCKET}/{uuid4().hex}", port, **chosen)

    def close(self) -> None:
        """Stop every server."""
        self._stack.close()
