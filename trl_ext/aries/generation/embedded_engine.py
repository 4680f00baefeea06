"""
How answers are generated: embedded vLLM, in a child process that ends with the stage, vLLM servers (`served_engine.py`), or
embedded vLLM in the workers of a Ray cluster (`ray_engine.py`).

In: a job, a JSON file that names the policy and the files of prompts to answer. Out: `answers.jsonl` beside each (`chains.py`).
Ending the process is the one sure way to give the GPU's memory back to the trainer. Only `reward_model.py` imports vLLM besides.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ...recipe_values import did_you_mean
from ..children import Reporter, child_main
from ..config import DraftsConfig, GenerationConfig, HealthConfig, RefinementsConfig
from ..data.records import read_jsonl, read_rows, write_jsonl
from .chains import EngineSettings, Finished, RequestEngine, Task, TaskEngine, answer_task
from .intake import Intake
from .refinements import Strategy


class EmbeddedEngine(RequestEngine):
    """
    vLLM's `LLM`, whose engine is driven step by step in this process.

    Args:
        settings ([`~aries.generation.chains.EngineSettings`]):
            The policy, and how vLLM is started.
    """

    def __init__(self, settings: EngineSettings):
        super().__init__(settings)
        config, adapter = settings.config, settings.adapter
        self.window = config.max_num_seqs
        # In this process: 5 s to start on a CPU against 34 s, and one process to end
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_kv_cache_gib)

        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"enforce_eager": config.enforce_eager}
        if current_platform.is_cpu():
            # Seeded sampling of large batches dies on CPU ("CPU Generator does not use offset") unless prompts are
            # prefilled whole and a step can take all of them
            options = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": config.max_num_seqs * config.max_model_len,
            }
        if config.quantization is None:  # a quantization may have a loader of its own
            options["load_format"] = "safetensors"
        if adapter is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.max_lora_rank}
        self.llm = LLM(
            model=settings.model,
            revision=settings.revision,
            tokenizer_revision=settings.revision,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            quantization=config.quantization,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # the model's own must not change sampling silently
            trust_remote_code=settings.trust_remote_code,
            seed=0,  # requests bring their own
            disable_log_stats=True,
            **options,
        )
        self._engine = self.llm.llm_engine
        self._lora = None if adapter is None else LoRARequest(*adapter)

    def add(self, request_id: str, token_ids: list[int], settings: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
        [prompt] = self._engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
        self._engine.add_request(request_id, prompt, params, lora_request=self._lora)

    def finished(self) -> list[Finished]:
        found = []
        for output in self._engine.step():
            if not output.finished:
                continue
            [completion] = output.outputs
            ids, logps = list(completion.token_ids), None
            if completion.logprobs is not None:
                logps = [step[i].logprob for i, step in zip(ids, completion.logprobs, strict=True)]
            prompt_tokens, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
            found.append(
                Finished(
                    output.request_id, completion.text, ids, completion.finish_reason, logps, prompt_tokens, cached
                )
            )
        return found

    @property
    def dtype(self) -> str:
        """Data type of the engine's weights, which it may have chosen itself."""
        return str(self._engine.model_config.dtype).removeprefix("torch.")


def quantization_problem(name: str) -> str | None:
    """What is wrong with `generation.quantization`, asked of vLLM and its plugins, or `None`; nothing is started."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import __version__
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        from vllm.plugins import load_general_plugins
    except ImportError:
        return None  # what is not installed is said where the engine starts
    load_general_plugins()
    if name.lower() in QUANTIZATION_METHODS:
        return None
    return (
        f"vLLM {__version__} does not know `{name}`.{did_you_mean(name, QUANTIZATION_METHODS)} It knows "
        f"{', '.join(sorted(QUANTIZATION_METHODS))}; others, such as `bitsandbytes`, are there where a plugin of vLLM brings them."
    )


def main(job: dict[str, Any], report: Reporter) -> None:
    """The child process: one engine start, all tasks of the job."""
    config = GenerationConfig(**job["generation"])
    unanswered = [task for task in job["tasks"] if not Path(task["answers"]).exists()]
    tasks = [
        Task(
            Path(task["prompts"]),
            Path(task["answers"]),
            Strategy(RefinementsConfig(**task["refinements"]), config.answer_pattern, job.get("learn", "answer")),
            [DraftsConfig(**sampling) for sampling in task["sampling"]],
            tuple(task["seed"]),
        )
        for task in unanswered
    ]
    intakes = [make_intake(job, task, report) for task in unanswered]
    sizes = [sum(1 for _ in read_rows(task.prompts)) for task in tasks]
    report(0, sum(sizes))
    settings = EngineSettings(
        model=job["model"],
        config=config,
        adapter=tuple(job["adapter"]) if job["adapter"] else None,
        max_lora_rank=job["max_lora_rank"],
        revision=job["revision"],
        trust_remote_code=job["trust_remote_code"],
    )
    if config.base_urls is not None:
        from .served_engine import ServedEngine

        engine: TaskEngine = ServedEngine(settings, Path(job["probe"]), report.note)
    elif config.engine == "ray":
        from .ray_engine import RayEngine

        engine = RayEngine(settings, report.note)
    else:
        engine = EmbeddedEngine(settings)
    with closing(engine):
        # First, so that the batch, and with it the rounding, is the same in a run that continues
        parity = job.get("parity")
        if parity is not None:
            prompts = read_jsonl(Path(parity["prompts"]))[: parity["samples"]]
            rows = engine.sample_logps(prompts, DraftsConfig(**parity["sampling"]), tuple(parity["seed"]))
            write_jsonl(Path(parity["answers"]), rows)
        for i, task in enumerate(tasks):
            answer_task(engine, task, lambda done, i=i: report(sum(sizes[:i]) + done, sum(sizes)), intakes[i])


def make_intake(job: dict[str, Any], task: dict[str, Any], report: Reporter) -> Intake | None:
    """Too many answers of no use end a round. In an evaluation they are a result, so they are only said. A probe has no bound."""
    if "intake" not in job:
        return None

    def stop(finding: str) -> None:
        raise RecipeError(
            f"generation is stopped: {finding} Do so under another `output_dir`. Or go on with what there is, `--health.max_dropped 0.9`."
        )

    def note(finding: str) -> None:
        report.note(f"evaluation: {finding}")

    drafts = DraftsConfig(**task["sampling"][0])
    health, selection = HealthConfig(**job["intake"]["health"]), job["intake"]["selection"]
    return Intake(health, selection, drafts, note if task["is_evaluation"] else stop)


if __name__ == "__main__":
    child_main(main)
