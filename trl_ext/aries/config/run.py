"""
A whole ARIES recipe.

The sections `model`, `sft` and `training` hold the keys of TRL's `ModelConfig`, of `SFTConfig` and of the trainer's own config, spelled as
there. `preflight.py` checks them against those classes, which start accelerate when they are constructed; here they stay mappings, and
only the keys that the loop itself reads are checked.
"""

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, field, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from ...recipe_checks import Section, section
from .checks import HealthConfig, ParityConfig
from .data import EvaluationConfig, PromptsConfig
from .generation import DraftsConfig, GenerationConfig, RefinementsConfig, check_room
from .pairs import PairsConfig
from .scores import ScorerConfig, ScoresConfig


# α of the squared objective if the recipe names none: the paper's was not available to us, and two public relatives have this one
OBJECTIVE_ALPHA = 0.8


@section
class ModelKeys(Section):
    """Keys of `model` that the loop reads."""

    model_name_or_path: str
    """A path, or an id on the Hub."""
    lora_r: Annotated[int, Field(le=512)] = 16  # vLLM's bound
    """Rank of the adapter."""


@section
class SftKeys(Section):
    """Keys of `sft` that the loop reads."""

    dataset: str
    """Rows with `prompt`, `completion` and, to teach refining, `draft`. Its split is `train`."""


@section
class LoopConfig(Section):
    """Keys of `training` that are the loop's own, not the trainer's."""

    trainer: Literal["dpo", "tdpo", "self_refine_dpo"] = "dpo"
    """The paper's is DPO; also [`tdpo`](tdpo.md) and [`self_refine_dpo`](self_refine_dpo.md)."""
    reference: Literal["previous", "initial"] = "previous"
    """The policy at the start of the round (our choice, as in the paper's relatives), or `"initial"`: the policy before round 1."""
    objective: Literal["logistic", "squared"] = "logistic"
    """`"logistic"`: every row takes the trainer's loss (our choice). `"squared"` is the paper's, `(1 − α) L_direct + α
    L_refine` with the [squared loss](aries.md#the-squared-objective) on refinement rows."""
    objective_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """α of `"squared"`. Not `alpha`, which is TDPO2's. Default: 0.8, as in two public relatives (our choice). Their refinement
    loss is 4 times ours, so that their weights are those of an α of 16/17, 0.941."""
    accelerate_config: str | None = None
    """A file, or a name such as `ddp` or `fsdp2`, with which this training and the SFT are
    [launched](running_aries.md#several-gpus). Default: one process."""
    num_processes: PositiveInt | None = None
    """Processes of the launched training, one for each GPU. Default: as many as that file says."""

    @property
    def alpha(self) -> float | None:
        """α of `(1 − α) L_direct + α L_refine` for the squared objective, `None` for the logistic one."""
        if self.objective == "logistic":
            return None
        return OBJECTIVE_ALPHA if self.objective_alpha is None else self.objective_alpha

    @model_validator(mode="after")
    def check_launch(self):
        if self.num_processes is not None and self.accelerate_config is None:
            raise ValueError(
                "`training.num_processes` belongs to `training.accelerate_config`. Set that too, for example to ddp."
            )
        return self


LOOP_KEYS = tuple(key.name for key in fields(LoopConfig))


def own_keys(cls: type[Section]) -> Callable[[dict], dict]:
    """Check the keys of a mapping that `cls` has, and leave the mapping as it is."""

    def check(mapping: dict) -> dict:
        cls.from_mapping({key.name: mapping[key.name] for key in fields(cls) if key.name in mapping})
        return mapping

    return check


def at_home(model: dict) -> dict:
    """The section `model`, with `~` in its path as the home directory."""
    return model | {"model_name_or_path": os.path.expanduser(model["model_name_or_path"])}


def check_output_dir(path: str) -> str:
    if not path.strip():
        raise ValueError("is empty. Name a directory for the run, such as runs/my-run.")
    return os.path.expanduser(path)


@section
class AriesConfig(Section):
    """
    An ARIES run (https://huggingface.co/papers/2502.05605): rounds of prompts -> drafts -> refinements -> scores -> pairs
    -> training.
    """

    output_dir: Annotated[str, AfterValidator(check_output_dir)]
    """The [run directory](run_directory.md): one that is empty or not there yet, outside everything that the recipe reads.
    Running the same recipe again continues it."""
    _: KW_ONLY
    model: Annotated[dict[str, Any], AfterValidator(own_keys(ModelKeys)), AfterValidator(at_home)]
    """Keys of TRL's `ModelConfig`: `model_name_or_path`, which is required, `dtype`, `use_peft`, `lora_r`, `load_in_4bit`..."""
    prompts: PromptsConfig
    sft: Annotated[dict[str, Any], AfterValidator(own_keys(SftKeys))] | None = None
    """SFT before round 1: `dataset` (rows with `prompt`, `completion` and optionally `draft`, which makes the row a
    refinement target) and keys of TRL's `SFTConfig`."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    drafts: DraftsConfig = field(default_factory=DraftsConfig)
    refinements: RefinementsConfig = field(default_factory=RefinementsConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    training: Annotated[dict[str, Any], AfterValidator(own_keys(LoopConfig))]
    """Keys of the loop, and keys of the trainer's config (`DPOConfig`, `TDPOConfig` or `SelfRefineDPOConfig`)."""
    evaluation: EvaluationConfig
    parity: ParityConfig = field(default_factory=ParityConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    rounds: PositiveInt = 3
    """Rounds after the SFT; the paper runs about three."""
    seed: NonNegativeInt = 42
    """Seed of the prompt order, of every sampled answer (with the round, the prompt and the turn) and of training
    (unless the section sets its own)."""

    @property
    def loop(self) -> LoopConfig:
        """The loop's own keys of `training`."""
        return LoopConfig(**{key: self.training[key] for key in LOOP_KEYS if key in self.training})

    @property
    def scorers(self) -> dict[str, list[ScorerConfig]]:
        """The scorers by the section that names them: `"scores"`, which select, and `"evaluation.scores"`, which judge, if it is given."""
        judging = self.evaluation.scores
        return {"scores": self.scores.each()} | ({} if judging is None else {"evaluation.scores": judging.each()})

    @property
    def all_scorers(self) -> list[ScorerConfig]:
        return [scorer for section in self.scorers.values() for scorer in section]

    @property
    def judging(self) -> str:
        """The section whose scores the metrics go by."""
        return "scores" if self.evaluation.scores is None else "evaluation.scores"

    @property
    def compares_rounds(self) -> bool:
        """Whether the metrics' scores compare policies: a judge's compare the answers of a chain."""
        judging = self.scorers[self.judging]
        return bool(judging) and all(scorer.judge is None for scorer in judging)

    @property
    def trust_remote_code(self) -> bool:
        return bool(self.training.get("trust_remote_code", False))

    @property
    def trained_on_nf4_sampled_at_full_precision(self) -> bool:
        return bool(self.model.get("load_in_4bit")) and self.generation.quantization is None

    @model_validator(mode="after")
    def check_generation(self):
        if self.seed >= 2**32 - self.rounds:
            raise ValueError(
                "`seed` must be below 2^32, with the number of rounds added: every round adds its number."
            )
        if self.generation.base_urls is not None and not self.model.get("use_peft"):
            raise ValueError(
                "`generation.base_urls`: servers keep the weights they were started with, and full fine-tuning makes new ones in every "
                "round. Train an adapter, `model.use_peft: true`, or leave `base_urls` out."
            )
        check_room(self.generation, self.drafts, self.refinements)
        return self

    @model_validator(mode="after")
    def check_judging(self):
        if self.evaluation.scores is not None and not self.evaluation.scores.each():
            raise ValueError(
                "`evaluation.scores` names neither a `verifier` nor a `reward_model` nor a `judge`. Name one, or leave the section out."
            )
        if self.evaluation.best_turn > self.refinements.turns:
            raise ValueError(
                f"`evaluation.best_turn` ({self.evaluation.best_turn}) is beyond the last answer: `refinements.turns` is {self.refinements.turns}."
            )
        return self

    @model_validator(mode="after")
    def check_setbacks(self):
        if self.health.on_setback != "warn" and not self.compares_rounds:
            raise ValueError(
                f"`health.on_setback: {self.health.on_setback}` needs scores that compare rounds, and "
                + (
                    f"a judge's, of `{self.judging}`, compare the answers of a chain. Name a verifier or a reward model as `evaluation.scores`."
                    if self.scorers[self.judging]
                    else "there are none. Name a scorer as `evaluation.scores`."
                )
            )
        return self

    @model_validator(mode="after")
    def check_selection(self):
        if self.pairs.selection != "rule_based" and not self.scores.each():
            raise ValueError(
                "`scores` names neither a `verifier` nor a `reward_model` nor a `judge`, and best-over-worst pairs need one. Set "
                "`scores.verifier: path/to/file.py:function`, `scores.reward_model`, `scores.judge` or `scores.scorers`, or "
                "`pairs.selection: rule_based`."
            )
        if self.pairs.selection == "rule_based" and self.refinements.strategy == "parallel":
            raise ValueError(
                "`pairs.selection: rule_based` takes the last answer over the first, and with `refinements.strategy: parallel` "
                "they are samples of one prompt. Set `pairs.selection: best_over_worst`, or another strategy."
            )
        if self.pairs.selection == "rule_based" and self.pairs.agreement > max(2, self.refinements.turns - 1):
            raise ValueError(
                f"`pairs.agreement` ({self.pairs.agreement}) takes in the draft, which is rejected: `refinements.turns` is "
                f"{self.refinements.turns}. Have at most {max(2, self.refinements.turns - 1)} refinements agree, or more turns."
            )
        if self.pairs.refinement_rows != "pair" and self.refinements.strategy == "parallel":
            raise ValueError(
                f"`pairs.refinement_rows: {self.pairs.refinement_rows}` compares a draft with the answer that refines it, and with "
                "`refinements.strategy: parallel` none does. Set `pairs.refinement_rows: pair`, or another strategy."
            )
        if self.pairs.learn == "full_text" and self.generation.answer_pattern is None:
            raise ValueError(
                "`pairs.learn: full_text` needs `generation.answer_pattern`, such as '(?s)</think>\\s*(.*)': without it, the answer is "
                "the full text."
            )
        return self

    @model_validator(mode="after")
    def check_objective(self):
        alpha = self.loop.alpha
        if alpha is None and self.loop.objective_alpha is not None:
            raise ValueError(
                "`training.objective_alpha` belongs to `training.objective: squared`. The balance of the logistic objective is "
                "set by `pairs.direct_weight` and `pairs.refinement_weight`."
            )
        if alpha is not None and self.pairs.refinement_weight == 0:
            raise ValueError(
                "`training.objective: squared` is a loss of refinement rows, and `pairs.refinement_weight: 0` leaves them out."
            )
        if alpha not in (None, 1) and self.pairs.direct_weight == 0:
            raise ValueError(
                "`pairs.direct_weight: 0` leaves out the rows of L_direct, whose weight is 1 − `training.objective_alpha`. Set that "
                "to 1.0, or keep the rows."
            )
        return self
