"""Where a Ray cluster is, and whether it can be used: asked before anything is made, without Ray.

A cluster has two doors. ``actlake submit`` and its kin use the Jobs API, ``http://HEAD:8265``, and run what they are
sent on the cluster; ``actlake ingest --address`` connects a driver on this machine to ``HEAD:6379``, which wants the
same Ray and Python here and there.
"""

import os
import re
import socket
from pathlib import Path

from actlake.storage.errors import ActlakeError, BadInputError

#: Seconds that a cluster's head may take to accept a connection.
CONNECT_S = 10.0

#: Where a Ray on this machine serves its Jobs API.
LOCAL_JOBS = "http://127.0.0.1:8265"

TOKEN_REMEDY = (
    "copy the cluster's token to ~/.ray/auth_token or set RAY_AUTH_TOKEN to it, with RAY_AUTH_MODE=token "
    "('ray get-auth-token' prints it on a machine of the cluster)"
)


def jobs_url(address: str | None) -> str:
    """Return the URL of a cluster's Jobs API; None: what the environment says, else this machine's.

    Raises ``BadInputError`` for addresses of another kind.
    """
    # The order in which Ray's own commands look.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        address = address or os.environ.get(name)
    if address in (None, "auto", "local"):
        return LOCAL_JOBS
    assert address is not None
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise BadInputError(
            f"--address {address!r} is not the Jobs API of a cluster; give its URL, e.g. http://HEAD:8265"
        )
    return f"{scheme or 'http'}://{rest.rstrip('/')}"


def check_cluster(address: str) -> None:
    """Raise ``BadInputError`` where no driver of this machine can connect to ``address``; Ray itself tries for minutes.

    ``auto`` and addresses without a port are left to Ray.
    """
    if address.startswith(("http://", "https://")):
        raise BadInputError(
            f"--address {address!r} is a cluster's Jobs API: 'actlake submit job.toml --address {address}' runs the "
            "job there; for a driver on this machine give host:port of the head, e.g. HEAD:6379"
        )
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise BadInputError(
            f"no Ray cluster answers at {address} ({error}); 'ray start --head' starts one, without --address this "
            "machine's own is used"
        ) from error
    if not address.startswith("ray://"):
        _check_token(address)


def _check_token(address: str) -> None:
    """Raise ``BadInputError`` where a head does not take the token from here: Ray knocks for 20 s, and does not say."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # Certificates are Ray's to find.
    import grpc

    found = token()
    metadata = () if found is None else (("authorization", f"Bearer {found}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=CONNECT_S, metadata=metadata)
        except grpc.RpcError as error:
            # Whatever else it answers, Ray will find out.
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise BadInputError(_unauthenticated(address)) from error


def _unauthenticated(place: str) -> str:
    return f"the Ray cluster at {place} wants a token, and none or another one is here; {TOKEN_REMEDY}"


def explain(address: str | None, error: Exception) -> ActlakeError:
    """Return what is wrong, and the remedy, where Ray could not connect: one line instead of Ray's page."""
    text = str(error)
    place = address or "this machine"
    if "Version mismatch" in text:
        rays, pythons = (re.findall(rf"{name}: *([\w.+-]+)", text) for name in ("Ray", "Python"))
        if len(rays) == len(pythons) == 2:
            return BadInputError(
                f"the cluster at {place} runs Ray {rays[0]} and Python {pythons[0]}, this machine Ray {rays[1]} and "
                f"Python {pythons[1]}; install the cluster's here, or let it run the job: 'actlake submit'"
            )
    if "uthentication" in text or "InvalidAuthToken" in text or "Unauthenticated" in text:
        return BadInputError(_unauthenticated(place))
    if address == "auto" and isinstance(error, ConnectionError):
        return BadInputError(
            "--address auto: no Ray cluster runs on this machine; give host:port of its head, or run the job there"
        )
    return ActlakeError(f"no Ray cluster at {place}: {' '.join(text.split())}")


def token() -> str | None:
    """Return the cluster's token as Ray finds it; None where there is none, or RAY_AUTH_MODE says that none is used."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if named is None and isinstance(error, FileNotFoundError):
            return None
        raise BadInputError(f"cannot read the cluster's token in {path}: {error.strerror}; {TOKEN_REMEDY}") from error
