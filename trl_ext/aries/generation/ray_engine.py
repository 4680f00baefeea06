"""
Generation on Ray: an embedded engine in each of several workers, on as many machines as the cluster has.

In: the same chains as for one embedded engine, in requests with the same token ids, sampling and seeds. Out: the same answers. The chains are
driven here; a worker takes requests, steps its engine until one of them is finished, and returns what is. If a worker is lost, alone or
with its machine, its requests go to the others, and a new one takes its place if the cluster has room. A request that was lost with more
than `generation.max_retries` workers is taken to be what kills them, and is set aside.

Ray Data's own vLLM processor works through a dataset stage by stage, with the barrier that chains are there to avoid.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from ..children import ChildError
from .chains import FAILED, EngineSettings, Finished, RequestEngine, Task


CHECK_SECONDS = 1.0


class Worker:
    """What runs on the cluster: an [`~aries.generation.embedded_engine.EmbeddedEngine`], and no chains."""

    def __init__(self, settings: EngineSettings):
        from .embedded_engine import EmbeddedEngine

        self._engine = EmbeddedEngine(settings)

    def dtype(self) -> str:
        return self._engine.dtype

    def work(self, requests: list[tuple[str, list[int], dict[str, Any]]]) -> list[Finished]:
        """Take requests, and step until at least one of those here is finished."""
        for request in requests:
            self._engine.add(*request)
        while True:
            found = self._engine.finished()
            if found:
                return found


class Place:
    """A worker as it is seen from here: its actor, what it was sent, and the call that it works on."""

    def __init__(self, number: int):
        self.number = number
        self.actor: Any = None
        self.call: Any = None
        self.dtype: str | None = None  # once its engine has started
        self.waiting: list[str] = []  # requests to be sent with the next call
        self.sent: set[str] = set()

    @property
    def held(self) -> int:
        return len(self.waiting) + len(self.sent)


class RayEngine(RequestEngine):
    """
    The workers of `generation.ray_workers`.

    Args:
        settings ([`~aries.generation.chains.EngineSettings`]):
            Those of each worker's engine; paths must lead to the same files on every machine.
        note (`Callable[[str], None]`):
            Called with what becomes of the workers.

    Raises:
        [`~aries.children.ChildError`]: the cluster cannot be reached, or no worker starts in `generation.max_outage` seconds.
    """

    def __init__(self, settings: EngineSettings, note: Callable[[str], None]):
        super().__init__(settings)
        self._settings = settings
        self._config = config = settings.config
        self._note = note
        self.window = config.ray_workers * config.max_num_seqs
        self._requests: dict[str, tuple[str, list[int], dict[str, Any]]] = {}  # those that are not finished
        self._home: dict[str, Place] = {}  # by prompt id
        self._losses: Counter[str] = Counter()  # of workers, by the request that they had
        self._failed: list[Finished] = []  # set aside, and not returned yet
        self._answered = self._given_up = 0
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        here = (
            {}
            if config.ray_address
            else {"include_dashboard": False, "num_cpus": max(config.ray_workers, os.cpu_count())}
        )
        try:
            ray.init(address=config.ray_address, log_to_driver=False, **here)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ChildError(
                f"`generation.ray_address`: {config.ray_address}: {error} Start the cluster with `ray start --head`, or leave the key out "
                "for one of this machine."
            ) from error
        self._last_ready = time.monotonic()
        self._places = [Place(number) for number in range(1, config.ray_workers + 1)]
        for place in self._places:
            self._start(place)
        while not self._ready():
            self._collect()

    @property
    def dtype(self) -> str:
        return self._ready()[0].dtype

    def start(self, task: Task) -> None:
        super().start(task)
        self._home = {}

    def add(self, request_id: str, token_ids: list[int], settings: dict[str, Any]) -> None:
        self._requests[request_id] = (request_id, token_ids, settings)
        self._assign(request_id)

    def finished(self) -> list[Finished]:
        self._reassign()
        for place in self._ready():
            if place.call is None and place.held:
                chosen = self._next(place)
                place.sent.update(chosen)
                place.waiting = [request_id for request_id in place.waiting if request_id not in place.sent]
                place.call = place.actor.work.remote([self._requests[request_id] for request_id in chosen])
        found = self._collect() + self._failed
        self._failed = []
        for answer in found:
            del self._requests[answer.request_id]
            self._losses.pop(answer.request_id, None)
        return found

    def _next(self, place: Place) -> list[str]:
        """
        What a worker is sent next: requests that were never lost with a worker, and only then the others, separately, in batches that shrink
        with every loss, down to one. So the request that kills its worker is found before its neighbours have been tried too often.
        """
        lost = [request_id for request_id in place.waiting if self._losses[request_id]]
        fresh = [request_id for request_id in place.waiting if not self._losses[request_id]]
        if fresh and not any(self._losses[request_id] for request_id in place.sent):
            return fresh
        if place.sent:
            return []
        most = max(self._losses[request_id] for request_id in lost)
        share = 1 - most / max(self._config.max_retries, 1)
        return [r for r in lost if self._losses[r] == most][: math.ceil(self._config.max_num_seqs**share)]

    def close(self) -> None:
        ray.shutdown()

    # Workers

    def _ready(self) -> list[Place]:
        return [place for place in self._places if place.dtype is not None]

    def _start(self, place: Place) -> None:
        """Have the cluster make a worker; `dtype` is its first answer."""
        gpus = self._config.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
        options = {"num_cpus": 1, "num_gpus": gpus}
        place.actor = ray.remote(Worker).options(**options).remote(self._settings)
        place.dtype, place.call = None, place.actor.dtype.remote()

    def _assign(self, request_id: str) -> None:
        """Give it to the worker that has the chain's earlier turns in its prefix cache, unless another has much less to do."""
        prompt_id = request_id.partition("/")[0]
        places = self._ready() or self._places
        least = min(places, key=lambda place: place.held)
        home = self._home.get(prompt_id)
        if home not in places or home.held >= max(self._config.max_num_seqs, least.held + 1):
            home = least
        self._home[prompt_id] = home
        home.waiting.append(request_id)

    def _reassign(self) -> None:
        """Give the requests that were left when there were no workers to the first that arrive."""
        if not self._ready():
            return
        for place in self._places:
            if place.dtype is None:
                waiting, place.waiting = place.waiting, []
                for request_id in waiting:
                    self._assign(request_id)

    def _collect(self) -> list[Finished]:
        """
        Wait for one of the calls.

        Raises:
            [`~aries.children.ChildError`]: there has been no worker for too long.
        """
        calls = {place.call: place for place in self._places if place.call is not None}
        done, _ = ray.wait(list(calls), timeout=CHECK_SECONDS)
        found = []
        for call in done:
            place = calls[call]
            try:
                answer = ray.get(call)
            except RayActorError as error:
                if "creation task" in str(error):  # it would happen again
                    raise ChildError(f"a worker of Ray could not start its engine: {error}") from error
                self._lost(place, error)
                continue
            place.call = None
            self._answered += 0 if isinstance(answer, str) else len(answer)
            if isinstance(answer, str):
                place.dtype = answer
            else:
                place.sent -= {each.request_id for each in answer}
                found += answer
        if self._ready():
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._config.max_outage:
            raise ChildError(
                f"no worker of Ray could be used for {self._config.max_outage:g} seconds (`generation.max_outage`). Each needs 1 CPU and, "
                f"if the cluster has GPUs, {self._config.tensor_parallel_size} of them; `ray status` shows what the cluster has. What was "
                "answered is kept, and the same command continues."
            )
        return found

    def _lost(self, place: Place, error: RayActorError) -> None:
        """
        Replace a lost worker, and have its requests answered by the others. A request that was lost with
        too many workers is set aside.

        Raises:
            [`~aries.children.ChildError`]: as many were set aside as were answered, so the requests are not the cause.
        """
        others = len(self._ready()) - (place.dtype is not None)
        first_line = str(error).strip().splitlines()[0]
        self._note(f"worker {place.number} of Ray is lost ({first_line}); {others} of {len(self._places)} are in use")
        sent, waiting = place.sent, place.waiting
        place.sent, place.waiting = set(), []
        self._start(place)
        for request_id in sorted(sent):
            self._losses[request_id] += 1
            if self._losses[request_id] <= self._config.max_retries:
                waiting.append(request_id)
                continue
            self._given_up += 1
            problem = f"a request of {request_id.partition('/')[0]} was lost with {self._losses[request_id]} workers of Ray ({first_line})"
            if self._given_up > self._answered:
                raise ChildError(
                    f"{problem}. Look at Ray's logs, or raise `generation.max_retries`. What was answered is kept, and the same command "
                    "continues."
                )
            self._note(f"set aside: {problem}")
            self._failed.append(Finished(request_id, "", [], FAILED, None, 0, 0))
        for request_id in waiting:
            self._assign(request_id)
