"""
How answers are generated: embedded vLLM, in a child process that ends with the stage.

In: a job, a JSON file that names the policy and the files of prompts to answer. Out: `answers.jsonl` beside each, one
chain per row. Every new answer appends its chain so far to `answers.jsonl.part`, from which a killed process is continued. Ending the
process is the one sure way to give the GPU's memory back to the trainer. Only `reward_model.py` imports vLLM besides.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import AutoTokenizer
from transformers import GenerationConfig as HFGenerationConfig

from .children import child_main
from .config import DraftsConfig, GenerationConfig, RefinementsConfig
from .disk import writing
from .drafts import encode_prompt, request_seed, stop_token_ids
from .partial_answers import PartialAnswers
from .records import Chain, read_jsonl, read_rows, write_jsonl
from .refinements import Request, Strategy


if TYPE_CHECKING:
    from vllm import SamplingParams


@dataclass
class Task:
    """One file of prompts to answer."""

    prompts: Path
    answers: Path
    strategy: Strategy
    sampling: list[DraftsConfig]  # by turn
    seed: tuple[Any, ...]  # joined by prompt and turn


class Engine(Protocol):
    """What `run_chains` needs: requests in, finished answers out, in any order."""

    def submit(self, chain: Chain) -> bool:
        """Start the chain's next request; `False` if there is none, and the chain is finished."""

    def step(self) -> list[Chain]:
        """Wait for some requests, add their answers to their chains, and return those."""


def run_chains(
    engine: Engine,
    chains: Iterable[Chain],
    window: int,
    on_answer: Callable[[Chain], None],
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
            Chains in progress at once. More than the engine decodes together would only queue.
        on_answer (`Callable`):
            Called with a chain whenever it has a new answer.
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

    active += refill()
    while active:
        for chain in engine.step():
            on_answer(chain)
            if not engine.submit(chain):
                on_finished(chain)
                active -= 1
        active += refill()


class EmbeddedEngine:
    """
    vLLM's `LLM`, whose engine is driven step by step in this process.

    Args:
        model (`str`):
            Path or id of the base model; its tokenizer renders the prompts.
        adapter (`tuple[str, int, str]`, *optional*):
            Name, id and path of the LoRA adapter that all requests use. Both must be new in each round: vLLM may answer
            from stale weights or prefixes under an old one.
        config ([`GenerationConfig`]):
            The recipe's section.
        max_lora_rank (`int`):
            The adapter's rank.
        revision (`str`, *optional*):
            Revision of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model may run its own code.
    """

    def __init__(
        self,
        model: str,
        adapter: tuple[str, int, str] | None,
        config: GenerationConfig,
        max_lora_rank: int,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        # In this process: 5 s to start on a CPU against 34 s, and one process to end
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_kv_cache_gib)

        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {"enforce_eager": config.enforce_eager}
        if current_platform.is_cpu():
            # Seeded sampling of large batches dies on CPU ("CPU Generator does not use offset") unless prompts are
            # prefilled whole and a step can take all of them
            settings = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": config.max_num_seqs * config.max_model_len,
            }
        if config.quantization is None:  # a quantization may have a loader of its own
            settings["load_format"] = "safetensors"
        if adapter is not None:
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank}
        self.llm = LLM(
            model=model,
            revision=revision,
            tokenizer_revision=revision,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            quantization=config.quantization,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # the model's own must not change sampling silently
            trust_remote_code=trust_remote_code,
            seed=0,  # requests bring their own
            disable_log_stats=True,
            **settings,
        )
        self._engine = self.llm.llm_engine
        self._lora = None if adapter is None else LoRARequest(*adapter)
        self._tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        self._stop_token_ids = stop_token_ids(self._tokenizer, _generation_config(model, revision))
        self._max_model_len = config.max_model_len
        self._running: dict[str, tuple[Chain, Request]] = {}  # by request id
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
        request_id = "/".join(map(str, name))
        params = self.sampling_params(sampling, name)
        [prompt] = self._engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
        self._engine.add_request(request_id, prompt, params, lora_request=self._lora)
        self._running[request_id] = (chain, request)
        return True

    def sampling_params(self, sampling: DraftsConfig, name: tuple[Any, ...]) -> "SamplingParams":
        """What a request asks of vLLM; its seed is its task's and its name's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=request_seed(*self._task.seed, *name),
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def step(self) -> list[Chain]:
        advanced = []
        for output in self._engine.step():
            if not output.finished:
                continue
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens or 0
            chain, request = self._running.pop(output.request_id)
            [completion] = output.outputs
            self._task.strategy.add(
                chain, request, completion.text, len(completion.token_ids), completion.finish_reason
            )
            advanced.append(chain)
        return advanced

    def sample_logps(
        self, prompts: list[dict[str, Any]], max_tokens: int, seed: tuple[Any, ...]
    ) -> list[dict[str, Any]]:
        """
        One answer to each prompt with the log-probabilities of its tokens, for the parity check. At temperature 1 and over
        the whole vocabulary, those that it is sampled from are the policy's own. Prompts that are too long are left out.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rows = {}
        for row in prompts:
            token_ids = encode_prompt(self._tokenizer, row["prompt"])
            if len(token_ids) + max_tokens > self._max_model_len:
                continue
            params = SamplingParams(
                temperature=1.0,
                max_tokens=max_tokens,
                logprobs=0,  # the sampled token's alone
                seed=request_seed(*seed, row["prompt_id"]),
                stop_token_ids=self._stop_token_ids,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            [prompt] = self._engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
            self._engine.add_request(row["prompt_id"], prompt, params, lora_request=self._lora)
            rows[row["prompt_id"]] = {"prompt_id": row["prompt_id"], "prompt_token_ids": token_ids}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    [completion] = output.outputs
                    ids = list(completion.token_ids)
                    logps = [step[i].logprob for i, step in zip(ids, completion.logprobs, strict=True)]
                    rows[output.request_id] |= {"token_ids": ids, "logps": logps, "dtype": self.dtype}
        return list(rows.values())

    @property
    def dtype(self) -> str:
        """Data type of the engine's weights, which it may have chosen itself."""
        return str(self._engine.model_config.dtype).removeprefix("torch.")


def _generation_config(model: str, revision: str | None) -> HFGenerationConfig | None:
    try:
        return HFGenerationConfig.from_pretrained(model, revision=revision)
    except OSError:  # the model has none
        return None


def answer_task(engine: EmbeddedEngine, task: Task, window: int, progress: Callable[[int], None]) -> None:
    """Answer a file of prompts, continuing every chain from what a previous process left."""
    answers = PartialAnswers(task.prompts, task.answers)
    with writing(answers.path), open(answers.path, "ab") as file:

        def on_finished(chain: Chain) -> None:
            answers.finish(chain)
            progress(answers.finished)

        engine.start(task)
        run_chains(engine, answers.chains(), window, lambda chain: answers.add(file, chain), on_finished)

    if engine.prompt_tokens:
        share = engine.cached_tokens / engine.prompt_tokens
        print(  # noqa: T201 (into the stage's log)
            f"{task.answers}: {share:.1%} of {engine.prompt_tokens:,} prompt tokens came from the prefix cache"
        )
    answers.close()


def main(job: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    """The child process: one engine start, all tasks of the job."""
    config = GenerationConfig(**job["generation"])
    tasks = [
        Task(
            Path(task["prompts"]),
            Path(task["answers"]),
            Strategy(RefinementsConfig(**task["refinements"]), config.answer_pattern),
            [DraftsConfig(**sampling) for sampling in task["sampling"]],
            tuple(task["seed"]),
        )
        for task in job["tasks"]
        if not Path(task["answers"]).exists()
    ]
    sizes = [sum(1 for _ in read_rows(task.prompts)) for task in tasks]
    progress(0, sum(sizes))
    engine = EmbeddedEngine(
        model=job["model"],
        adapter=tuple(job["adapter"]) if job["adapter"] else None,
        config=config,
        max_lora_rank=job["max_lora_rank"],
        revision=job["revision"],
        trust_remote_code=job["trust_remote_code"],
    )
    # First, so that the batch, and with it the rounding, is the same in a run that continues
    parity = job.get("parity")
    if parity is not None:
        prompts = read_jsonl(Path(parity["prompts"]))[: parity["samples"]]
        rows = engine.sample_logps(prompts, parity["max_tokens"], tuple(parity["seed"]))
        write_jsonl(Path(parity["answers"]), rows)
    for i, task in enumerate(tasks):
        answer_task(engine, task, config.max_num_seqs, lambda done, i=i: progress(sum(sizes[:i]) + done, sum(sizes)))


if __name__ == "__main__":
    child_main(main)
