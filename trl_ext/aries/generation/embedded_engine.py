"""
Embedded vLLM: an engine in this process, which gives the GPU's memory back to the trainer only by ending.

In: requests as token ids. Out: finished answers. Besides this module only `scoring/reward_model.py` imports vLLM.
"""

import os
from typing import Any

from ...recipe_values import did_you_mean
from .chains import EngineSettings, Finished, RequestEngine


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

        options: dict[str, Any] = {
            "enforce_eager": config.enforce_eager,
            "kv_cache_memory_bytes": config.gpu_kv_cache_bytes,
        }
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
    """What is wrong with `generation.quantization`, according to vLLM and its plugins, or `None`. Nothing is started."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import __version__
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        from vllm.plugins import load_general_plugins
    except ImportError:
        return None  # the engine's start reports what is not installed
    load_general_plugins()
    if name.lower() in QUANTIZATION_METHODS:
        return None
    return (
        f"vLLM {__version__} does not know `{name}`.{did_you_mean(name, QUANTIZATION_METHODS)} It knows "
        f"{', '.join(sorted(QUANTIZATION_METHODS))}; others, such as `bitsandbytes`, need a vLLM plugin."
    )
