"""What goes to a cluster and what is refused before: job files, wheels, addresses, and a Jobs API that is made up.

The fake one answers what a real head cannot be made to answer here: another Ray, an error, a broken connection.
``test_cluster.py`` has the real one.
"""

import base64
import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs import ray_jobs
from actlake.jobs.cli import app as entry
from actlake.jobs.cli import cluster  # noqa: F401 - registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.engines.ray_address import check_cluster, explain, jobs_url, token
from actlake.jobs.ray_jobs import JobsApi
from actlake.jobs.submit import ENTRYPOINT, STOP_S, prepare_submission
from actlake.jobs.wheel import own_wheel, packed, read_wheel
from actlake.storage.errors import ActlakeError, BadInputError, JobFileError
from actlake.storage.secrets import secret_names

Write = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def upgraded(key: str, texts: list[str]) -> bytes:
    """Return what a web socket sends: the handshake of RFC 6455, a frame for each text, and one that is none."""
    accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
    lines = ("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")
    frames = b"".join(bytes([0x81, len(text)]) + text.encode() for text in texts)
    return "\r\n".join((*lines, f"Sec-WebSocket-Accept: {accept}", "", "")).encode() + frames + b"\xff\xff"


class FakeHead:
    """A Jobs API: answers what it is told to, and keeps what it is asked."""

    def __init__(self) -> None:
        self.ray, self.status = "2.60.0", 200
        self.jobs: list[dict[str, Any]] = []
        self.log = ""
        #: What each connection to a log sends before it breaks.
        self.tails: Iterator[list[str]] = iter(())
        self.packages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        head = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                head.tokens.add(self.headers.get("Authorization"))
                head.asked.append(f"{self.command} {self.path}")
                if self.path.endswith("/logs/tail"):
                    self.wfile.write(upgraded(self.headers["Sec-WebSocket-Key"], next(head.tails)))
                    return
                status, body = head.answer(self.command, self.path, self.rfile.read(size))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if self.status != 200:
            return self.status, b"Traceback\n  planted"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.ray}).encode()
        if path.startswith("/api/packages/"):
            name = path.rpartition("/")[2]
            if method == "PUT":
                self.packages[name] = body
            return (200 if name in self.packages else 404), b""
        if path.startswith("/api/v0/logs/"):
            return 200, self.log.encode()
        if method == "POST":
            job = json.loads(body)
            self.jobs.append({"status": "RUNNING", "start_time": 1000, "driver_node_id": "n", **job})
            return 200, json.dumps({"submission_id": job["submission_id"]}).encode()
        if path == "/api/jobs/":
            return 200, json.dumps(self.jobs).encode()
        found = [job for job in self.jobs if path == f"/api/jobs/{job['submission_id']}"]
        return (200, json.dumps(found[0]).encode()) if found else (404, b"no such job")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    found = FakeHead()
    yield found
    found.close()


# --- The wheel ----------------------------------------------------------------------------------------------------


def test_the_wheel_is_the_same_each_time_and_named_by_its_content() -> None:
    first, again = own_wheel(), own_wheel()
    assert first == again
    assert first.name == f"actlake-{actlake.__version__}-py3-none-any.whl"
    assert first.package == f"actlake-{actlake.__version__}-{first.digest[:16]}.zip"


def test_the_wheel_has_the_package_and_nothing_else() -> None:
    names = zipfile.ZipFile(io.BytesIO(own_wheel().data)).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"actlake", f"actlake-{actlake.__version__}.dist-info"}
    root = Path(actlake.__file__).parent
    sources = {f"actlake/{path.relative_to(root)}" for path in root.glob("*/**/*.py")}
    assert sources <= set(names)
    assert {"actlake/py.typed", "actlake/jobs/plan/rates.toml", "actlake/jobs/report/assets/report.html"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".ipynb"))]


def test_what_is_unpacked_is_what_runs(tmp_path: Path) -> None:
    """On the path as Ray puts it there, before what is installed: it is imported, and zarr finds its data type."""
    zipfile.ZipFile(io.BytesIO(own_wheel().data)).extractall(tmp_path)
    code = (
        "import actlake, importlib.metadata as m; print(actlake.__file__); d = m.distribution('actlake');"
        "print(d.version, [p.value for p in d.entry_points if p.group == 'zarr.data_type'], d.locate_file(''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path.parent,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.splitlines() == [
        f"{tmp_path}/actlake/__init__.py",
        f"{actlake.__version__} ['actlake.storage.zarr_dtype:BFloat16'] {tmp_path}",
    ]


def test_the_wheels_record_lists_its_files() -> None:
    with zipfile.ZipFile(io.BytesIO(own_wheel().data)) as archive:
        record = f"actlake-{actlake.__version__}.dist-info/RECORD"
        listed = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
        assert listed == archive.namelist()


def test_another_wheel_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / own_wheel().name
    path.write_bytes(own_wheel().data)
    assert read_wheel(path) == own_wheel()
    path.write_bytes(b"no zip")
    with pytest.raises(BadInputError, match=r"is no wheel \(File is not a zip file\)"):
        read_wheel(path)
    path.write_bytes(packed({"other/__init__.py": b""}))
    with pytest.raises(BadInputError, match="is no pure Python wheel of actlake"):
        read_wheel(path)
    path.write_bytes(packed({"actlake/__init__.py": b"", "actlake-1.data/scripts/x": b""}))
    with pytest.raises(BadInputError, match="is no pure Python wheel of actlake"):
        read_wheel(path)
    with pytest.raises(BadInputError, match="No such file"):
        read_wheel(tmp_path / "absent.whl")


def test_the_extra_ray_is_enough_for_the_jobs_api() -> None:
    """``ray[default]`` brings what the head's dashboard and its agents, and following a log, want."""
    (wanted,) = [line for line in distribution("actlake").requires or () if line.startswith("ray[")]
    assert "default" in wanted.partition("[")[2].partition("]")[0].split(",")


# --- What is refused ----------------------------------------------------------------------------------------------


def test_a_job_is_ready_to_go_with_notes_on_its_paths(write_job: Write, tmp_path: Path) -> None:
    found = prepare_submission(write_job())
    assert found.text == (tmp_path / "job.toml").read_bytes()
    assert found.id.startswith("job-")
    assert [note.partition(" = ")[0] for note in found.notes[:-1]] == ["dataset", "model", "corpus.sources"]
    # 0.2 of the documents are held out: 140 rows and more beside 700.
    assert found.notes[-1].startswith("8")
    assert " rows in " in found.notes[-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset", "data/ds"),
        ("dataset", "~/ds"),
        ("model", "./tiny"),
        ("model", "~/tiny"),
        ("sources", "texts/*.txt"),
        ("url", "data/corpus"),
    ],
)
def test_a_relative_place_is_refused_by_its_key(write_job: Write, key: str, value: str) -> None:
    path = write_job()
    text = path.read_text()
    if key in ("dataset", "model"):
        path = write_job(**{key: f'"{value}"'})
    elif key == "sources":
        path.write_text(text.replace("sources = [", f'sources = ["{value}", '))
    else:
        path.write_text(text.replace("[corpus]\n", f'[corpus]\nurl = "{value}"\n'))
    name = key if key in ("dataset", "model") else f"corpus.{key}"
    with pytest.raises(
        JobFileError, match=rf"{name} = '{value.replace('*', '.')}' means another place on every machine"
    ):
        prepare_submission(path)


def test_a_model_folder_that_is_named_relatively_is_refused(
    write_job: Write, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    with pytest.raises(JobFileError, match=rf"model = '{tiny_model.name}' .* e\.g\. '{tiny_model}'"):
        prepare_submission(write_job(model=f'"{tiny_model.name}"'))


def test_the_memory_of_a_process_is_no_place(write_job: Write) -> None:
    with pytest.raises(JobFileError, match="is in the memory of one process"):
        prepare_submission(write_job(dataset='"memory://ds"'))


def test_credentials_do_not_travel(write_job: Write) -> None:
    path = write_job()
    path.write_text(path.read_text() + '[storage_options]\nsecret = "planted-secret"\nanon = false\n')
    with pytest.raises(JobFileError, match=r"storage_options\.secret may be a credential") as caught:
        prepare_submission(path)
    assert "planted-secret" not in str(caught.value)


def test_options_that_are_no_secret_are_told_from_those_that_may_be() -> None:
    harmless = {"client_kwargs": {"endpoint_url": "https://store.example", "region_name": "eu-west"}, "anon": True}
    assert secret_names(harmless | {"project": "my-project", "client": "obstore", "timeout_s": 30}) == []
    assert secret_names({"client_kwargs": {"aws_session_token": "0123456789"}, "key": "abcdef", "x": ["0123456"]}) == [
        "client_kwargs.aws_session_token",
        "key",
        "x",
    ]


def test_a_short_credential_is_one() -> None:
    assert secret_names({"secret": "abc", "client_kwargs": {"token": "x"}, "password": "1"}) == [
        "secret",
        "client_kwargs.token",
        "password",
    ]
    assert secret_names({"token": "anon", "consistency": "md5", "key": ""}) == []


def test_what_cannot_fit_is_refused_here(write_job: Write) -> None:
    path = write_job()
    path.write_text(path.read_text() + "[budget]\nmax_bytes = 1000\n")
    with pytest.raises(JobFileError, match=r"budget\.max_bytes is 1,000"):
        prepare_submission(path)
    with pytest.raises(ActlakeError, match=r"layers\.7\.resid_post"):
        prepare_submission(write_job(hook_points='["layers.7.resid_post"]'))
    path = write_job()
    path.write_text(path.read_text().replace("max_rows = 700\n", "").replace("= 32\nholdout", "= 512\nholdout"))
    with pytest.raises(JobFileError, match=r"context_length = 512 is longer than .* 256"):
        prepare_submission(path)


def test_a_model_of_the_cluster_alone_is_checked_there(write_job: Write) -> None:
    notes = prepare_submission(write_job(model='"/models/on-the-cluster"')).notes
    assert "is not on this machine" in notes[-1]


def test_nothing_is_sent_of_a_job_that_is_wrong(write_job: Write, head: FakeHead) -> None:
    result = run("submit", write_job(dataset='"data/ds"'), "--address", head.url)
    assert result.exit_code == 2
    assert "dataset = 'data/ds' means another place" in result.stderr
    assert head.asked == []


# --- Addresses and tokens -----------------------------------------------------------------------------------------


def test_the_address_is_what_was_given_then_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert jobs_url(None) == jobs_url("auto") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265")
    assert jobs_url(None) == "http://one:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://two/")
    assert jobs_url(None) == "https://two"
    # Ray's own client goes where the environment says, whatever it is given.
    assert jobs_url("three:8265") == "http://three:8265"
    with pytest.raises(BadInputError, match=r"--address 'ray://head:10001' is not the Jobs API"):
        jobs_url("ray://head:10001")


def test_a_driver_is_told_that_it_has_the_jobs_api() -> None:
    with pytest.raises(BadInputError, match=r"'actlake submit job.toml --address http://head:8265' runs the job there"):
        check_cluster("http://head:8265")


def test_the_token_is_found_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of-the-home\n")
    assert token() == "of-the-home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(BadInputError, match=r"cannot read the cluster's token in .*/elsewhere: No such file"):
        token()
    (tmp_path / "elsewhere").write_text("of-the-path")
    assert token() == "of-the-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    assert token() == "of-the-environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token() is None


def test_the_token_is_sent(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted")
    JobsApi(head.url).check()
    assert head.tokens == {"Bearer planted"}


#: What Ray raises.
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.49.0
    Python: 3.10.2
This process on node 1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MISMATCH,
            r"runs Ray 2\.49\.0 and Python 3\.10\.2, this machine Ray 2\.60\.0 and Python 3\.11\.7; install",
        ),
        ("InvalidAuthToken: Authentication token is wrong", r"wants a token, and none or another one is here; copy"),
        ("something\n   else", r"no Ray cluster at head:6379: something else$"),
    ],
)
def test_what_ray_says_of_a_connection_becomes_one_line(text: str, message: str) -> None:
    error = explain("head:6379", RuntimeError(text))
    assert "\n" not in str(error)
    with pytest.raises(ActlakeError, match=message):
        raise error


# --- A cluster that answers ---------------------------------------------------------------------------------------


def test_what_is_sent(write_job: Write, head: FakeHead) -> None:
    result = run("submit", write_job(), "--address", head.url, "--json")
    assert result.exit_code == 0, result.output
    (sent,) = head.jobs
    said = json.loads(result.stdout)
    assert said["job"] == sent["submission_id"]
    assert said["package"] == own_wheel().package
    assert sent["entrypoint"] == ENTRYPOINT
    assert sent["metadata"].keys() == {"actlake", "dataset", "model"}
    environment = sent["runtime_env"]
    assert environment.keys() == {"working_dir", "py_modules", "env_vars"}
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    assert environment["py_modules"] == [f"gcs://{own_wheel().package}"]
    assert head.packages[own_wheel().package] == own_wheel().data
    folder = zipfile.ZipFile(io.BytesIO(head.packages[environment["working_dir"].removeprefix("gcs://")]))
    assert folder.namelist() == ["job.toml"]
    # Sent again, it has the same names, and nothing is uploaded.
    head.jobs[0]["status"] = "SUCCEEDED"
    head.asked.clear()
    assert run("submit", write_job(), "--address", head.url, "--no-ship").exit_code == 0
    assert not [line for line in head.asked if line.startswith("PUT")]
    assert "py_modules" not in head.jobs[1]["runtime_env"]


def test_a_dataset_that_is_being_built_is_not_built_twice(write_job: Write, head: FakeHead) -> None:
    assert run("submit", write_job(), "--address", head.url).exit_code == 0
    result = run("submit", write_job(), "--address", head.url)
    assert result.exit_code == 2
    assert f"the job {head.jobs[0]['submission_id']} is building" in result.stderr
    assert len(head.jobs) == 1


def test_a_head_that_has_just_started_is_asked_again(
    write_job: Write, head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = head.answer, iter([b"No available agent to submit job, please try again later."])

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        early = next(refused, None) if method == "POST" else None
        return real(method, path, body) if early is None else (500, early)

    monkeypatch.setattr(head, "answer", answer)
    assert run("submit", write_job(), "--address", head.url).exit_code == 0
    assert len(head.jobs) == 1


def test_an_old_ray_is_refused_before_anything_is_sent(write_job: Write, head: FakeHead) -> None:
    head.ray = "2.9.3"
    result = run("submit", write_job(), "--address", head.url)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("runs Ray 2.9.3; actlake wants Ray 2.40 or newer")
    assert head.asked == ["GET /api/version"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "wants a token, and none is here; copy the cluster's token to ~/.ray/auth_token"),
        (403, "wants another token than the one that is here; copy the cluster's token"),
        (500, "/api/version answers 500:   planted"),
    ],
)
def test_a_cluster_that_refuses_is_one_line(write_job: Write, head: FakeHead, status: int, message: str) -> None:
    head.status = status
    result = run("submit", write_job(), "--address", head.url)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_what_is_no_cluster_is_one_line(write_job: Write, head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("status", "--address", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "no Jobs API answers at http://127.0.0.1:9 ([Errno 111] Connection refused)" in result.stderr
    monkeypatch.setattr(head, "answer", lambda *_: (200, b"<html>a page</html>"))
    result = run("submit", write_job(), "--address", head.url)
    assert result.exit_code == 2
    assert "is no Jobs API of Ray; the dashboard of a head serves it, on port 8265" in result.stderr


def test_who_answers_in_another_protocol_is_not_quoted() -> None:
    # As the port of Ray's GCS does, which is easily taken for the dashboard's.
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"\x00\x00\x18\x04\x00\n")

        thread = threading.Thread(target=answer)
        thread.start()
        result = run("status", "--address", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join(20)
    assert result.exit_code == 2
    assert "(no web server); --address is the URL of a head's dashboard" in result.stderr
    assert "\x00" not in result.stderr


def test_a_job_that_is_not_there_is_named_beside_those_that_are(write_job: Write, head: FakeHead) -> None:
    for command in ("status", "logs", "stop"):
        result = run(command, "absent", "--address", head.url)
        assert result.exit_code == 2
        assert "no job 'absent'" in result.stderr
        assert "no job was submitted there" in result.stderr
    run("submit", write_job(), "--address", head.url)
    assert f"the latest are {head.jobs[0]['submission_id']}" in run("logs", "absent", "--address", head.url).stderr


def test_status_shows_the_last_progress_of_the_log(write_job: Write, head: FakeHead) -> None:
    assert "no jobs at" in run("status", "--address", head.url).stdout
    run("submit", write_job(), "--address", head.url)
    name = head.jobs[0]["submission_id"]
    head.log = (
        "1/8 shards, 1 in flight, 0 failed, 128/875 rows\nanother line\ntrain shard 1: 128 rows, 9 kB stored; "
        "2/8 shards, 1 in flight, 0 failed, 256/875 rows, 64 rows/s, 0.01 MB/s stored, forward 50 %, 1/1 workers, "
        "0:00:10 left\nRay says something\n"
    )
    one = run("status", name, "--address", head.url)
    assert one.stdout.splitlines()[0].startswith(f"{name}: RUNNING for ")
    assert one.stdout.splitlines()[2].startswith("2/8 shards, 1 in flight, 0 failed, 256/875 rows, 64 rows/s")
    found = json.loads(run("status", name, "--address", head.url, "--json").stdout)
    assert (found["state"], found["progress"]["n_committed"], found["progress"]["left_s"]) == ("RUNNING", 2, 10)
    (row,) = [line for line in run("status", "--address", head.url).stdout.splitlines() if name in line]
    assert row.split()[:5] == [name, "RUNNING", "2/8", "256/875", "64"]
    assert len(json.loads(run("status", "--address", head.url, "--json").stdout)) == 1
    # Jobs of others are none of ours.
    head.jobs.append({"submission_id": "other", "status": "RUNNING", "entrypoint": "python train.py"})
    assert "other" not in run("status", "--address", head.url).stdout
    # The driver is gone: what it last said stands.
    head.jobs[0] |= {"status": "FAILED", "driver_exit_code": -9, "end_time": 5_000}
    one = run("status", name, "--address", head.url)
    assert one.stdout.splitlines()[0] == f"{name}: FAILED with exit code -9"
    assert one.stdout.splitlines()[2].endswith("1/1 workers")


@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, ""),
        ({"status": "FAILED", "driver_exit_code": 1}, 1, "is FAILED with exit code 1"),
        ({"status": "FAILED", "driver_exit_code": -9}, 137, "is FAILED with exit code -9"),
        ({"status": "STOPPED"}, 143, "is STOPPED"),
        ({"status": "FAILED", "message": "runtime_env setup\nfailed"}, 2, "is FAILED: runtime_env setup failed"),
        (
            {"status": "FAILED", "driver_exit_code": 1, "message": "ModuleNotFoundError: No module named 'zarr'"},
            1,
            "its machines lack 'zarr'; their image needs what 'actlake[ingest,ray]' brings",
        ),
        (
            {"status": "FAILED", "driver_exit_code": 1, "message": "Error while finding ... No module named 'actlake'"},
            1,
            "its machines lack actlake; leave --no-ship out",
        ),
        (
            {"status": "FAILED", "driver_exit_code": 1, "message": "No module named 'tomllib'"},
            1,
            "the cluster's Python is too old",
        ),
    ],
)
def test_waiting_ends_with_the_jobs_exit_code(
    write_job: Write,
    head: FakeHead,
    monkeypatch: pytest.MonkeyPatch,
    job: dict[str, Any],
    code: int,
    message: str,
) -> None:
    real = head.answer

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        found = real(method, path, body)
        if method == "POST":
            head.jobs[0] |= job
        return found

    monkeypatch.setattr(head, "answer", answer)
    result = run("submit", write_job(), "--address", head.url, "--wait")
    assert result.exit_code == code
    assert message in result.stderr


def test_a_log_is_followed_over_broken_connections_and_a_head_that_is_away(
    write_job: Write, head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_POLL_S", 0)
    assert run("submit", write_job(), "--address", head.url).exit_code == 0
    name = head.jobs[0]["submission_id"]
    real, states = head.answer, iter([None, "RUNNING", None, "SUCCEEDED"])

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if path.endswith("/logs"):
            return 200, json.dumps({"logs": "one\ntwo\nthree\n"}).encode()
        if (state := next(states)) is None:
            return 503, b"no upstream"
        head.jobs[0]["status"] = state
        return real(method, path, body)

    monkeypatch.setattr(head, "answer", answer)
    head.tails = iter([["one\n"], ["one\n", "two\n"]])
    assert "".join(JobsApi(head.url).follow(name)) == "one\ntwo\nthree\n"


def test_waiting_goes_on_when_nobody_answers_for_a_while(
    write_job: Write, head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_POLL_S", 0)
    assert run("submit", write_job(), "--address", head.url).exit_code == 0
    head.jobs[0]["status"] = "SUCCEEDED"
    name, real, away = head.jobs[0]["submission_id"], urllib.request.urlopen, iter([True, True])

    def opened(*arguments: Any, **named: Any) -> Any:
        if next(away, False):
            raise urllib.error.URLError(ConnectionRefusedError("planted"))
        return real(*arguments, **named)

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    assert JobsApi(head.url).wait(name).state == "SUCCEEDED"
    # Not without end, and not where it is known that the answer stays.
    monkeypatch.setattr(ray_jobs, "_AWAY_S", -1)
    head.status = 503
    with pytest.raises(ray_jobs.ServerError, match="answers 503"):
        JobsApi(head.url).wait(name)
    head.status = 401
    with pytest.raises(BadInputError, match="wants a token"):
        JobsApi(head.url).wait(name)


@pytest.mark.parametrize(("terminated", "code"), [(False, 130), (True, 143)])
@pytest.mark.parametrize(("option", "called"), [("--wait", "wait"), ("--follow", "follow")])
def test_whoever_stops_watching_is_told_that_the_job_goes_on(
    write_job: Write,
    head: FakeHead,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    called: str,
    terminated: bool,
    code: int,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobsApi, called, interrupted)
    monkeypatch.setattr(entry, "_terminated", terminated)
    result = run("submit", write_job(), "--address", head.url, option)
    assert result.exit_code == code
    name = head.jobs[0]["submission_id"]
    assert result.stderr.splitlines()[-1] == (
        f"the job goes on; 'actlake logs {name} -f' shows it again, 'actlake stop {name}' ends it"
    )
