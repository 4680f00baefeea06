"""
A vLLM server as its client sees it, and what can be wrong with it.

In: requests. Out: their answers, or one of three errors: [`ServerLost`], which may pass, [`WrongServer`], which somebody has to put
right, and [`RefusedRequest`]. Nothing is imported here that knows models: the loop's own process asks the servers too, before any work.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ...recipe import RecipeError
from ..children import ChildError
from ..config import GenerationConfig
from .waits import retry_after


TOO_MANY = 429
RETRIED_STATUS = {408, 409, 425, TOO_MANY}  # and those of 500 and above
LONGEST_CONNECT = 10.0
# Seconds for a server that is up to say so, while it is busy
LONGEST_HEALTH = 30.0
# Below the 5 s after which vLLM's HTTP server closes an idle connection: one that is closing loses the next request
LONGEST_IDLE = 2.0
# What a server may say in an error
SHOWN_CHARACTERS = 300

# Said in every request: what it leaves out, a server would take from the model's `generation_config.json`
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


class ServerLost(Exception):
    """
    It cannot be reached, or fails, then with a `status`, and maybe with the seconds after which it wants to be asked again. It may come
    back, or not have been away: see [`Server.survives`].
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class FailedRequest(ChildError):
    """It was tried too often; `by_itself` if the server that failed it last goes on answering."""

    def __init__(self, message: str, by_itself: bool):
        super().__init__(message)
        self.by_itself = by_itself


class WrongServer(ChildError):
    """It answers, and is not what the recipe asks for."""


class RefusedRequest(ChildError):
    """It does not take this request, and would not take it again."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Wanted:
    """
    What a server must have.

    Args:
        model (`str`):
            The recipe's `model_name_or_path`.
        max_model_len (`int`):
            The longest sequence that it will be asked for.
        adapter (`Path`, *optional*), name (`str`, *optional*), family (`str`, *optional*):
            The adapter that requests use, its name, and how the names begin of those that it takes the place of.
        max_lora_rank (`int`):
            Its rank, as vLLM counts.
    """

    model: str
    max_model_len: int
    adapter: Path | None = None
    name: str | None = None
    family: str | None = None
    max_lora_rank: int = 16


def api_key(config: GenerationConfig) -> str | None:
    """
    Raises:
        [`RecipeError`]: the environment variable is not set.
    """
    if config.api_key_env is None:
        return None
    if not os.environ.get(config.api_key_env):
        raise RecipeError(
            f"`generation.api_key_env`: the environment variable {config.api_key_env} is not set. Export the key under this name, or "
            "leave `api_key_env` out for servers that need none."
        )
    return os.environ[config.api_key_env]


class Server:
    """
    One of `generation.base_urls`.

    Args:
        base_url (`str`):
            Its URL, with or without the `/v1` of its API.
        config ([`~aries.config.GenerationConfig`]):
            How it is asked.
    """

    def __init__(self, base_url: str, config: GenerationConfig):
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self._config = config
        self._key = api_key(config)
        self._client = httpx.AsyncClient(
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(config.timeout, connect=LONGEST_CONNECT),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=LONGEST_IDLE),
        )
        self._in_flight: set[asyncio.Task] = set()
        self.model: str | None = None  # the name that requests use
        self.active = 0  # requests that were given to it
        self.ready = False
        self.problem: str | None = None  # why it has been set aside
        self.suspected = asyncio.Event()  # a request has failed
        self._resume_at = 0.0

    def __str__(self) -> str:
        return f"the server at {self.url}"

    @property
    def has_room(self) -> bool:
        return self.ready and self.active < self._config.max_concurrency_per_server and self.pause <= 0

    @property
    def pause(self) -> float:
        """Seconds for which it has asked to be left alone."""
        return self._resume_at - time.monotonic()

    def leave_alone(self, seconds: float) -> None:
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    async def health(self) -> None:
        """
        Raises:
            [`ServerLost`]: it does not answer, or its engine is dead.
        """
        await self._request("GET", "/health", timeout=LONGEST_HEALTH)

    async def survives(self, error: ServerLost) -> bool:
        """Whether it is there all the same: one request's error is not its death, and what it says of its health counts."""
        if error.status is None or error.status == 404:  # the last: it was started again, and has no adapter
            return False
        if error.status == TOO_MANY:
            return True
        try:
            await self.health()
        except (ServerLost, RefusedRequest):
            return False
        return True

    async def check(self, wanted: Wanted) -> list[str]:
        """
        Look at the server before it is used: is it up, has it the model, and does it take sequences that are long enough?

        Returns:
            `list[str]`: names of the adapters that it has loaded.

        Raises:
            [`ServerLost`]: it does not answer.
            [`WrongServer`]: it is another one than the recipe asks for.
        """
        try:
            await self.health()
            cards = (await self._json("GET", "/v1/models", timeout=LONGEST_HEALTH))["data"]
            models = [card for card in cards if not card.get("parent")]
            names = [card["id"] for card in models]
            card = next((card for card in models if is_model(card, wanted.model)), None)
        except RefusedRequest as error:
            raise WrongServer(
                f"{self} is no server of vLLM's that the recipe can use: {error}. Look at `generation.base_urls`, and at "
                "`generation.api_key_env` where it asks for a key."
            ) from None
        except (LookupError, TypeError, AttributeError, ValueError):
            raise WrongServer(
                f"{self} does not list its models as vLLM does. Look at `generation.base_urls`."
            ) from None
        if card is None:
            raise WrongServer(
                f"{self} has the model {', '.join(map(repr, names))}, and the recipe asks for {wanted.model!r}. Start it with that one, "
                f"where it is at another path there with `--served-model-name {wanted.model}`, or take it out of "
                "`generation.base_urls`."
            )
        length = card.get("max_model_len")
        if length is not None and length < wanted.max_model_len:
            raise WrongServer(
                f"{self} takes sequences of {length:,} tokens, and `generation.max_model_len` is {wanted.max_model_len:,}. Start it with "
                f"`--max-model-len {wanted.max_model_len}`, or lower the key."
            )
        self.model = card["id"]
        return [card["id"] for card in cards if card.get("parent")]

    async def takes_adapters(self) -> None:
        """
        Raises:
            [`WrongServer`]: it was started without the means to load any.
        """
        try:
            await self._request("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}, LONGEST_HEALTH)
        except RefusedRequest as error:
            if error.status != 404:  # it misses the name, so it would load one
                return
        raise WrongServer(
            f"{self} cannot load adapters while it runs. Start it with `--enable-lora` and, in its environment, "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
        )

    async def load(self, wanted: Wanted, loaded: list[str]) -> None:
        """
        Load the adapter, unless it is there, and drop those that it takes the place of.

        Raises:
            [`ServerLost`]: it does not answer.
            [`WrongServer`]: it does not take the adapter.
        """
        for name in loaded:
            if name != wanted.name and name.startswith(wanted.family):
                await self.unload(name)
        if wanted.name not in loaded:
            body = {"lora_name": wanted.name, "lora_path": str(wanted.adapter)}
            try:
                await self._request("POST", "/v1/load_lora_adapter", body)
            except (RefusedRequest, ServerLost) as error:
                if error.status is None:
                    raise
                raise WrongServer(
                    f"{self} does not take the adapter {wanted.adapter} ({error}). It must be started with `--enable-lora --max-lora-rank "
                    f"{wanted.max_lora_rank}` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and see the run directory under the same path, "
                    "on a file system that it shares with this machine."
                ) from None
        self.model = wanted.name

    async def unload(self, name: str) -> None:
        try:
            await self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, LONGEST_HEALTH)
        except (ServerLost, RefusedRequest):  # then it is gone, or in nobody's way
            pass

    async def token_logps(self, token_ids: list[int], positions: list[int]) -> list[float]:
        """
        Log-probabilities of some tokens of a text, each given those before it. As one-token answers that may be nothing else: those of
        prompts (`prompt_logprobs`) end vLLM's engine where it has an adapter on a CPU.
        """
        logps = []
        for position in positions:
            body = {"prompt": token_ids[:position], "allowed_token_ids": [token_ids[position]]}
            choice, _ = await self.complete({**body, "max_tokens": 1, "temperature": 0.0, "logprobs": 0})
            try:
                [logp] = choice["logprobs"]["token_logprobs"]
            except (LookupError, TypeError, ValueError):
                raise WrongServer(f"{self} gives no log-probabilities, by which it could be checked.") from None
            logps.append(logp)
        return logps

    async def complete(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Have one request answered.

        Returns:
            `tuple[dict, dict]`: the choice, and the usage.

        Raises:
            [`ServerLost`]: it does not answer, or not to the end; or it was [`abandon`]ed.
            [`RefusedRequest`]: it does not take the request.
        """
        request = asyncio.ensure_future(
            self._json("POST", "/v1/completions", {"model": self.model, **NEUTRAL, **body})
        )
        self._in_flight.add(request)
        try:
            await asyncio.wait({request})
            if request.cancelled():
                raise ServerLost("it did not answer its health check")
            answer = request.result()
        finally:
            request.cancel()
            self._in_flight.discard(request)
        try:
            [choice], usage = answer["choices"], answer["usage"]
            finish_reason, _, _ = choice["finish_reason"], choice["text"], usage["completion_tokens"]
        except (LookupError, TypeError, ValueError):
            raise ServerLost("it answered with something else than a completion") from None
        if finish_reason not in ("stop", "length"):  # "abort", by a server that is being shut down
            raise ServerLost(f"it ended an answer with {finish_reason!r}")
        return choice, usage

    def abandon(self) -> None:
        """Give up what it has not answered: a machine that is gone closes no connection."""
        for request in self._in_flight:
            request.cancel()

    async def close(self) -> None:
        await self._client.aclose()

    async def _json(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
        response = await self._request(method, path, body, timeout)
        try:
            return response.json()
        except ValueError:
            raise ServerLost(f"{path} answered with something else than JSON: {self._shown(response.text)}") from None

    async def _request(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> httpx.Response:
        options = {} if timeout is None else {"timeout": timeout}
        try:
            response = await self._client.request(method, self.url + path, json=body, **options)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ServerLost(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
        status = response.status_code
        if status == 200:
            return response
        problem = f"{path}: status {status}: {self._shown(response.text)}"
        if status >= 500 or status in RETRIED_STATUS or (status == 404 and path == "/v1/completions"):
            raise ServerLost(problem, status, retry_after(response.headers))
        raise RefusedRequest(problem, status)

    def _shown(self, text: str) -> str:
        """What a server says, shortened, and without the key that it may quote."""
        return (text if self._key is None else text.replace(self._key, "***"))[:SHOWN_CHARACTERS]


def is_model(card: dict[str, Any], model: str) -> bool:
    """Whether an entry of `/v1/models` is the recipe's model, by the name it is served under or by where it was loaded from."""
    root = card.get("root") or ""
    return model in (card["id"], root) or (Path(model).exists() and Path(root).absolute() == Path(model).absolute())


def check_servers(config: GenerationConfig, wanted: Wanted) -> list[str]:
    """
    Ask all servers before any work.

    Args:
        config ([`~aries.config.GenerationConfig`]):
            Its `base_urls`.
        wanted ([`Wanted`]):
            What they must have, but for the adapter, which is still to be made.

    Returns:
        `list[str]`: what is wrong with servers that the run can do without.

    Raises:
        [`RecipeError`]: one of them is another one than the recipe asks for, or none can be reached.
    """

    async def ask(server: Server) -> None:
        try:
            await server.check(wanted)
            await server.takes_adapters()
        finally:
            await server.close()

    async def ask_all() -> list[Any]:
        servers = [Server(url, config) for url in config.base_urls]
        return list(zip(servers, await asyncio.gather(*map(ask, servers), return_exceptions=True), strict=True))

    lost = []
    for server, error in asyncio.run(ask_all()):
        if isinstance(error, ServerLost):
            lost.append(f"{server} cannot be used: {error}")
        elif isinstance(error, WrongServer):
            raise RecipeError(f"`generation.base_urls`: {error}")
        elif error is not None:
            raise error
    if len(lost) == len(config.base_urls):
        raise RecipeError(
            f"`generation.base_urls`: {'; '.join(lost)}. Start {'it' if len(lost) == 1 else 'at least one of them'} (docs/servers.md has the command), "
            "or put the right address there."
        )
    return lost
