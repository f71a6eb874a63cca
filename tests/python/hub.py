"""A Hugging Face hub on this machine, for the real client: one model, its list of files and their bytes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(model_id: str, folder: Path) -> Iterator[str]:
    """Serve `folder` as the model `model_id`; yield the address for ``HF_ENDPOINT``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, *, with_body: bool = True) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{model_id}"):
                entries = sorted(folder.iterdir())
                answer: object = {"id": model_id, "sha": COMMIT, "siblings": [{"rfilename": e.name} for e in entries]}
                if f"{model_id}/tree/" in path:
                    sizes = [(entry.name, entry.stat().st_size) for entry in entries]
                    answer = [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in sizes]
                self._answer(json.dumps(answer).encode(), with_body)
                return
            file = folder / path.rsplit("/", 1)[-1]
            if path.startswith(f"/{model_id}/resolve/") and file.is_file():
                self._answer(file.read_bytes(), with_body)
                return
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET(with_body=False)

        def _answer(self, body: bytes, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", hashlib.sha1(body).hexdigest())
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
