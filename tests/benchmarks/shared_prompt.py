"""
What a step costs when the prompt of a pair is computed once: `make bench`. Writes `docs/benchmarks/shared_prompt.csv` and `.md`.

Side by side, at four ratios of prompt to answer: `trl.DPOTrainer`, and `TDPOTrainer` and `SelfRefineDPOTrainer` without and with
`share_prompt`. Beside each measured ratio stands the one that counting FLOP gives.
"""

from collections.abc import Iterator

from trl import DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers.self_refine_dpo_config import REFINEMENT_PROMPT

from .steps import HEAD_GEMMS, Contestant, Shape, benchmark, measure


SHARED = {"share_prompt": True}
CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer, completions_only=True),
    "TDPOTrainer": Contestant(TDPOTrainer, TDPOConfig),
    "TDPOTrainer, share_prompt": Contestant(TDPOTrainer, TDPOConfig, SHARED),
    "SelfRefineDPOTrainer": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig),
    "SelfRefineDPOTrainer, share_prompt": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig, SHARED),
}
# Wide for its depth, so that attention is a small part, as in the models that are trained; answers end with EOS
SHAPES = [Shape(4096, 768, 2, 1, prompt, 127) for prompt in (64, 128, 256, 512)]
CASES = [*((shape, True) for shape in SHAPES), (SHAPES[2], False)]  # LoRA; trained weights at 2 : 1


def step_flop(contestant: Contestant, shape: Shape, *, lora: bool) -> float:
    """FLOP of a step per pair, with gradient checkpointing, by arithmetic (docs/shared_prompt.md, When it pays)."""
    prompt, answer = shape.prompt_tokens, shape.answer_tokens + 1
    config = shape.config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size)

    def forward(tokens: float, seen: float, times: float = 1, attention_times: float | None = None) -> float:
        attention_times = times if attention_times is None else attention_times
        return times * 2 * weights * tokens + attention_times * 4 * hidden * layers * seen

    if contestant.options:
        # SDPA computes the half of a causal square, and all of a mask, which the rejected answer has
        tokens, seen = prompt + 2 * answer, (prompt + answer) ** 2 / 2 + answer * (prompt + answer)
    else:
        tokens, seen = 2 * (prompt + answer), (prompt + answer) ** 2  # two causal halves
    # The reference, the policy, its layers once more for the backward, and the gradients of activations and weights. Attention's
    # backward computes the scores again beside its four products
    flop = forward(tokens, seen, times=4 if lora else 5, attention_times=3 + 2.5)
    if contestant.trainer_class is SelfRefineDPOTrainer:
        prefix = len(REFINEMENT_PROMPT.split())
        seen = prompt * (prefix + prompt) + 2 * answer * (prefix + prompt + answer)
        flop += forward(prefix / shape.pairs + prompt + 2 * answer, seen, times=2)
    gemms = HEAD_GEMMS[contestant.trainer_class.__name__] + (0 if lora else 1)
    return flop + gemms * 2 * 2 * answer * shape.vocabulary * hidden


def with_predictions(measured: list[dict], shape: Shape, lora: bool) -> list[dict]:
    """The measured rows of a shape, in the table's columns: each ratio beside the one by arithmetic."""
    flop = {name: step_flop(contestant, shape, lora=lora) for name, contestant in CONTESTANTS.items()}
    ratio = {row["trainer"]: row["ratio"] for row in measured}
    rows = []
    for row in measured:
        name = row["trainer"]
        unshared = name.removesuffix(", share_prompt")
        rows.append(
            {
                "P": shape.prompt_tokens,
                "R": shape.answer_tokens + 1,
                **{key: row[key] for key in ("weights", "trainer", "seconds", "ratio")},
                "predicted": round(flop[name] / flop["DPOTrainer"], 3),
                "to unshared": round(ratio[name] / ratio[unshared], 3),
                "to unshared, predicted": round(flop[name] / flop[unshared], 3),
                **{key: row[key] for key in ("head GEMMs", "peak MiB", "peak ratio")},
            }
        )
    return rows


TEXT = (
    "Gradient checkpointing is on (TRL's default). P and R are the tokens of prompt and answer. A step is loss and gradients. `ratio` "
    "is the median over the repeats of its time to that of `trl.DPOTrainer` with its head on the completions only, as on a GPU; "
    "`to unshared` compares with the same trainer without `share_prompt`. The predictions count matrix products "
    "([shared_prompt.md](../shared_prompt.md#when-it-pays)). `peak` is what a step allocates. All rows have one length, so the "
    "unshared trainers need no mask."
)


def measured(repeats: int) -> Iterator[list[dict]]:
    for shape, lora in CASES:
        yield with_predictions(
            measure(CONTESTANTS, shape, lora=lora, repeats=repeats, checkpointing=True), shape, lora
        )


def main() -> None:
    benchmark(__doc__, "shared_prompt", "A step with the prompt of a pair computed once", TEXT, 5, measured)


if __name__ == "__main__":
    main()
