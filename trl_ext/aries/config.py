"""
What an ARIES recipe says, one dataclass per section, in the order of the data.

The sections `model`, `sft` and `training` hold the keys of TRL's `ModelConfig`, of `SFTConfig` and of the trainer's own
config, spelled as there; they are validated against those classes by `preflight.py` and kept as mappings here, since
constructing them starts accelerate.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables


# The largest LoRA rank that vLLM serves
MAX_LORA_RANK = 512

# The paper's refinement template z is not available to us; this one is [house]. `question` is the last user message (or
# the whole plain-text prompt), `draft` the answer to improve, `drafts` all answers so far.
REFINEMENT_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

Write a better answer to the question: keep what is right in the draft, correct what is wrong, and add what is missing. \
Reply with the improved answer only."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class PromptsConfig:
    """
    Prompts to learn from. A row has `prompt` (text, or messages that end with the user's) and any columns that the
    scorer asks for.

    Parameters:
        dataset (`str`):
            A `.jsonl`, `.json` or `.parquet` file, a directory of them, or a dataset id on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        per_round (`int`, *optional*):
            Prompts of a round, all fresh. The paper uses 5,000 to 10,000. Default: the dataset divided by the rounds.
    """

    dataset: str
    split: str = "train"
    per_round: int | None = None

    def __post_init__(self):
        _require(self.per_round is None or self.per_round > 0, "`prompts.per_round` must be positive.")


@dataclass
class GenerationConfig:
    """
    The engine that answers requests: vLLM in a child process, one start per round.

    Parameters:
        max_model_len (`int`, *optional*, defaults to `2048`):
            Longest sequence, prompt and answer together, in tokens.
        max_num_seqs (`int`, *optional*, defaults to `256`):
            Requests decoded together, and chains in progress.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the engine's weights. `"auto"` is vLLM's choice: the checkpoint's, but 16 bits for a float32 one.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory that vLLM may use. It is given back before training.
        cpu_kv_cache_gib (`int`, *optional*, defaults to `2`):
            Memory for the KV cache on a machine without a GPU, in GiB.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model.
        quantization (`str`, *optional*):
            vLLM's quantization of the base model, such as `"bitsandbytes"` (CUDA only).
        enforce_eager (`bool`, *optional*, defaults to `False`):
            Whether to skip compilation and CUDA graphs: a faster start, slower decoding. Always so on a CPU.
    """

    max_model_len: int = 2048
    max_num_seqs: int = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: int = 2
    tensor_parallel_size: int = 1
    quantization: str | None = None
    enforce_eager: bool = False

    def __post_init__(self):
        for name in ("max_model_len", "max_num_seqs", "cpu_kv_cache_gib", "tensor_parallel_size"):
            _require(getattr(self, name) > 0, f"`generation.{name}` must be positive.")
        _require(0 < self.gpu_memory_utilization <= 1, "`generation.gpu_memory_utilization` must be in (0, 1].")


@dataclass
class DraftsConfig:
    """
    Sampling of the first answers, y1. All parameters are passed to vLLM explicitly: a model's own
    `generation_config.json` does not change them.

    Parameters:
        temperature (`float`, *optional*, defaults to `0.7`):
            Sampling temperature. [house] The paper's relatives sample at 0.7.
        top_p (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`):
            Nucleus and top-k sampling; `1.0` and `0` are off.
        max_tokens (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512

    def __post_init__(self):
        _require(self.temperature >= 0, "`temperature` must be at least 0; 0 is greedy.")
        _require(0 < self.top_p <= 1, "`top_p` must be in (0, 1]; 1 is off.")
        _require(self.max_tokens > 0, "`max_tokens` must be positive.")


@dataclass
class RefinementsConfig:
    """
    The chain of self-refinement: `y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context (the paper's best
    strategy). Sampled like the drafts.

    Parameters:
        turns (`int`, *optional*, defaults to `4`):
            Answers of a chain, the draft included: the paper's y1..y4.
        template (`str`, *optional*):
            The refinement template z, in Jinja2, with `question`, `draft` and `drafts`. Default: ours, [house].
    """

    turns: int = 4
    template: str = REFINEMENT_TEMPLATE

    def __post_init__(self):
        _require(self.turns >= 2, "`refinements.turns` must be at least 2: a draft and one refinement.")
        try:
            variables = find_undeclared_variables(Environment().parse(self.template))
        except TemplateSyntaxError as error:
            raise ValueError(f"`refinements.template` is not valid Jinja2: {error}.") from error
        _require(
            bool(variables & {"draft", "drafts"}),
            "`refinements.template` never mentions `draft`, so there is nothing to refine. Write {{ draft }} where the "
            "draft goes.",
        )


@dataclass
class ScoresConfig:
    """
    Who scores the answers: a verifier, a reward model, or nobody where the pairs are rule-based (then the evaluation has
    no scores either, only lengths).

    Parameters:
        verifier (`str`, *optional*):
            `path/to/file.py:function` with TRL's reward-function signature,
            `(prompts, completions, **columns) -> list[float | None]`. Imported from that file only.
        reward_model (`str`, *optional*):
            A sequence-classification model with one output, as a path or Hub id.
        batch_size (`int`, *optional*, defaults to `16`):
            Answers per forward of the reward model.
    """

    verifier: str | None = None
    reward_model: str | None = None
    batch_size: int = 16

    def __post_init__(self):
        _require(
            self.verifier is None or self.reward_model is None,
            "`scores` has both a `verifier` and a `reward_model`. Name one of them.",
        )
        _require(self.batch_size > 0, "`scores.batch_size` must be positive.")


@dataclass
class PairsConfig:
    """
    How chains become preference pairs.

    Parameters:
        selection (`str`, *optional*, defaults to `"best_over_worst"`):
            `"best_over_worst"` (the paper's reward-model scoring: highest score chosen, lowest rejected) or
            `"rule_based"` (no scores: the last refinement chosen, the draft rejected, where the chain has settled;
            the rule is [house]).
        min_margin (`float`, *optional*, defaults to `0.0`):
            The chosen score must exceed the rejected one by more than this.
        min_chosen_score, max_rejected_score (`float`, *optional*):
            Bounds on the scores; with a 0/1 verifier, a margin above 0 already means right over wrong.
        settled_similarity (`float`, *optional*, defaults to `0.9`):
            For `"rule_based"`: the last two answers must be at least this similar (difflib's ratio of their words).
        direct_weight, refinement_weight (`int`, *optional*, defaults to `1`):
            How often an epoch shows a pair's direct row, and each of its two refinement rows (from the rejected and
            from the chosen draft). `0` leaves them out.
    """

    selection: Literal["best_over_worst", "rule_based"] = "best_over_worst"
    min_margin: float = 0.0
    min_chosen_score: float | None = None
    max_rejected_score: float | None = None
    settled_similarity: float = 0.9
    direct_weight: int = 1
    refinement_weight: int = 1

    def __post_init__(self):
        _require(self.min_margin >= 0, "`pairs.min_margin` must be at least 0.")
        _require(0 <= self.settled_similarity <= 1, "`pairs.settled_similarity` must be in [0, 1].")
        _require(
            min(self.direct_weight, self.refinement_weight) >= 0 and self.direct_weight + self.refinement_weight > 0,
            "`pairs.direct_weight` and `pairs.refinement_weight` must be at least 0, and one of them positive.",
        )


@dataclass
class EvaluationConfig:
    """
    Held-out prompts, answered by every round's policy, greedily, with the same chain of refinements.

    Parameters:
        dataset (`str`), split (`str`, *optional*, defaults to `"test"`):
            As in `prompts`.
        samples (`int`, *optional*):
            Use only the first ones.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; `0` is greedy.
    """

    dataset: str
    split: str = "test"
    samples: int | None = None
    temperature: float = 0.0

    def __post_init__(self):
        _require(self.samples is None or self.samples > 0, "`evaluation.samples` must be positive.")
        _require(self.temperature >= 0, "`evaluation.temperature` must be at least 0; 0 is greedy.")


@dataclass
class ParityConfig:
    """
    A check, before a round uses its answers, that they come from the policy: the engine's log-probabilities of answers that it
    samples are compared with the trainer's side. The same answers give the KL to the initial policy.

    Parameters:
        samples (`int`, *optional*, defaults to `64`):
            Answers to evaluation prompts, at temperature 1, in every start of the engine. `0` is no check and no KL. [house]
        tolerance (`float`, *optional*):
            Largest difference in nats per token, as the root mean square. Default: by the engine's data type, 0.01 for
            float32 and 0.2 for 16 bits. [house]
    """

    samples: int = 64
    tolerance: float | None = None

    def __post_init__(self):
        _require(self.samples >= 0, "`parity.samples` must be at least 0; 0 is no check.")
        _require(self.tolerance is None or self.tolerance > 0, "`parity.tolerance` must be positive.")


@dataclass
class AriesConfig:
    """
    An ARIES run (https://huggingface.co/papers/2502.05605): rounds of prompts -> drafts -> refinements -> scores -> pairs
    -> training.

    Parameters:
        output_dir (`str`):
            The run directory. Running the same recipe again continues it.
        model (`dict`):
            Keys of TRL's `ModelConfig`: `model_name_or_path`, `dtype`, `use_peft`, `lora_r`, `load_in_4bit`...
        prompts, generation, drafts, refinements, scores, pairs, evaluation, parity:
            The sections above.
        sft (`dict`, *optional*):
            SFT before round 1: `dataset` (rows with `prompt`, `completion` and optionally `draft`, which makes the row
            a refinement target) and keys of TRL's `SFTConfig`.
        training (`dict`):
            `trainer` (`"dpo"`, `"tdpo"` or `"self_refine_dpo"`), `reference` (`"previous"`, the default and [house], or
            `"initial"`: the policy before round 1), and keys of that trainer's config.
        rounds (`int`, *optional*, defaults to `3`):
            Rounds after the SFT; the paper runs about three.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the prompt order, of every sampled answer and of training (unless the section sets its own).
    """

    output_dir: str
    model: dict[str, Any]
    prompts: PromptsConfig
    evaluation: EvaluationConfig
    training: dict[str, Any]
    sft: dict[str, Any] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    drafts: DraftsConfig = field(default_factory=DraftsConfig)
    refinements: RefinementsConfig = field(default_factory=RefinementsConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    rounds: int = 3
    seed: int = 42

    def __post_init__(self):
        _require(self.rounds > 0, "`rounds` must be positive.")
        _require(
            self.model.get("lora_r", 16) <= MAX_LORA_RANK, f"`model.lora_r`: vLLM serves ranks up to {MAX_LORA_RANK}."
        )
        _require(
            "model_name_or_path" in self.model, "`model.model_name_or_path` is missing: a path, or an id on the Hub."
        )
        _require(
            self.sft is None or "dataset" in self.sft, "`sft.dataset` is missing: rows with `prompt`, `completion`."
        )
        for key, choices in {
            "trainer": ("dpo", "tdpo", "self_refine_dpo"),
            "reference": ("previous", "initial"),
        }.items():
            value = self.training.get(key, choices[0])
            _require(value in choices, f"`training.{key}` must be one of {', '.join(choices)}; got {value!r}.")
        _require(
            self.pairs.selection == "rule_based" or bool(self.scores.verifier or self.scores.reward_model),
            "`scores` names neither a `verifier` nor a `reward_model`, and best-over-worst pairs need one. Set "
            "`scores.verifier: path/to/file.py:function` or `scores.reward_model`, or `pairs.selection: rule_based`.",
        )
        _require(
            self.drafts.max_tokens < self.generation.max_model_len,
            f"`drafts.max_tokens` ({self.drafts.max_tokens}) leaves no room for a prompt in "
            f"`generation.max_model_len` ({self.generation.max_model_len}).",
        )


def loop_settings(config: AriesConfig, number: int) -> dict[str, Any]:
    """
    Keys that a trainer's section may set and otherwise takes from the loop: a seed of the round's own, no progress bars in
    the log, and room for whatever the engine can generate.
    """
    return {"seed": config.seed + number, "disable_tqdm": True, "max_length": config.generation.max_model_len}


def trainer_settings(config: AriesConfig, number: int, output_dir: str) -> dict[str, Any]:
    """
    Trainer of a round and the keys of its config, from the recipe's `training` section.
    """
    settings = {k: v for k, v in config.training.items() if k not in ("trainer", "reference")}
    return {
        "trainer": config.training.get("trainer", "dpo"),
        "config": {**loop_settings(config, number), **settings, "output_dir": output_dir},
    }


def sft_settings(config: AriesConfig, output_dir: str) -> dict[str, Any]:
    """The same of the recipe's `sft` section."""
    settings = {k: v for k, v in config.sft.items() if k != "dataset"}
    return {
        "trainer": "sft",
        "config": {**loop_settings(config, 0), **settings, "output_dir": output_dir},
    }
