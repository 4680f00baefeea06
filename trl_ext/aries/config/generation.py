"""
How answers are generated: the engine, the drafts, and the chain of refinements after each.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ...recipe_checks import Section, Texts, section
from .templates import EVALUATION_TEMPLATE, TEMPLATES, check_evaluation_template, check_refinement_template
from .values import EnvName, OneOrEach, PositiveShare, Share, StopTexts, TopK, check_pattern, check_url


# Sampling parameters that each refinement may have its own value of
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
# What ends an answer, the same for all refinements
STOP_KEYS = ("stop", "stop_token_ids")


def check_urls(urls: list[str]) -> list[str]:
    for url in urls:
        check_url(url)
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise ValueError(f"has {', '.join(twice)} twice. List each server once.")
    if not urls:
        raise ValueError("is empty. List servers, or leave the key out.")
    return urls


@section
class GenerationConfig(Section):
    """
    The engine that answers requests: vLLM in a child process (one start per round), vLLM servers, or workers of a Ray cluster.
    Most runs set the first four keys only.
    """

    max_model_len: PositiveInt = 2048
    """Longest sequence, prompt and answer together, in tokens."""
    max_num_seqs: PositiveInt = 256
    """Most requests decoded together, and most chains in progress."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the engine's weights. `"auto"` is vLLM's choice: the checkpoint's, but 16 bits for a float32 one."""
    gpu_memory_utilization: PositiveShare = 0.9
    """Share of the GPU's memory that vLLM may use. It is given back before training."""
    gpu_kv_cache_gib: PositiveFloat | None = None
    """Memory for the KV cache on a GPU, in GiB. Default: what the rest leaves of `gpu_memory_utilization`. Set it if other
    processes use the same GPU: vLLM measures the rest as it starts, and fails if one of them frees memory meanwhile."""
    cpu_kv_cache_gib: PositiveInt = 2
    """Memory for the KV cache on a machine without a GPU, in GiB."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share the model; see [Limits](aries.md#limits)."""
    quantization: str | None = None
    """vLLM's quantization of the base model, such as `"fp8"` (CUDA only). One that vLLM and its plugins do not know is
    refused before any work. `"bitsandbytes"`, the NF4 of training, needs a plugin: vLLM 0.31 has none of its own."""
    enforce_eager: bool = False
    """Whether to skip compilation and CUDA graphs, for a faster start and slower decoding. Always true on a CPU."""
    answer_pattern: Annotated[str, AfterValidator(check_pattern)] | None = None
    """A regular expression with one group: the part of a generated text that is its answer, which is refined, scored
    and learned, such as `(?s)</think>\\s*(.*)`. A text in which it is not found has no answer. Default: all of the
    text."""
    engine: Literal["vllm", "ray"] = "vllm"
    """`"vllm"` on this machine, or `"ray"`: one engine in each worker of a [Ray cluster](scaling.md#generation-on-ray)."""
    ray_address: str | None = None
    """For `engine: ray`, the cluster's address, such as `auto` on one of its machines. Default: a cluster of this
    machine alone, for the stage."""
    ray_workers: PositiveInt = 1
    """For `engine: ray`, the number of workers, each with `tensor_parallel_size` GPUs."""
    base_urls: Annotated[Texts, AfterValidator(check_urls)] | None = None
    """[vLLM servers](servers.md) that generate instead of the run's own engine, such as
    `[http://localhost:8000/v1]`. They must be able to load adapters, and see the run directory."""
    api_key_env: EnvName | None = None
    """Environment variable that holds the servers' API key. The key itself is never written anywhere."""
    max_concurrency_per_server: PositiveInt = 64
    """Requests in flight on each server."""
    timeout: PositiveFloat = 600.0
    """Seconds until a request to a server counts as failed."""
    max_retries: NonNegativeInt = 5
    """How often a request is sent again, to any server or worker of Ray, before it is set aside. A server that is only
    busy (status 429) is waited for, up to `max_outage`."""
    max_outage: PositiveFloat = 600.0
    """Seconds without any usable server, or worker of Ray, after which the run stops."""

    @property
    def gpu_kv_cache_bytes(self) -> int | None:
        """`gpu_kv_cache_gib` as vLLM wants it."""
        return None if self.gpu_kv_cache_gib is None else int(self.gpu_kv_cache_gib * 2**30)

    @model_validator(mode="after")
    def check_engine(self):
        if self.engine != "ray" and (self.ray_address is not None or self.ray_workers != 1):
            raise ValueError(
                "`generation.ray_address` and `generation.ray_workers` are for `generation.engine: ray`. Set it, or remove them."
            )
        if self.engine == "ray" and self.base_urls is not None:
            raise ValueError("`generation.base_urls` and `generation.engine: ray` are both given. Remove one.")
        return self


@section
class DraftsConfig(Section):
    """
    Sampling of the first answers, y1. All parameters are passed to vLLM explicitly: a model's own `generation_config.json` does
    not change them.
    """

    temperature: NonNegativeFloat = 0.7
    """Sampling temperature; `0` is greedy. Our choice: the paper's relatives sample at 0.7."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling; `1.0` is off."""
    top_k: TopK = 0
    """Top-k sampling; `0` is off."""
    min_p: Share = 0.0
    """Least probability of a token, as a share of the likeliest one's; `0.0` is off."""
    repetition_penalty: PositiveFloat = 1.0
    """Penalty on tokens that are already in the prompt or the answer; `1.0` is off."""
    max_tokens: PositiveInt = 512
    """Longest answer, in tokens."""
    stop: StopTexts | None = None
    """Texts that end an answer and are not part of it, such as `["\\n"]` (in double quotes) for a base model, which
    has not learned where to end."""
    stop_token_ids: list[NonNegativeInt] | None = None
    """Tokens that end an answer, beside the model's own EOS tokens."""


@section
class RefinementsConfig(Section):
    """How the answers after the draft are asked for: the paper's four strategies."""

    strategy: Literal["chain", "parallel", "few_shot", "self_evaluation"] = "chain"
    """`"chain"` (`y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context; the paper's best), `"parallel"`
    (more samples of the prompt itself), `"few_shot"` (all earlier answers in context) or `"self_evaluation"` (the
    policy judges its last answer, and refines it given the critique)."""
    turns: Annotated[int, Field(ge=2)] = 4
    """Answers of a chain, the draft included: the paper's y1..y4."""
    template: OneOrEach[str] | None = None
    """The refinement template z, in Jinja2, with `question`, `draft`, `drafts`, `critique` and `turn`; or a list with one
    for each refinement, of which training rows use the first. Default: [the strategy's](aries_data.md#refinement-templates), in
    `trl_ext/aries/config/templates.py`, in our own words."""
    evaluation_template: str | None = None
    """For `"self_evaluation"`, the template that asks for the critique. Default: our own, in the same file."""
    temperature: OneOrEach[NonNegativeFloat] | None = None
    """Sampling temperature of the refinements. A critique is sampled like the refinement that it is for. Default: the drafts'."""
    top_p: OneOrEach[PositiveShare] | None = None
    """Nucleus sampling. Default: the drafts'."""
    top_k: OneOrEach[TopK] | None = None
    """Top-k sampling. Default: the drafts'."""
    min_p: OneOrEach[Share] | None = None
    """Least probability of a token. Default: the drafts'."""
    repetition_penalty: OneOrEach[PositiveFloat] | None = None
    """Repetition penalty. Default: the drafts'."""
    max_tokens: OneOrEach[PositiveInt] | None = None
    """Longest refinement, in tokens. Default: the drafts'."""
    stop: StopTexts | None = None
    """Texts that end a refinement; with `[]`, only the model's own EOS tokens do. Default: the drafts'."""
    stop_token_ids: list[NonNegativeInt] | None = None
    """Tokens that end a refinement; `[]` as for `stop`. Default: the drafts'."""

    @model_validator(mode="after")
    def check_lengths(self):
        for key in ("template", *SAMPLING_KEYS):
            values = getattr(self, key)
            if isinstance(values, list) and len(values) != self.turns - 1:
                raise ValueError(
                    f"`refinements.{key}` is a list of {len(values)}, and a chain of {self.turns} turns has {self.turns - 1} "
                    "refinements. Give one value for all of them, or one for each."
                )
        return self

    @model_validator(mode="after")
    def check_templates(self):
        self.template = TEMPLATES[self.strategy] if self.template is None else self.template
        for name, template in listed("refinements.template", self.template):
            check_refinement_template(name, template, self.strategy)
        if self.strategy == "self_evaluation":
            self.evaluation_template = (
                EVALUATION_TEMPLATE if self.evaluation_template is None else self.evaluation_template
            )
            check_evaluation_template("refinements.evaluation_template", self.evaluation_template)
        elif self.evaluation_template is not None:
            raise ValueError(
                f"`refinements.evaluation_template` asks for a critique, and `refinements.strategy: {self.strategy}` has none. "
                "Remove it, or set `refinements.strategy: self_evaluation`."
            )
        return self


def listed(name: str, values: Any) -> list[tuple[str, Any]]:
    """The values of a key that takes one or a list, each with its name in the recipe."""
    if isinstance(values, list):
        return [(f"{name}[{index}]", value) for index, value in enumerate(values)]
    return [] if values is None else [(name, values)]


def check_room(generation: GenerationConfig, drafts: DraftsConfig, refinements: RefinementsConfig) -> None:
    """
    Raises:
        [`ValueError`]: an answer may be as long as a whole sequence.
    """
    room = generation.max_model_len
    for name, max_tokens in (
        ("drafts.max_tokens", drafts.max_tokens),
        *listed("refinements.max_tokens", refinements.max_tokens),
    ):
        if max_tokens >= room:
            raise ValueError(
                f"`{name}` ({max_tokens}) leaves no room for a prompt in `generation.max_model_len` ({room})."
            )
