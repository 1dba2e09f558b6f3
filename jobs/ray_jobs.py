"""A client of Ray's Jobs API: plain HTTP, so that a machine without Ray can submit and look.

Ray's own client is not used: it lets the environment override an address that was given, and takes seconds to import.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from actlake.jobs.engines.ray_address import CONNECT_S, TOKEN_REMEDY, token
from actlake.storage.errors import ActlakeError, BadInputError, MissingExtraError, NotFoundError

#: The oldest Ray that runs a job of ours: that of the extra "ray".
OLDEST_RAY = (2, 40)

#: Seconds that an answer may take.
_ANSWER_S = 60.0

#: Seconds that a head which has just started may take until it can start a job.
_AGENT_S = 60.0

#: Seconds that a head may be away while a job is waited for: a restart, a proxy that is rolled out.
_AWAY_S = 60.0

#: Seconds between two looks at a job that is waited for.
_POLL_S = 1.0


_Answer = TypeVar("_Answer")


class ServerError(ActlakeError):
    """The cluster answers with an error of its own."""


class NoAnswerError(BadInputError):
    """Nobody answers at the cluster's URL."""


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """A job as the cluster knows it; times in seconds since 1970."""

    id: str
    state: str
    entrypoint: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None
    node: str | None

    @property
    def over(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def ours(self) -> bool:
        return "actlake" in self.metadata or "actlake" in self.entrypoint


class JobsApi:
    """The Jobs API at a URL; raises ``BadInputError`` where no such cluster answers, or it wants another token."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._headers = {} if (found := token()) is None else {"Authorization": f"Bearer {found}"}

    def check(self) -> str:
        """Return the cluster's version of Ray; raise ``BadInputError`` where it cannot run our jobs."""
        answer = self._json("GET", "/api/version")
        version = str(answer.get("ray_version", "unknown")) if isinstance(answer, dict) else "unknown"
        parts = version.split(".")
        if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
            raise BadInputError(f"{self.url} is no Jobs API of Ray; the dashboard of a head serves it, on port 8265")
        if (int(parts[0]), int(parts[1])) < OLDEST_RAY:
            oldest = ".".join(map(str, OLDEST_RAY))
            raise BadInputError(f"the cluster at {self.url} runs Ray {version}; actlake wants Ray {oldest} or newer")
        return version

    def upload(self, name: str, data: bytes) -> str:
        """Store a package unless the cluster has it; return the URI that a runtime environment names it by."""
        path = f"/api/packages/gcs/{quote(name)}"
        try:
            # The question keeps a package from being dropped until the job is there.
            self._request("GET", path)
        except NotFoundError:
            self._request("PUT", path, data)
        return f"gcs://{name}"

    def submit(self, job: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Start an entrypoint on the cluster under this id."""
        body = {
            "entrypoint": entrypoint,
            "submission_id": job,
            "runtime_env": dict(runtime_env),
            "metadata": dict(metadata),
        }
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                self._json("POST", "/api/jobs/", json.dumps(body).encode())
            except ServerError as error:
                # What a head says that has just started.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
            else:
                return

    def jobs(self) -> list[RayJob]:
        """Return the jobs of ours that the cluster knows, the latest first."""
        found = [_job(item) for item in self._json("GET", "/api/jobs/") if item.get("submission_id")]
        return sorted((job for job in found if job.ours), key=lambda job: -(job.started or 0))

    def job(self, job: str) -> RayJob:
        """Return one job; raise ``NotFoundError`` where the cluster has none of that id."""
        try:
            return _job(self._json("GET", f"/api/jobs/{quote(job)}"))
        except NotFoundError as error:
            known = ", ".join(found.id for found in self.jobs()[:5])
            raise NotFoundError(
                f"no job {job!r} at {self.url}; "
                + (f"the latest are {known}" if known else "no job was submitted there")
            ) from error

    def logs(self, job: str) -> str:
        """Return what a job has printed."""
        return str(self._json("GET", f"/api/jobs/{quote(job)}/logs")["logs"])

    def last_lines(self, job: RayJob, n_lines: int) -> str:
        """Return the last lines that a job has printed; none where it has not begun, or its driver's node is gone."""
        if job.node is None:
            return ""
        query = urlencode({"node_id": job.node, "submission_id": job.id, "lines": n_lines})
        try:
            return self._request("GET", f"/api/v0/logs/file?{query}").decode(errors="replace")
        except ServerError:
            return ""

    def stop(self, job: str) -> None:
        """Ask a job to end: SIGTERM first."""
        self._json("POST", f"/api/jobs/{quote(job)}/stop")

    def wait(self, job: str, timeout_s: float | None = None) -> RayJob:
        """Return a job once it is over, or as it is after ``timeout_s``; goes on when the head was away."""
        started = time.monotonic()
        while True:
            found = _patient(lambda: self.job(job))
            if found.over or (timeout_s is not None and time.monotonic() - started >= timeout_s):
                return found
            time.sleep(_POLL_S)

    def follow(self, job: str) -> Iterator[str]:
        """Yield what a job prints, from its beginning until it is over; goes on after a lost connection."""
        n_seen = 0
        while True:
            n_received = 0
            for text in _tail(f"{self.url}/api/jobs/{quote(job)}/logs/tail", self._headers):
                # A new connection begins at the beginning.
                n_received += len(text)
                if n_received > n_seen:
                    yield text[max(0, len(text) - (n_received - n_seen)) :]
                    n_seen = n_received
            if _patient(lambda: self.job(job)).over:
                if rest := _patient(lambda: self.logs(job))[n_seen:]:
                    yield rest
                return
            time.sleep(_POLL_S)

    def _json(self, method: str, path: str, data: bytes | None = None) -> Any:
        answer = self._request(method, path, data, {"Content-Type": "application/json"})
        try:
            return json.loads(answer)
        except ValueError as error:
            raise BadInputError(
                f"{self.url} is no Jobs API of Ray; the dashboard of a head serves it, on port 8265"
            ) from error

    def _request(
        self, method: str, path: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={**self._headers, **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_S if path == "/api/version" else _ANSWER_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace").strip()
            raise self._refused(path, error.code, text) from error
        except (OSError, HTTPException, ValueError) as error:
            # Whoever answers in another protocol, such as the port of Ray's GCS, does so in bytes for no one's eyes.
            why = "no web server" if isinstance(error, HTTPException) else getattr(error, "reason", None) or error
            raise NoAnswerError(
                f"no Jobs API answers at {self.url} ({why}); --address is the URL of a head's dashboard, e.g. "
                "http://HEAD:8265"
            ) from error

    def _refused(self, path: str, code: int, text: str) -> ActlakeError:
        if code in (401, 403):
            why = "wants a token, and none is here" if code == 401 else "wants another token than the one that is here"
            return BadInputError(f"the cluster at {self.url} {why}; {TOKEN_REMEDY}")
        if code == 404:
            return NotFoundError(f"{self.url}{path} is not there: {text}")
        # The last line of a traceback says what went wrong.
        return ServerError(f"{self.url}{path} answers {code}: {text.splitlines()[-1] if text else 'nothing'}")


def _patient(ask: Callable[[], _Answer]) -> _Answer:
    """Return an answer; a head that does not answer, or with an error of its own, is asked again for a while."""
    deadline = time.monotonic() + _AWAY_S
    while True:
        try:
            return ask()
        except (NoAnswerError, ServerError):
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _job(item: Mapping[str, Any]) -> RayJob:
    return RayJob(
        id=str(item.get("submission_id") or item.get("job_id")),
        state=str(item["status"]),
        entrypoint=str(item.get("entrypoint") or ""),
        message=str(item.get("message") or ""),
        metadata=item.get("metadata") or {},
        started=None if item.get("start_time") is None else item["start_time"] / 1000,
        ended=None if not item.get("end_time") else item["end_time"] / 1000,
        exit_code=item.get("driver_exit_code"),
        node=item.get("driver_node_id"),
    )


def _tail(url: str, headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the messages of a web socket until it closes."""
    import asyncio

    try:
        import aiohttp
    except ImportError as error:
        raise MissingExtraError("following a job wants aiohttp; pip install 'actlake[ray]'") from error

    async def messages() -> Any:
        async with (
            aiohttp.ClientSession(headers=dict(headers)) as session,
            # Without a heartbeat a connection that a proxy dropped would be waited for without end.
            session.ws_connect(url, heartbeat=30, max_msg_size=0) as socket,
        ):
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return  # A connection that broke is a message, too.
                yield str(message.data)

    with asyncio.Runner() as runner:
        found = messages()
        while True:
            try:
                text = runner.run(anext(found))
            except (StopAsyncIteration, aiohttp.ClientError, OSError):
                return
            yield text
