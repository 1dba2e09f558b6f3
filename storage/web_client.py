"""The client of web servers: they are read, with pages of links for lists, and know ranges or not."""

from typing import Any

from fsspec.asyn import sync

from actlake.storage.clients import FsspecClient
from actlake.storage.errors import StoreError

HTTP = ("http", "https")


class WebClient(FsspecClient):
    """Objects by whole URLs; as ``FsspecClient``."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if start < 0:
            nbytes = self.nbytes(path)
            start, stop = max(0, nbytes + start), nbytes
        if start >= stop:
            self.nbytes(path)
            return b""
        with self.slots:
            seconds = self._limits.deadline(stop - start)
            return bytes(sync(self.fs.loop, _read_range, self.fs, path, start, stop, timeout=seconds))

    def nbytes(self, path: str) -> int:
        size = self.call("info", path)["size"]
        if size is None:
            raise StoreError(f"the server does not tell how large {path} is (no Content-Length); use another one")
        return int(size)

    def list(self, path: str) -> dict[str, bool]:
        # Pages of links offer themselves in other orders: ?C=M;O=A.
        return {name: is_folder for name, is_folder in super().list(path).items() if not name.startswith("?")}


async def _read_range(fs: Any, url: str, start: int, stop: int) -> bytes:
    """Read a range; fsspec's own does not tell one from the whole object, which a server may answer with."""
    session, kwargs = await fs.set_session(), dict(fs.kwargs)
    headers = kwargs.pop("headers", {}) | {"Range": f"bytes={start}-{stop - 1}"}
    async with session.get(fs.encode_url(url), headers=headers, **kwargs) as answer:
        if answer.status == 416:
            return b""
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        data: bytes = await answer.read()
        return data if answer.status == 206 else data[start:stop]
