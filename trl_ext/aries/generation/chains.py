"""
Chains of requests: each goes on by itself, from the question to its last refinement, on whatever engine answers.

In: a file of prompts, and an engine. Out: `answers.jsonl`, one chain per row. Every new answer appends its chain so far to
`answers.jsonl.part`, from which a killed process is continued. The engines have modules of their own; what they share, a
request's token ids, seed and sampling, is here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer
from transformers import GenerationConfig as HFGenerationConfig

from ..config import DraftsConfig, GenerationConfig
from ..data.disk import writing
from ..data.records import Chain, write_atomically
from .drafts import encode_prompt, request_seed, stop_token_ids
from .intake import Intake
from .partial_answers import PartialAnswers
from .refinements import Request, Strategy


@dataclass
class Task:
    """One file of prompts to answer."""

    prompts: Path
    answers: Path
    strategy: Strategy
    sampling: list[DraftsConfig]  # by turn
    seed: tuple[Any, ...]  # joined by prompt and turn
    intake: Intake | None = None


class Engine(Protocol):
    """What [`run_chains`] needs: requests in, finished answers out, in any order."""

    def submit(self, chain: Chain) -> bool:
        """Start the chain's next request; `False` if there is none, and the chain is finished."""

    def step(self) -> list[Chain]:
        """Wait for some requests, add their answers to their chains, and return those."""


def run_chains(
    engine: Engine,
    chains: Iterable[Chain],
    window: int,
    on_answers: Callable[[list[Chain]], None],
    on_finished: Callable[[Chain], None],
) -> None:
    """
    Advance every chain on its own: no barrier at which a batch waits for its longest answer, and a prompt's prefix is
    still in the cache when its refinement arrives.

    Args:
        engine ([`Engine`]):
            Answers requests.
        chains (iterable of [`Chain`]):
            Chains, new or begun; drawn when there is room.
        window (`int`):
            Chains in progress at once. More than the engine decodes together would only wait.
        on_answers (`Callable`):
            Called with the chains that a step of the engine has added to, before any of them asks for more.
        on_finished (`Callable`):
            Called with each finished chain.
    """
    waiting = iter(chains)
    active = 0

    def refill() -> int:
        started = 0
        while active + started < window and (chain := next(waiting, None)) is not None:
            if engine.submit(chain):
                started += 1
            else:
                on_finished(chain)
        return started

    def go_on(advanced: list[Chain]) -> int:
        on_answers(advanced)
        finished = 0
        for chain in advanced:
            if not engine.submit(chain):
                on_finished(chain)
                finished += 1
        return finished

    active += refill()
    while active:
        # In a function, so that no finished chain is held while the next ones are drawn
        active -= go_on(engine.step())
        active += refill()


@dataclass
class EngineSettings:
    """
    The policy that an engine answers with, and how it is started.

    Args:
        model (`str`):
            Path or id of the base model; its tokenizer renders the prompts.
        config ([`GenerationConfig`]):
            The recipe's section.
        adapter (`tuple[str, int, str]`, *optional*):
            Name, id and path of the LoRA adapter that all requests use. Name and id must be new in each round: under old ones
            vLLM may answer from stale weights or prefixes.
        max_lora_rank (`int`, *optional*, defaults to `16`):
            The adapter's rank.
        revision (`str`, *optional*):
            Revision of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model may run its own code.
    """

    model: str
    config: GenerationConfig
    adapter: tuple[str, int, str] | None = None
    max_lora_rank: int = 16
    revision: str | None = None
    trust_remote_code: bool = False


class TaskEngine:
    """
    What the engines share: a chain's next request, as token ids with a sampling and a seed, and its answer.

    Args:
        settings ([`EngineSettings`]):
            The policy, and how the engine is started.
    """

    window: int  # chains in progress
    dtype: str  # of the weights

    def __init__(self, settings: EngineSettings):
        model, revision = settings.model, settings.revision
        self._tokenizer = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=settings.trust_remote_code
        )
        self._stop_token_ids = stop_token_ids(self._tokenizer, _generation_config(model, revision))
        self._max_model_len = settings.config.max_model_len
        self._task: Task | None = None
        self.prompt_tokens = self.cached_tokens = 0  # of the task

    def start(self, task: Task) -> None:
        """Answer this task's prompts from now on."""
        self._task = task
        self.prompt_tokens = self.cached_tokens = 0

    def submit(self, chain: Chain) -> bool:
        request = self._task.strategy.next_request(chain)
        if request is None:
            return False
        sampling = self._task.sampling[request.turn - 1]
        token_ids = encode_prompt(self._tokenizer, request.prompt)
        if len(token_ids) + sampling.max_tokens > self._max_model_len:
            chain.stopped = "prompt_too_long"
            return False
        name = (chain.prompt_id, request.turn, *(("critique",) if request.is_critique else ()))
        self._send(chain, request, token_ids, sampling, name)
        return True

    def _send(
        self, chain: Chain, request: Request, token_ids: list[int], sampling: DraftsConfig, name: tuple[Any, ...]
    ) -> None:
        """Have a request answered; [`Engine.step`] returns its chain."""
        raise NotImplementedError

    def request_settings(self, sampling: DraftsConfig, name: tuple[Any, ...]) -> dict[str, Any]:
        """Sampling of a request, in the keys that vLLM's `SamplingParams` and its servers share. The seed is made of the task's and `name`."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_tokens,
            "seed": request_seed(*self._task.seed, *name),
            **self._stops(sampling),
        }

    def _stops(self, sampling: DraftsConfig) -> dict[str, Any]:
        """What ends an answer: the model's EOS tokens, and what the recipe adds."""
        ids = sorted({*self._stop_token_ids, *(sampling.stop_token_ids or ())})
        return {"stop_token_ids": ids} | ({"stop": sampling.stop} if sampling.stop else {})

    def sample_requests(
        self, prompts: list[dict[str, Any]], sampling: DraftsConfig, seed: tuple[Any, ...]
    ) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
        """
        Id, token ids and settings of requests for the parity check, without prompts that are too long. They end as drafts do. At
        temperature 1 and over the whole vocabulary, answers are sampled from the policy's own log-probabilities.
        """
        for row in prompts:
            token_ids = encode_prompt(self._tokenizer, row["prompt"])
            if len(token_ids) + sampling.max_tokens <= self._max_model_len:
                settings = {"temperature": 1.0, "max_tokens": sampling.max_tokens, **self._stops(sampling)}
                settings |= {"logprobs": 0, "seed": request_seed(*seed, row["prompt_id"])}  # the sampled token's alone
                yield row["prompt_id"], token_ids, settings

    def close(self) -> None:
        """Release what would outlive the process."""


FAILED = "error"


@dataclass
class Finished:
    """What vLLM answered to a request; nothing if `finish_reason` is [`FAILED`]."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logps: list[float] | None  # of its tokens, if the request asked for them
    prompt_tokens: int
    cached_tokens: int


class RequestEngine(TaskEngine):
    """What the engines that run vLLM in our own processes share: requests go in by id and come out finished."""

    def __init__(self, settings: EngineSettings):
        super().__init__(settings)
        self._running: dict[str, tuple[Chain, Request]] = {}  # by request id

    def add(self, request_id: str, token_ids: list[int], settings: dict[str, Any]) -> None:
        """Take a request, with the settings of vLLM's `SamplingParams`."""
        raise NotImplementedError

    def finished(self) -> list[Finished]:
        """Work for a while, and return what is finished."""
        raise NotImplementedError

    def _send(
        self, chain: Chain, request: Request, token_ids: list[int], sampling: DraftsConfig, name: tuple[Any, ...]
    ) -> None:
        request_id = "/".join(map(str, name))
        self._running[request_id] = (chain, request)
        self.add(request_id, token_ids, self.request_settings(sampling, name))

    def step(self) -> list[Chain]:
        advanced = []
        for found in self.finished():
            self.prompt_tokens += found.prompt_tokens
            self.cached_tokens += found.cached_tokens
            chain, request = self._running.pop(found.request_id)
            if found.finish_reason == FAILED:
                self._task.strategy.give_up(chain, request)
                advanced.append(chain)
                continue
            self._task.strategy.add(chain, request, found.text, len(found.token_ids), found.finish_reason)
            advanced.append(chain)
        return advanced

    def sample_logps(
        self, prompts: list[dict[str, Any]], sampling: DraftsConfig, seed: tuple[Any, ...]
    ) -> list[dict[str, Any]]:
        rows = {}
        for prompt_id, token_ids, settings in self.sample_requests(prompts, sampling, seed):
            self.add(prompt_id, token_ids, settings)
            rows[prompt_id] = {"prompt_id": prompt_id, "prompt_token_ids": token_ids}
        waiting = set(rows)
        while waiting:
            for found in self.finished():
                waiting.remove(found.request_id)
                if found.finish_reason == FAILED:
                    del rows[found.request_id]
                    continue
                answer = {"token_ids": found.token_ids, "logps": found.logps, "dtype": self.dtype}
                rows[found.request_id] |= answer
        return list(rows.values())


def _generation_config(model: str, revision: str | None) -> HFGenerationConfig | None:
    try:
        return HFGenerationConfig.from_pretrained(model, revision=revision)
    except OSError:  # the model has none
        return None


def answer_task(engine: TaskEngine, task: Task, progress: Callable[[int], None]) -> None:
    """Answer a file of prompts, continuing every chain from what a previous process left."""
    part, intake = task.answers.with_name(task.answers.name + ".part"), task.intake
    with writing(part), open(part, "ab+") as file:
        answers = PartialAnswers(task.prompts, part, file)

        def on_finished(chain: Chain) -> None:
            answers.finish(chain)
            progress(answers.finished)
            if intake is not None:
                intake.look(chain)

        engine.start(task)
        chains = answers.chains() if intake is None else intake.begun(answers.chains())
        run_chains(engine, chains, engine.window, answers.add, on_finished)
        if engine.prompt_tokens:
            share = engine.cached_tokens / engine.prompt_tokens
            print(  # noqa: T201 (into the stage's log)
                f"{task.answers}: {share:.1%} of {engine.prompt_tokens:,} prompt tokens came from the prefix cache"
            )
        write_atomically(task.answers, answers.final_lines())
    part.unlink()
