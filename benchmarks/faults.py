"""A loopback HTTP proxy that spoils what passes: ``python faults.py PORT '{"rates": {"503": 0.05}}'`` prints its port.

Each request is drawn one fault, or none, by a seeded generator; what was done is counted. It understands as much of
HTTP/1.1 as the clients of object stores speak: lengths, chunked bodies, ``Expect: 100-continue``, kept connections.
"""

import asyncio
import json
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

#: What may happen to a request. ``429`` to ``504``: refused, not forwarded. ``late``: held ``latency_s``. ``reset``:
#: the connection is reset in the middle of the answer; ``lost``: after the work is done, before the answer.
#: ``truncate``: it ends in the middle. ``flip``: one bit of the answer's body is another; ``flip_upload``: of the
#: request's. ``stall``: nothing more comes for ``stall_s``; ``trickle``: a byte every 50 ms. ``twice``: the request
#: is carried out twice. ``stale``: a listing is answered as the last time.
KINDS = [
    "429",
    "500",
    "503",
    "504",
    "late",
    "reset",
    "lost",
    "truncate",
    "flip",
    "flip_upload",
    "stall",
    "trickle",
    "twice",
    "stale",
]

_LISTING = re.compile(rb"[?&](prefix|list-type|delimiter|comp=list)=?")
_CHUNK = 1 << 18


@dataclass(kw_only=True)
class Faults:
    """What the proxy does: ``rates`` gives the share of the requests that suffer a kind.

    ``only`` is a regular expression that a request's line has to match; at most ``at_most`` faults happen. Requests are
    counted, and the bytes of the answers' bodies.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    only: str = ""
    latency_s: float = 0.0
    stall_s: float = 3600.0
    at_most: int | None = None
    done: Counter[str] = field(default_factory=Counter)
    n_requests: int = 0
    nbytes: int = 0
    n_now: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.rates).difference(KINDS):
            raise ValueError(f"no such faults: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
        self.random = random.Random(self.seed)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request for as long as it takes."""
        self.n_now += 1
        self.most_at_once = max(self.most_at_once, self.n_now)
        try:
            yield
        finally:
            self.n_now -= 1

    def draw(self, line: bytes) -> str:
        """Return what happens to the request of this line; "" for nothing."""
        self.n_requests += 1
        if not re.search(self.only.encode(), line) or (self.at_most is not None and self.done.total() >= self.at_most):
            return ""
        chance = self.random.random()
        for kind, rate in self.rates.items():
            if chance < rate:
                self.done[kind] += 1
                return kind
            chance -= rate
        return ""


@dataclass
class _Message:
    """A request or an answer; ``n_left`` bytes of its body have not been read, None: until the connection ends."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    n_left: int | None = 0

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")

    def head(self, length: int | None = None) -> bytes:
        """Return line and headers, for a body of ``length`` bytes."""
        dropped = (b"transfer-encoding", b"content-length", b"connection", b"expect")
        kept = [(k, v) for k, v in self.headers if k.lower() not in dropped]
        if length is not None:
            kept.append((b"Content-Length", str(length).encode()))
        return b"\r\n".join([self.line, *(k + b": " + v for k, v in kept)]) + b"\r\n\r\n"


class _Proxy:
    def __init__(self, target: int, faults: Faults) -> None:
        self._target, self._faults = target, faults
        self._listings: dict[bytes, tuple[bytes, bytes]] = {}
        # The loop has weak references alone: of a client that hung up the task could be collected as it waits.
        self._serving: set[asyncio.Task[None] | None] = set()
        self.port = 0

    async def serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self._serving.add(task := asyncio.current_task())
        try:
            while (request := await _read_head(client)) is not None:
                if request.header(b"expect").lower() == b"100-continue":
                    back.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await _read_body(client, request)
                with self._faults.counting():
                    goes_on = await self._answer(request, back)
                if not goes_on:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # Clients hang up when they are done, or have waited long enough; the proxy's end cancels the rest.
        finally:
            back.close()
            self._serving.discard(task)

    async def _answer(self, request: _Message, back: asyncio.StreamWriter) -> bool:
        """Answer one request; say whether the connection goes on."""
        fault = self._faults.draw(request.line)
        if fault.isdigit():
            back.write(f"HTTP/1.1 {fault} Injected\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            await back.drain()
            return True
        if fault == "late":
            await asyncio.sleep(self._faults.latency_s)
        if fault == "flip_upload" and request.body:
            request.body = self._flipped(request.body)
        if fault == "twice":
            await self._forward(request)
        if fault == "stale" and request.line in self._listings:
            head, body = self._listings[request.line]
            back.write(head + body)
            await back.drain()
            return True
        answer = await self._forward(request)
        self._faults.nbytes += len(answer.body)
        if _LISTING.search(request.line):
            self._listings[request.line] = answer.head(len(answer.body)), answer.body
        return await self._pass(answer, fault, request.line.startswith(b"HEAD"), back)

    async def _pass(self, answer: _Message, fault: str, bodiless: bool, back: asyncio.StreamWriter) -> bool:
        body = self._flipped(answer.body) if fault == "flip" and answer.body else answer.body
        head = answer.head(None if bodiless else len(body))
        if bodiless:
            head = head[:-2] + b"Content-Length: " + (answer.header(b"content-length") or b"0") + b"\r\n\r\n"
        if fault in ("reset", "truncate", "stall", "lost"):
            # An answer without a body has nothing else that could be late than its head.
            if fault != "lost" and (body or fault != "stall"):
                back.write(head + body[: len(body) // 2])
                await back.drain()
            if fault == "stall":
                await asyncio.sleep(self._faults.stall_s)
            if fault in ("reset", "lost"):
                back.transport.abort()
            return False
        back.write(head)
        if fault == "trickle":
            for start in range(len(body)):
                back.write(body[start : start + 1])
                await back.drain()
                await asyncio.sleep(0.05)
            return False
        for start in range(0, len(body), _CHUNK):
            back.write(body[start : start + _CHUNK])
            await back.drain()
        await back.drain()
        return True

    async def _forward(self, request: _Message) -> _Message:
        server, out = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
        try:
            # Servers that know objects by their host's name have to see their own.
            request.headers = [(k, v) for k, v in request.headers if k.lower() != b"host"]
            request.headers.append((b"Host", f"127.0.0.1:{self._target}".encode()))
            length = len(request.body) if request.body or request.header(b"content-length") else None
            out.write(request.head(length)[:-2] + b"Connection: close\r\n\r\n" + request.body)
            await out.drain()
            answer = await _read_head(server)
            while answer is not None and answer.line.split(b" ")[1] == b"100":
                answer = await _read_head(server)
            if answer is None:
                raise ConnectionResetError("the server has hung up")
            if not request.line.startswith(b"HEAD") and answer.line.split(b" ")[1] not in (b"204", b"304"):
                await _read_body(server, answer, until_end=True)
        finally:
            out.close()
        # Where the server says to go on, it means us.
        here, there = (f"127.0.0.1:{port}".encode() for port in (self.port, self._target))
        answer.headers = [(key, value.replace(there, here)) for key, value in answer.headers]
        return answer

    def _flipped(self, body: bytes) -> bytes:
        found = bytearray(body)
        bit = self._faults.random.randrange(8 * len(found))
        found[bit // 8] ^= 1 << bit % 8
        return bytes(found)


async def _read_head(stream: asyncio.StreamReader) -> _Message | None:
    try:
        head = await stream.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    line, *rest = head[:-4].split(b"\r\n")
    headers = [(key, value.strip()) for key, _, value in (one.partition(b":") for one in rest)]
    return _Message(line=line, headers=headers)


async def _read_body(stream: asyncio.StreamReader, message: _Message, *, until_end: bool = False) -> None:
    if message.header(b"transfer-encoding").lower() == b"chunked":
        parts = []
        while length := int((await stream.readline()).split(b";")[0], 16):
            parts.append((await stream.readexactly(length + 2))[:-2])
        while (await stream.readline()).strip():
            pass
        message.body = b"".join(parts)
    elif length_text := message.header(b"content-length"):
        message.body = await stream.readexactly(int(length_text))
    elif until_end:
        message.body = await stream.read(-1)


async def _start(target: int, faults: Faults, port: int = 0) -> tuple[asyncio.Server, int]:
    spoiler = _Proxy(target, faults)
    server = await asyncio.start_server(spoiler.serve, "127.0.0.1", port, limit=1 << 20, backlog=256)
    spoiler.port = server.sockets[0].getsockname()[1]
    return server, spoiler.port


@contextmanager
def proxy(target: int, faults: Faults, port: int = 0) -> Iterator[int]:
    """Run a proxy to a port in a thread of this process; give its own port, by default a free one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faults", daemon=True)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(_start(target, faults, port), loop).result(30)

    async def stop() -> None:
        server.close()
        # Connections that were just accepted have no task yet: some rounds without any say that none will come.
        n_quiet = 0
        while n_quiet < 5:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            n_quiet = 0 if others else n_quiet + 1
            await asyncio.sleep(0.01)

    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


async def _run(target: int, faults: Faults) -> None:
    server, port = await _start(target, faults)
    print(port, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), Faults(**json.loads(sys.argv[2]))))
