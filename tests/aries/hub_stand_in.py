"""The part of the Hub's API that an upload needs, on loopback; it keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repos (`dict[str, dict]`):
            What each repository was made with, by `kind/name`.
        files (`dict[str, dict[str, bytes]]`):
            What it holds.
        refuse (`int`):
            Status with which every commit is refused; 0 for none.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.files, self.refuse = {}, {}, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type", "model")
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repos[f"{kind}/{name}"] = asked
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        kind, user, name, action = self.path.split("/")[2:6]
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "commit" and not self.server.refuse:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held = self.server.files.setdefault(f"{kind.removesuffix('s')}/{user}/{name}", {})
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.url}/{user}/{name}/commit/1", "commitOid": "1"})
        return self.answer(self.server.refuse or 404, {"error": "refused"})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
