"""
How answers are generated: embedded vLLM, in a child process that ends with the stage, or vLLM servers (`served_engine.py`).

In: a job, a JSON file that names the policy and the files of prompts to answer. Out: `answers.jsonl` beside each (`chains.py`).
Ending the process is the one sure way to give the GPU's memory back to the trainer. Only `reward_model.py` imports vLLM besides.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chains import Task, TaskEngine, answer_task
from .children import Reporter, child_main
from .config import DraftsConfig, GenerationConfig, RefinementsConfig
from .records import Chain, read_jsonl, write_jsonl
from .refinements import Request, Strategy
from .served_engine import ServedEngine


if TYPE_CHECKING:
    from vllm import SamplingParams


class EmbeddedEngine(TaskEngine):
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
        super().__init__(model, config, revision, trust_remote_code)
        self.window = config.max_num_seqs
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
        self._running: dict[str, tuple[Chain, Request]] = {}  # by request id

    def _send(
        self, chain: Chain, request: Request, token_ids: list[int], sampling: DraftsConfig, name: tuple[Any, ...]
    ) -> None:
        request_id = "/".join(map(str, name))
        self._add(request_id, token_ids, self.sampling_params(sampling, name))
        self._running[request_id] = (chain, request)

    def _add(self, request_id: str, token_ids: list[int], params: "SamplingParams") -> None:
        [prompt] = self._engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
        self._engine.add_request(request_id, prompt, params, lora_request=self._lora)

    def sampling_params(self, sampling: DraftsConfig, name: tuple[Any, ...]) -> "SamplingParams":
        """What a request asks of vLLM."""
        return final_only(self.request_settings(sampling, name))

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
        rows = {}
        for prompt_id, token_ids, settings in self.sample_requests(prompts, max_tokens, seed):
            self._add(prompt_id, token_ids, final_only(settings))
            rows[prompt_id] = {"prompt_id": prompt_id, "prompt_token_ids": token_ids}
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


def final_only(settings: dict[str, Any]) -> "SamplingParams":
    """vLLM's parameters of a request whose answer is wanted whole."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)


def main(job: dict[str, Any], report: Reporter) -> None:
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
    sizes = [len(read_jsonl(task.prompts)) for task in tasks]
    report(0, sum(sizes))
    settings = {
        "model": job["model"],
        "adapter": tuple(job["adapter"]) if job["adapter"] else None,
        "config": config,
        "max_lora_rank": job["max_lora_rank"],
        "revision": job["revision"],
        "trust_remote_code": job["trust_remote_code"],
    }
    if config.base_urls is None:
        engine: TaskEngine = EmbeddedEngine(**settings)
    else:
        engine = ServedEngine(**settings, probe=Path(job["probe"]), note=report.note)
    with closing(engine):
        # First, so that the batch, and with it the rounding, is the same in a run that continues
        parity = job.get("parity")
        if parity is not None:
            prompts = read_jsonl(Path(parity["prompts"]))[: parity["samples"]]
            rows = engine.sample_logps(prompts, parity["max_tokens"], tuple(parity["seed"]))
            write_jsonl(Path(parity["answers"]), rows)
        for i, task in enumerate(tasks):
            answer_task(engine, task, lambda done, i=i: report(sum(sizes[:i]) + done, sum(sizes)))


if __name__ == "__main__":
    child_main(main)
