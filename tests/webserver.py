"""An HTTP server that gives out a folder, with a page of links for each folder in it."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class _Plain(SimpleHTTPRequestHandler):
    """Python's own: whoever asks for a range gets the whole file."""

    def log_message(self, *_: Any) -> None:
        pass


class _Ranges(_Plain):
    def send_head(self) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if asked is None or not os.path.isfile(path):
            return super().send_head()
        data = Path(path).read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first >= len(data):
            self.send_error(416)
            return None
        self.send_response(206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        return io.BytesIO(data[first : last + 1])


@contextmanager
def web_server(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """Serve a folder on the loopback; give the URL that it has there."""
    handler = partial(_Ranges if ranges else _Plain, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
