"""
A vLLM server as its client sees it, and what can be wrong with it.

In: requests. Out: their answers, or one of three errors: [`ServerLost`], which may pass, [`WrongServer`], which the user must fix, and
[`RefusedRequest`]. No library of models is imported here, because the loop's own process also asks the servers, before any work.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..children import ChildError
from ..config import GenerationConfig
from .clients import APIError, APIStatusError, Completion, Response, make_client, problem, retry_after


TOO_MANY = 429
RETRIED_STATUS = {408, 409, 425, TOO_MANY}  # and 500 and above
# Seconds in which a server that is up says so, even when it is busy
LONGEST_HEALTH = 30.0

# Sent with every request: a server takes missing values from the model's `generation_config.json`
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


class ServerLost(Exception):
    """
    The server cannot be reached, or it fails, with a `status` and perhaps the seconds after which it wants to be asked again. It may come
    back, or may never have been away: see [`Server.survives`].
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class FailedRequest(ChildError):
    """A request failed too often; `by_itself` if the server that failed it last goes on answering others."""

    def __init__(self, message: str, by_itself: bool):
        super().__init__(message)
        self.by_itself = by_itself


class WrongServer(ChildError):
    """The server answers, but is not what the recipe asks for."""


class RefusedRequest(ChildError):
    """The server does not take this request, and would not take it again."""

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
            Length of the longest sequence in a request.
        adapter (`Path`, *optional*), name (`str`, *optional*), family (`str`, *optional*):
            The adapter that requests use, its name, and the prefix of the names of adapters that it replaces.
        max_lora_rank (`int`):
            Its rank, as vLLM counts.
    """

    model: str
    max_model_len: int
    adapter: Path | None = None
    name: str | None = None
    family: str | None = None
    max_lora_rank: int = 16


class Server:
    """
    One of `generation.base_urls`.

    Args:
        base_url (`str`):
            Its URL, with or without the `/v1` of its API.
        config ([`~aries.config.GenerationConfig`]):
            How to ask it.
    """

    def __init__(self, base_url: str, config: GenerationConfig):
        self.url = base_url.rstrip("/").removesuffix("/v1")
        # The client does not repeat requests: another server may be free
        self._client = make_client(
            "generation.base_urls", f"{self.url}/v1", config.api_key_env, config.timeout, max_retries=0
        )
        self._places = config.max_concurrency_per_server
        self._in_flight: set[asyncio.Task] = set()
        self.model: str | None = None  # the name that requests use
        self.active = 0  # requests that were given to it
        self.ready = False
        self.problem: str | None = None  # why it has been set aside
        self.suspected = asyncio.Event()  # a request has failed
        self.resume_at = 0.0  # it has asked to be left alone until then, by the monotonic clock

    def __str__(self) -> str:
        return f"the server at {self.url}"

    @property
    def has_room(self) -> bool:
        return self.ready and self.active < self._places and time.monotonic() >= self.resume_at

    async def health(self) -> None:
        """
        Raises:
            [`ServerLost`]: it does not answer, or its engine is dead.
        """
        with self._errors():
            options = {"timeout": LONGEST_HEALTH}
            await self._client.get(f"{self.url}/health", cast_to=Response, options=options)

    async def survives(self, error: ServerLost) -> bool:
        """Whether the server is still there: one failed request does not prove its death, so its health decides."""
        if error.status is None or error.status == 404:  # without an answer, or started again and without the adapter
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
        Check a server before it is used: that it is up, has the model, and accepts sequences that are long enough.

        Returns:
            `list[str]`: names of the adapters that it has loaded.

        Raises:
            [`ServerLost`]: it does not answer.
            [`WrongServer`]: it is not what the recipe asks for.
        """
        try:
            await self.health()
            with self._errors():
                cards = [card.to_dict() for card in (await self._client.models.list(timeout=LONGEST_HEALTH)).data]
                models = [card for card in cards if not card.get("parent")]
                names = [card["id"] for card in models]
        except RefusedRequest as error:
            raise WrongServer(
                f"{self} is not a vLLM server that the recipe can use: {error}. Look at `generation.base_urls`, and at "
                "`generation.api_key_env` if it asks for a key."
            ) from None
        card = next((card for card in models if is_model(card, wanted.model)), None)
        if card is None:
            raise WrongServer(
                f"{self} has the model {', '.join(map(repr, names))}, and the recipe asks for {wanted.model!r}. Start it with that model, "
                f"with `--served-model-name {wanted.model}` if its path is different there, or take it out of `generation.base_urls`."
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
            [`WrongServer`]: it cannot load adapters while it runs.
        """
        try:
            await self._post("/load_lora_adapter", {"lora_name": "", "lora_path": ""}, LONGEST_HEALTH)
        except RefusedRequest as error:
            if error.status != 404:  # it only misses the name
                return
        raise WrongServer(
            f"{self} cannot load adapters while it runs. Start it with `--enable-lora` and, in its environment, "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
        )

    async def load(self, wanted: Wanted, loaded: list[str]) -> None:
        """
        Load the adapter, unless it is there, and drop those that it replaces.

        Raises:
            [`ServerLost`]: it does not answer.
            [`WrongServer`]: it does not take the adapter.
        """
        for name in loaded:
            if name != wanted.name and name.startswith(wanted.family):
                await self.unload(name)
        if wanted.name not in loaded:
            try:
                await self._post("/load_lora_adapter", {"lora_name": wanted.name, "lora_path": str(wanted.adapter)})
            except (RefusedRequest, ServerLost) as error:
                if error.status is None:
                    raise
                raise WrongServer(
                    f"{self} does not take the adapter {wanted.adapter} ({error}). Start it with `--enable-lora --max-lora-rank "
                    f"{wanted.max_lora_rank}` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and let it see the run directory under the same "
                    "path, on a file system that it shares with this machine."
                ) from None
        self.model = wanted.name

    async def unload(self, name: str) -> None:
        try:
            await self._post("/unload_lora_adapter", {"lora_name": name}, LONGEST_HEALTH)
        except (ServerLost, RefusedRequest):  # the adapter is gone, or does no harm
            pass

    async def token_logps(self, token_ids: list[int], positions: list[int]) -> list[float]:
        """
        Log-probabilities of some tokens of a text, each given those before it. Each is asked for as an answer of one token that cannot be
        another: log-probabilities of prompts (`prompt_logprobs`) end vLLM's engine if it has an adapter on a CPU.
        """
        logps = []
        for position in positions:
            settings = {"allowed_token_ids": [token_ids[position]], "max_tokens": 1, "temperature": 0.0, "logprobs": 0}
            answer = await self.complete(token_ids[:position], settings)
            try:
                [logp] = answer.choices[0].logprobs.token_logprobs
            except (AttributeError, TypeError, ValueError):
                raise WrongServer(f"{self} gives no log-probabilities, so it cannot be checked.") from None
            logps.append(logp)
        return logps

    async def complete(self, token_ids: list[int], settings: dict[str, Any]) -> Completion:
        """
        Have one request answered.

        Returns:
            `openai.types.Completion`: with one choice, a finish reason and the usage.

        Raises:
            [`ServerLost`]: it does not answer, or not to the end; or it was [`abandon`]ed.
            [`RefusedRequest`]: it does not take the request.
        """
        body = {"model": self.model, "prompt": token_ids, **NEUTRAL, **settings}
        # `completions.create` would look at every token of the prompt by itself
        request = asyncio.ensure_future(self._client.post("/completions", cast_to=Completion, body=body))
        self._in_flight.add(request)
        try:
            await asyncio.wait({request})
            if request.cancelled():
                raise ServerLost("it did not answer its health check")
            with self._errors(passing=404):
                answer = request.result()
                [choice] = answer.choices
                finish_reason, _, _ = choice.finish_reason, choice.text, answer.usage.completion_tokens
        finally:
            request.cancel()
            self._in_flight.discard(request)
        if finish_reason not in ("stop", "length"):  # "abort", by a server that is being shut down
            raise ServerLost(f"it ended an answer with {finish_reason!r}")
        return answer

    def abandon(self) -> None:
        """Give up what it has not answered: a machine that is gone does not close its connections."""
        for request in self._in_flight:
            request.cancel()

    async def close(self) -> None:
        await self._client.close()

    async def _post(self, path: str, body: dict[str, str], timeout: float | None = None) -> None:
        options = {} if timeout is None else {"timeout": timeout}
        with self._errors():
            await self._client.post(path, body=body, cast_to=Response, options=options)

    @contextmanager
    def _errors(self, passing: int | None = None) -> Iterator[None]:
        """
        Turn the client's errors into ours: [`ServerLost`], also for the status `passing`, or [`RefusedRequest`]. The client reads replies of
        any shape, and fails, like its callers, with Python's own errors.
        """
        try:
            yield
        except APIStatusError as error:
            status, message = error.status_code, problem(self._client, error)
            if status >= 500 or status in RETRIED_STATUS or status == passing:
                raise ServerLost(message, status, retry_after(error.response.headers)) from None
            raise RefusedRequest(message, status) from None
        except APIError as error:
            raise ServerLost(problem(self._client, error)) from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ServerLost(f"it does not answer as vLLM does ({error})") from None


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
            What they must have, except for the adapter, which does not exist yet.

    Returns:
        `list[str]`: what is wrong with servers that the run can do without.

    Raises:
        [`RecipeError`]: one of them is not what the recipe asks for, or none can be reached.
    """

    async def ask(url: str) -> list[str]:
        server = Server(url, config)
        try:
            await server.check(wanted)
            await server.takes_adapters()
        except ServerLost as error:
            return [f"{server} cannot be used: {error}"]
        except WrongServer as error:
            raise RecipeError(f"`generation.base_urls`: {error}") from None
        finally:
            await server.close()
        return []

    async def ask_all() -> list[str]:
        return sum(await asyncio.gather(*map(ask, config.base_urls)), [])

    lost = asyncio.run(ask_all())
    if len(lost) == len(config.base_urls):
        raise RecipeError(
            f"`generation.base_urls`: {'; '.join(lost)}. Start {'it' if len(lost) == 1 else 'at least one of them'} (docs/servers.md has the "
            "command), or correct the address."
        )
    return lost
