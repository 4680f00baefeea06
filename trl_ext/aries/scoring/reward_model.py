"""
A reward model: a sequence-classification model with one output, whose raw value is the score.

In: files of answers. Out: scores appended to the run's cache as they come, so that a killed run continues after the last one. vLLM's
pooling runner computes them, or transformers if vLLM does not know the architecture; both get the same token ids and agree to rounding
errors. vLLM is imported here and in `generation/embedded_engine.py`: the two runners share nothing but the settings of the machine. Only
ending the process gives the memory back, so each reward model has one of its own.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...model_files import load_problem
from ...recipe import RecipeError
from ..config import GenerationConfig, ScorerConfig
from ..data.records import Chain, Prompt, as_completion
from .scores import AnswerScorer, Progress, ScoreCache, ScoreTask, chains_of, content_key


class RewardModel(AnswerScorer):
    """
    A reward model. Its process scores what the cache lacks; the process that adds up the scores finds all of it there.

    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `reward_model`.
        generation ([`~aries.config.GenerationConfig`]):
            How vLLM uses the machine.
    """

    def __init__(self, config: ScorerConfig, generation: GenerationConfig):
        super().__init__(config)
        self.config = config
        self._generation = generation
        self._identity = {
            "reward_model": config.reward_model,
            "revision": config.reward_model_revision,
            "backend": config.reward_model_backend,
            "files": local_files(config.reward_model),
        }

    def keys(self, chain: Chain, columns: dict[str, Any]) -> Iterator[str]:
        return (content_key(self._identity, chain.prompt, answer.text) for answer in chain.answers)

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """Do nothing: the preflight checks the model, in a process that may import transformers."""

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, progress: Progress) -> list[str]:
        missing = dict(self.missing(chains_of(tasks), cache))  # equal answers once
        if not missing:
            return []
        from transformers import AutoConfig, AutoTokenizer

        config, notes = self.config, []
        name, revision = config.reward_model, config.reward_model_revision
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        encoded = {key: encode_answer(tokenizer, chain.prompt, a.text) for key, (chain, a, _) in missing.items()}
        text_config = model_config.get_text_config()
        limit = getattr(text_config, "max_position_embeddings", None)  # some architectures have none
        too_long = [key for key, ids in encoded.items() if limit is not None and len(ids) > limit]
        if too_long:
            cache.add([{"key": key, "score": None} for key in too_long])
            notes.append(f"{name} takes {limit:,} tokens: {len(too_long):,} longer answers have no score")
        # The longest first, so that a lack of memory shows at once
        keys = sorted((key for key in encoded if key not in cache), key=lambda key: -len(encoded[key]))
        texts = [without_padding(encoded[key], text_config.pad_token_id) for key in keys]

        reason = "it was asked for" if config.reward_model_backend == "transformers" else missing_from_vllm(config)
        if config.reward_model_backend == "vllm" and reason is not None:
            raise RecipeError(
                f"`scores.reward_model_backend`: vLLM cannot serve {name}: {reason}. Write `transformers`, or `auto`."
            )
        if config.reward_model_backend == "auto" and reason is not None:
            notes.append(f"{name} is scored by transformers: {reason}")
        if reason is None:
            dtype = str(model_config.dtype or "auto").removeprefix("torch.")  # vLLM's own would be 16 bits for float32
            scores = vllm_scores(config, self._generation, dtype, texts)
        else:
            scores = transformers_scores(config, texts)
        for done, (index, score) in enumerate(scores if keys else (), start=1):
            if not math.isfinite(score):
                raise RecipeError(
                    f"`scores.reward_model`: {name} gives {score} for an answer of {len(texts[index]):,} tokens. Its weights are broken, "
                    "or too large for their data type; what it has scored so far is kept."
                )
            cache.add([{"key": keys[index], "score": score}])
            progress(done, len(keys))
        return notes


def local_files(name: str) -> list[list[Any]] | None:
    """Names, sizes and times of a local model's files: another model at the same path is not the same scorer."""
    if not Path(name).is_dir():
        return None
    files = sorted(path for path in Path(name).iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def check_reward_model(name: str, revision: str | None, conversational: bool) -> None:
    """
    Check the config and the tokenizer of a reward model, without its weights.

    Raises:
        `ValueError`: it has another head, or its tokenizer cannot render the prompts.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(load_problem(name, error)) from error
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has {config.num_labels} outputs, and a reward model has one (`num_labels: 1` in its config). Name "
            "a reward model, or train this one with TRL's `RewardTrainer`."
        )
    # transformers would put a new, random head on anything else
    if not all(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or []):
        raise ValueError(
            f"{name} is a {', '.join(config.architectures)}, and a reward model is a ...ForSequenceClassification. Name a "
            "reward model, or use this one as `scores.judge`, behind a server."
        )
    if conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"the prompts are messages, and the tokenizer of {name} has no chat template. Give it the one that the model "
            "was trained with, or make the prompts plain text."
        )


def encode_answer(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    """Token ids of prompt and answer. A rendered template already holds its special tokens: they are not added twice."""
    completion = as_completion(prompt, text)
    if isinstance(prompt, str):
        return tokenizer(prompt + completion)["input_ids"]
    return tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]


def without_padding(ids: list[int], pad_token_id: int | None) -> list[int]:
    """
    Token ids up to the last one that is not padding, which is where transformers reads a decoder's score. If the
    model has one token for both, transformers takes the EOS that ends a text for padding; vLLM reads the last token whatever it is.

    Example:

    ```python
    >>> without_padding([5, 2, 7, 2, 2], pad_token_id=2)
    [5, 2, 7]
    ```
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end]


def missing_from_vllm(config: ScorerConfig) -> str | None:
    """Why vLLM cannot serve this reward model, or `None` if it can. Nothing is loaded."""
    quiet_vllm()
    try:
        from vllm import EngineArgs
    except ImportError:
        return "vLLM is not installed"
    try:
        EngineArgs(
            model=config.reward_model, revision=config.reward_model_revision, runner="pooling", convert="classify"
        ).create_model_config()
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        return message.partition(" Supported architectures")[0]  # it lists them all
    return None


def quiet_vllm() -> None:
    """vLLM in this process, without its chatter."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def vllm_scores(
    config: ScorerConfig, generation: GenerationConfig, dtype: str, texts: list[list[int]]
) -> Iterator[tuple[int, float]]:
    """Index and score of each text, as they come."""
    quiet_vllm()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(generation.cpu_kv_cache_gib)

    from vllm import EngineArgs, LLMEngine, PoolingParams
    from vllm.platforms import current_platform

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=config.reward_model,
            revision=config.reward_model_revision,
            runner="pooling",
            convert="classify",
            skip_tokenizer_init=True,
            load_format="safetensors",
            dtype=dtype,
            max_model_len=max(map(len, texts)),
            max_num_seqs=generation.max_num_seqs,
            gpu_memory_utilization=generation.gpu_memory_utilization,
            kv_cache_memory_bytes=None if current_platform.is_cpu() else generation.gpu_kv_cache_bytes,
            tensor_parallel_size=generation.tensor_parallel_size,
            enforce_eager=generation.enforce_eager or current_platform.is_cpu(),
            disable_log_stats=True,
        )
    )
    # The logit itself: by default a single output goes through a sigmoid
    params = PoolingParams(task="classify", use_activation=False)
    for index, ids in enumerate(texts):
        [prompt] = engine.renderer.render_cmpl([{"prompt_token_ids": ids}])
        engine.add_request(str(index), prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                yield int(output.request_id), output.outputs.data.item()


def transformers_scores(config: ScorerConfig, texts: list[list[int]]) -> Iterator[tuple[int, float]]:
    """Index and score of each text, batch by batch."""
    import torch
    from transformers import AutoModelForSequenceClassification

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(
        config.reward_model,
        revision=config.reward_model_revision,
        dtype="auto",
        trust_remote_code=False,
        use_safetensors=True,
    )
    model = model.to(device).eval()
    pad_token_id = model.config.get_text_config().pad_token_id
    # Without a padding token the model cannot tell where a text of a batch ends
    batch_size = 1 if pad_token_id is None else config.batch_size
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        longest = max(map(len, batch))
        input_ids = torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=device)
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=mask).logits  # (B, 1)
        yield from enumerate(logits[:, 0].float().tolist(), start=start)
