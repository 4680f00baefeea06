"""
A small HTTP server that speaks as much of vLLM's API as the loop uses, for what a real server does rarely: failing, hanging, being another
one. Its answers, and its log-probabilities, are functions of the request.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(token_ids: list[int], seed: int) -> str:
    return f"{sum(token_ids)} {seed % 1000}"


def logp(token_id: int, adapter: str | None) -> float:
    """Of a token of a text: other ones for every adapter, by its path."""
    return -0.1 * (token_id % 7) - (0.1 if adapter is None else 0.2 + len(adapter) / 100)


class ModelServer(ThreadingHTTPServer):
    """
    Args:
        model: The name, and the path, of its model.
        port: Where it listens; 0 is any.
        fail: Status of completion number n, 200 to answer it; `None` to hang until the server is closed.
        max_model_len: The longest sequence it takes.
        loras: Whether it can load adapters.
        key: The API key it wants.
        seconds: How long a completion takes.
        retry_after: What it says with a 429 or 503.
        poison: Whether it fails on a request, by its token ids.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        model: str,
        port: int = 0,
        fail: Callable[[int], int | None] = lambda n: 200,
        max_model_len: int = 64,
        loras: bool = True,
        key: str | None = None,
        seconds: float = 0.0,
        retry_after: str | None = None,
        poison: Callable[[list[int]], bool] = lambda token_ids: False,
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.fail, self.max_model_len, self.loras, self.key = model, fail, max_model_len, loras, key
        self.seconds, self.retry_after, self.poison = seconds, retry_after, poison
        self.adapters: dict[str, str] = {}  # paths by name
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.completions, self.active, self.most_active = 0, 0, 0
        self.answered: Counter[tuple] = Counter()  # by token ids and seed
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is none."""

    def cards(self) -> list[dict]:
        base = {"id": self.model, "root": self.model, "parent": None, "max_model_len": self.max_model_len}
        return [
            base,
            *({"id": name, "root": path, "parent": self.model} for name, path in self.adapters.items()),
        ]

    def complete(self, body: dict) -> tuple[int, dict]:
        if body["model"] not in (self.model, *self.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids, adapter = body["prompt"], self.adapters.get(body["model"])
        usage = {"prompt_tokens": len(ids), "completion_tokens": 3}
        choice = {"text": "", "finish_reason": "length"}
        if "allowed_token_ids" in body:
            [token_id] = body["allowed_token_ids"]
            choice["logprobs"] = {"token_logprobs": [logp(token_id, adapter)]}
            return 200, {"choices": [choice], "usage": usage}
        with self.lock:
            self.completions += 1
            status = 500 if self.poison(ids) else self.fail(self.completions)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        self.closed.wait(self.seconds if status is not None else None)
        with self.lock:
            self.active -= 1
            if status == 200:
                self.answered[tuple(ids), body["seed"]] += 1
        choice |= {"text": answer(ids, body["seed"]), "finish_reason": "stop"}
        if body.get("return_token_ids"):
            choice |= {"token_ids": [5, 6, 7], "logprobs": {"token_logprobs": [logp(i, adapter) for i in (5, 6, 7)]}}
        return status or 500, {"choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict) -> None:
        server = self.server
        status, content = 404, {"error": {"message": "Not Found"}}
        if server.key and self.path != "/health" and self.headers.get("Authorization") != f"Bearer {server.key}":
            status, content = 401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"}
        elif self.path == "/health":
            status = 200
        elif self.path == "/v1/models":
            status, content = 200, {"data": server.cards()}
        elif self.path == "/v1/completions":
            status, content = server.complete(body)
        elif self.path == "/v1/load_lora_adapter" and server.loras:
            status = 200 if body["lora_name"] else 400
            if body["lora_name"]:
                server.calls.append(f"load {body['lora_name']}")
                server.adapters[body["lora_name"]] = body["lora_path"]
        elif self.path == "/v1/unload_lora_adapter" and server.loras:
            server.calls.append(f"unload {body['lora_name']}")
            status = 200 if server.adapters.pop(body["lora_name"], None) else 404
        if server.closed.is_set():  # as if its process had been killed
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if server.retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def start(server: ModelServer) -> ModelServer:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def stop(server: ModelServer) -> None:
    """What it has not answered, it never answers."""
    if not server.closed.is_set():
        server.closed.set()
        server.shutdown()
        server.server_close()


@contextmanager
def serving(model: str, **options) -> Iterator[ModelServer]:
    server = start(ModelServer(model, **options))
    try:
        yield server
    finally:
        stop(server)
