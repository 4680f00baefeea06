"""
Small HTTP servers whose answers are functions of the request, for what a real server does rarely: failing, hanging, being another one.
[`ModelServer`] speaks as much of vLLM's API as generation uses, [`ChatServer`] as much of OpenAI's as the judge does.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(token_ids: list[int], seed: int) -> str:
    return f"{sum(token_ids)} {seed % 1000}"


def logp(token_id: int, adapter: str | None) -> float:
    """Log-probability of a token of a text; each adapter has its own, by its path."""
    return -0.1 * (token_id % 7) - (0.1 if adapter is None else 0.2 + len(adapter) / 100)


class JsonServer(ThreadingHTTPServer):
    """
    Args:
        port: Where it listens; 0 is any.
        key: The API key it wants.
        retry_after: What it says with a 429 or 503.
        location: Where it redirects every request to.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, port: int = 0, key: str | None = None, retry_after: str | None = None, location: str | None = None
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.key, self.retry_after, self.location = key, retry_after, location
        self.headers: Message | None = None  # of the latest request
        self.lock, self.closed = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        raise NotImplementedError

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is not an error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        server, sent = self.server, self.headers.get("Authorization")
        server.headers = self.headers
        if server.location is not None:
            status, content = 307, {}
        elif server.key and self.path != "/health" and sent != f"Bearer {server.key}":
            status, content = 401, {"error": f"Unauthorized: {sent}"}
        else:
            status, content = server.reply(self.path, body)
        if server.closed.is_set():  # as if its process had been killed
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if server.retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", server.retry_after)
        if server.location is not None:
            self.send_header("Location", server.location)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


NOT_FOUND = 404, {"error": {"message": "Not Found"}}


class ModelServer(JsonServer):
    """
    Args:
        model: The name, and the path, of its model.
        fail: Status of completion number n, 200 to answer it; `None` to hang until the server is closed.
        max_model_len: The longest sequence it takes.
        loras: Whether it can load adapters.
        poison: Whether it fails on a request, by its token ids.
        together: Its first so many completions wait for one another.
    """

    def __init__(
        self,
        model: str,
        fail: Callable[[int], int | None] = lambda n: 200,
        max_model_len: int = 64,
        loras: bool = True,
        poison: Callable[[list[int]], bool] = lambda token_ids: False,
        together: int = 1,
        **options,
    ):
        super().__init__(**options)
        self.model, self.fail, self.max_model_len, self.loras, self.poison = model, fail, max_model_len, loras, poison
        self.together = threading.Barrier(together)
        self.frozen = False  # it then takes connections, and says nothing
        self.gate, self.has_answered = threading.Event(), threading.Event()  # closed, it holds completions back
        self.gate.set()
        self.adapters: dict[str, str] = {}  # paths by name
        self.completions = self.active = self.most_active = 0
        self.answered: Counter[tuple] = Counter()  # by token ids and seed
        self.calls: list[str] = []

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.frozen:
            self.closed.wait()
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            base = {"id": self.model, "root": self.model, "parent": None, "max_model_len": self.max_model_len}
            adapters = [{"id": name, "root": path, "parent": self.model} for name, path in self.adapters.items()]
            return 200, {"data": [base, *adapters]}
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter" and self.loras:
            if not body["lora_name"]:
                return 400, {}
            self.calls.append(f"load {body['lora_name']}")
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, {}
        if path == "/v1/unload_lora_adapter" and self.loras:
            self.calls.append(f"unload {body['lora_name']}")
            return 200 if self.adapters.pop(body["lora_name"], None) else 404, {}
        return NOT_FOUND

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in (self.model, *self.adapters):
            return NOT_FOUND
        ids, adapter = body["prompt"], self.adapters.get(body["model"])
        usage = {"prompt_tokens": len(ids), "completion_tokens": 3}
        choice = {"text": "", "finish_reason": "length"}
        if "allowed_token_ids" in body:
            [token_id] = body["allowed_token_ids"]
            choice["logprobs"] = {"token_logprobs": [logp(token_id, adapter)]}
            return 200, {"choices": [choice], "usage": usage}
        with self.lock:
            self.completions += 1
            number, status = self.completions, 500 if self.poison(ids) else self.fail(self.completions)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        if number <= self.together.parties:
            self.together.wait(timeout=60)
        self.gate.wait(timeout=60)
        if status is None or self.frozen:
            self.closed.wait()
        with self.lock:
            self.active -= 1
            if status == 200 and not self.closed.is_set():
                self.answered[tuple(ids), body["seed"]] += 1
                self.has_answered.set()
        choice |= {"text": answer(ids, body["seed"]), "finish_reason": "stop"}
        if body.get("return_token_ids"):
            choice |= {"token_ids": [5, 6, 7], "logprobs": {"token_logprobs": [logp(i, adapter) for i in (5, 6, 7)]}}
        return status or 500, {"choices": [choice], "usage": usage}


class ChatServer(JsonServer):
    """
    A judge whose verdict is a function of two answers, in lines `A=` and `B=` of the request.

    Args:
        prefer: What it replies for answers A and B.
        fail: Status of request number n, 200 to answer it.
        models: The names that it lists at `/v1/models`; without any it has no such page.
    """

    def __init__(self, prefer: Callable[[str, str], Any], fail=lambda n: 200, models: tuple[str, ...] = (), **options):
        super().__init__(**options)
        self.prefer, self.fail, self.models = prefer, fail, models
        self.requests: list[dict[str, Any]] = []

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models" and self.models:
            return 200, {"data": [{"id": name} for name in self.models]}
        if path != "/v1/chat/completions":
            return NOT_FOUND
        with self.lock:
            self.requests.append(body)
            status = self.fail(len(self.requests))
        a, b = re.search(r"A=(.*)\nB=(.*)", body["messages"][0]["content"]).groups()
        return status, {"choices": [{"message": {"role": "assistant", "content": self.prefer(a, b)}}]}


def start(server: JsonServer) -> JsonServer:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def stop(server: JsonServer) -> None:
    """What it has not answered, it never answers."""
    if not server.closed.is_set():
        server.closed.set()
        server.shutdown()
        server.server_close()


@contextmanager
def running(server: JsonServer) -> Iterator[JsonServer]:
    start(server)
    try:
        yield server
    finally:
        stop(server)


def serving(model: str, **options) -> Any:
    return running(ModelServer(model, **options))
