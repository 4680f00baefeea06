"""
Generation on servers: several vLLM servers instead of one engine in this process.

In: the same chains as for the embedded engine, in requests with the same token ids, sampling and seeds. Out: the same answers. A chain stays
on the server that has its prompt in the prefix cache. If a server is lost, its requests go to the others; if it comes back, it gets requests
again once it has the round's adapter and gives a probe text the trainer's log-probabilities.
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..children import ChildError
from ..config import DraftsConfig
from ..data.records import Chain, sha256
from .chains import EngineSettings, TaskEngine
from .clients import Completion
from .policy_identity import POLICY_NAMES, compare
from .refinements import Request
from .servers import TOO_MANY, FailedRequest, RefusedRequest, Server, ServerLost, Wanted, WrongServer


# Seconds between two health checks of a server that answers
CHECK_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
# Seconds between two checks for room, which chains wait for only when servers are lost or busy
ROOM_SECONDS = 0.05


def wait_seconds(attempt: int, asked: float | None = None) -> float:
    """Seconds to wait before trying again: what the server asked for, or else twice as long each time, with some randomness."""
    if asked is not None:
        return max(asked, FIRST_WAIT)
    return min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)


class ServedEngine(TaskEngine):
    """
    The servers of `generation.base_urls`. Replies are read, and servers checked, inside [`step`] only: this process has one thread.

    Args:
        settings ([`~aries.generation.chains.EngineSettings`]):
            The policy. On a server, an adapter's name also has a hash of its files, so that no server answers from the weights or the
            prefixes of another adapter.
        probe (`Path`):
            What `probe.py` wrote.
        note (`Callable[[str], None]`):
            Called with news of the servers.

    Raises:
        [`~aries.generation.servers.WrongServer`]: none of them is what the recipe asks for.
    """

    def __init__(self, settings: EngineSettings, probe: Path, note: Callable[[str], None]):
        super().__init__(settings)
        self._config = config = settings.config
        self.window = len(config.base_urls) * config.max_concurrency_per_server
        self._probe = json.loads(probe.read_text(encoding="utf-8"))
        self.dtype = self._probe["dtype"]
        self._note = note
        self._wanted = Wanted(settings.model, config.max_model_len, max_lora_rank=settings.max_lora_rank)
        if settings.adapter is not None:
            name, _, adapter = settings.adapter
            self._wanted.adapter = path = Path(adapter).absolute()
            self._wanted.family = f"trl-ext-{hashlib.sha256(bytes(path.parents[1])).hexdigest()[:8]}-"  # of the run
            self._wanted.name = f"{self._wanted.family}{name}-{sha256(path)[:12]}"
        self._home: dict[str, Server] = {}  # by prompt id
        self._answered = self._given_up = 0  # requests
        self._requests: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._servers = [Server(url, config) for url in config.base_urls]
        self._keepers: list[asyncio.Task] = []
        try:
            self._loop.run_until_complete(self._admit_all())
        except ChildError:
            self.close()
            raise
        self._last_ready = time.monotonic()
        self._keepers = [self._loop.create_task(self._keep(server)) for server in self._servers]

    def start(self, task: Any) -> None:
        super().start(task)
        self._home = {}

    # Requests

    def _send(
        self, chain: Chain, request: Request, token_ids: list[int], sampling: DraftsConfig, name: tuple[Any, ...]
    ) -> None:
        settings = self.request_settings(sampling, name)
        self._requests.add(self._loop.create_task(self._answer(chain, request, token_ids, settings)))

    async def _answer(self, chain: Chain, request: Request, token_ids: list[int], settings: dict[str, Any]) -> Chain:
        try:
            answer = await self._complete(chain.prompt_id, token_ids, settings)
        except FailedRequest as error:
            if not (error.by_itself and self._given_up < self._answered):  # not the fault of this request alone
                raise
            self._given_up += 1
            self._note(f"set aside: {error}")
            self._task.strategy.give_up(chain, request)
            return chain
        self._answered += 1
        [choice], usage = answer.choices, answer.usage
        if usage.prompt_tokens_details is not None:  # of servers with `--enable-prompt-tokens-details`
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.prompt_tokens_details.cached_tokens or 0
        self._task.strategy.add(chain, request, choice.text, usage.completion_tokens, choice.finish_reason)
        return chain

    async def _complete(self, prompt_id: str, token_ids: list[int], settings: dict[str, Any]) -> Completion:
        """Get a request's answer, from whichever server gives it."""
        problems, attempts, refused_since, survived = [], 0, None, False
        while attempts <= self._config.max_retries:
            async with self._place(prompt_id) as server:
                try:
                    return await server.complete(token_ids, settings)
                except RefusedRequest as error:
                    raise ChildError(
                        f"{server} does not take a request of {prompt_id}: {error}. It must be a vLLM server of a version that takes token "
                        "ids as prompts (docs/servers.md)."
                    ) from None
                except ServerLost as error:
                    problems.append(f"{server}: {error}")
                    status, asked = error.status, error.retry_after
                    wait = wait_seconds(len(problems) - 1, asked)
                    survived = await server.survives(error)
                if not survived:
                    server.ready = False  # until its keeper has checked it
                    server.suspected.set()
                elif status == TOO_MANY or asked is not None:
                    server.resume_at = max(server.resume_at, time.monotonic() + wait)
            if status == TOO_MANY:
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since < self._config.max_outage:
                    continue  # the server was only busy
            attempts += 1
            await asyncio.sleep(wait)
        raise FailedRequest(
            f"a request of {prompt_id} failed {len(problems)} times ({'; '.join(dict.fromkeys(problems))}). Look at the servers' logs, or "
            "raise `generation.max_retries` or `generation.timeout`. What was answered is kept, and the same command continues.",
            by_itself=survived,
        )

    @asynccontextmanager
    async def _place(self, prompt_id: str) -> AsyncIterator[Server]:
        """Take a place on the server that the chain was on, or else on the one with the most room."""
        while not (free := [server for server in self._servers if server.has_room]):
            await asyncio.sleep(ROOM_SECONDS)
        server = self._home.get(prompt_id)
        if server not in free:
            server = min(free, key=lambda server: server.active)
        self._home[prompt_id] = server
        server.active += 1
        try:
            yield server
        finally:
            server.active -= 1

    def step(self) -> list[Chain]:
        done, self._requests = self._loop.run_until_complete(self._some_of(self._requests))
        failed = {request for request in done if request.exception() is not None}
        if failed == done:
            raise failed.pop().exception()
        self._requests |= failed  # what else was answered is written down first
        return [request.result() for request in done - failed]

    async def _some_of(self, requests: set[asyncio.Task]) -> tuple[set[asyncio.Task], set[asyncio.Task]]:
        """Wait until some requests are done, and return those and the others. An error if there has been no usable server for too long."""
        while True:
            done, others = await asyncio.wait(requests, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            for keeper in filter(asyncio.Task.done, self._keepers):
                keeper.result()  # it ends only because of a bug
            if any(server.ready for server in self._servers):
                self._last_ready = time.monotonic()
            if done:
                return done, others
            if time.monotonic() - self._last_ready > self._config.max_outage:
                problems = "; ".join(f"{server}: {server.problem or 'no answer'}" for server in self._servers)
                raise ChildError(
                    f"no server of `generation.base_urls` could be used for {self._config.max_outage:g} seconds (`generation.max_outage`): "
                    f"{problems}. Start them again; what was answered is kept, and the same command continues."
                )

    def sample_logps(
        self, prompts: list[dict[str, Any]], sampling: DraftsConfig, seed: tuple[Any, ...]
    ) -> list[dict[str, Any]]:
        async def sample(prompt_id: str, token_ids: list[int], settings: dict[str, Any]) -> dict[str, Any]:
            settings = {"return_token_ids": True, "top_p": 1.0, "top_k": 0, **settings}
            [choice] = (await self._complete(prompt_id, token_ids, settings)).choices
            row = {"prompt_id": prompt_id, "prompt_token_ids": token_ids, "token_ids": choice.token_ids}
            return row | {"logps": choice.logprobs.token_logprobs, "dtype": self.dtype}

        requests = self.sample_requests(prompts, sampling, seed)
        tasks = [self._loop.create_task(sample(*request)) for request in requests]
        self._requests = set(tasks)
        while self._requests:
            done, self._requests = self._loop.run_until_complete(self._some_of(self._requests))
            for task in done:
                task.result()  # its error at once, not after all the others
        return [task.result() for task in tasks]

    def close(self) -> None:
        async def close() -> None:
            tasks = [*self._keepers, *self._requests]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in self._servers:
                if server.ready and self._wanted.name is not None:
                    await server.unload(self._wanted.name)
                await server.close()

        self._loop.run_until_complete(close())
        self._loop.close()

    # Servers

    async def _admit_all(self) -> None:
        """Check the servers for the first time. An error if no server is what the recipe asks for, and none can still turn up."""
        found = await asyncio.gather(*map(self._admit, self._servers), return_exceptions=True)
        if all(isinstance(error, ChildError) for error in found):
            raise found[0]
        for server, error in zip(self._servers, found, strict=True):
            if isinstance(error, (ServerLost, ChildError)):
                self._set_aside(server, error)
            elif error is not None:
                raise error

    async def _admit(self, server: Server) -> None:
        """Make a server ready for requests, if it is what the recipe asks for."""
        loaded = await server.check(self._wanted)
        if self._wanted.name is not None:
            await server.load(self._wanted, loaded)
        await self._verify(server)
        server.ready, server.problem = True, None
        server.suspected.clear()

    async def _verify(self, server: Server) -> None:
        """Compare the server's log-probabilities of the probe's texts with the trainer's."""
        logps = await asyncio.gather(*(server.token_logps(**text) for text in self._probe["texts"]))
        found = torch.tensor([logp for text in logps for logp in text])
        others = {name: torch.tensor(values) for name, values in self._probe["logps"].items()}
        measured = compare(found, others.pop("policy"), others, self._probe["tolerance"])
        if measured["fault"] is None:
            return
        what = f"the adapter {self._wanted.adapter}" if self._wanted.adapter else f"the model {self._wanted.model}"
        message = (
            f"{server} does not answer with {what}: its log-probabilities of a probe text differ from the policy's by "
            f"{measured['difference']:.3g} nats per token (root mean square over {len(found)} tokens), "
        )
        if measured["fault"] == "tolerance":
            message += f"and the tolerance is {measured['tolerance']:g}. "
        else:
            nearest = measured["others"][measured["fault"]]["difference"]
            message += f"and from those of {POLICY_NAMES[measured['fault']]} by {nearest:.3g}. "
        raise WrongServer(
            f"{message}Start it with the recipe's model and revision, with vLLM's default log-probabilities (raw), and with the data type that "
            "`generation.dtype` names; or take it out of `generation.base_urls`. If the difference is rounding, raise `parity.tolerance`."
        )

    async def _keep(self, server: Server) -> None:
        """Watch one server until the end: whether it is still there, and whether it can be used again."""
        failures = 0
        while True:
            try:
                if server.ready:
                    await server.health()
                else:
                    was_away = server.problem is not None
                    await self._admit(server)
                    if was_away:
                        self._note(f"{server} is back")
                failures = 0
                with suppress(TimeoutError):
                    await asyncio.wait_for(server.suspected.wait(), CHECK_SECONDS)
            except ServerLost as error:
                failures += 1
                if error.status != TOO_MANY:  # else it is busy, not lost
                    self._set_aside(server, error)
                await asyncio.sleep(wait_seconds(failures, error.retry_after))
            except ChildError as error:
                failures += 1
                self._set_aside(server, error)
                await asyncio.sleep(wait_seconds(failures))

    def _set_aside(self, server: Server, error: ServerLost | ChildError) -> None:
        server.abandon()
        known = server.problem
        server.ready, server.problem = False, str(error)
        if isinstance(error, ChildError) and server.problem != known:
            self._note(f"left out: {error}")
        elif known is None:
            others = sum(other.ready for other in self._servers)
            self._note(f"{server} is lost ({error}); {others} of {len(self._servers)} are in use")
