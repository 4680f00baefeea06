"""
What an Sr-DPO step costs beside a DPO step: `make bench`. Writes `docs/benchmarks/self_refine_dpo.csv` and `.md`.

Side by side, with and without precomputed references: `trl.DPOTrainer` and `SelfRefineDPOTrainer`, whose prompts are longer by
the paper's refinement prompt; and Sr-DPO computed on whole sequences, without sharing the prompts of a pair.
"""

from trl import DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer

from .steps import Contestant, Shape, argument_parser, environment, measure, write


class WholeSequencesTrainer(SelfRefineDPOTrainer):
    """Sr-DPO with `[p ⊕ x, y]` as one sequence per completion, as the plain pairs are."""

    _shares_prompts = False


PRECOMPUTED = {"precompute_ref_log_probs": True}
CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer),
    "DPOTrainer, completions only": Contestant(DPOTrainer, completions_only=True),
    "SelfRefineDPOTrainer": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig),
    "without shared prompts": Contestant(WholeSequencesTrainer, SelfRefineDPOConfig, completions_only=True),
}
PRECOMPUTED_CONTESTANTS = {
    "DPOTrainer, precomputed": Contestant(DPOTrainer, options=PRECOMPUTED),
    "DPOTrainer, precomputed, completions only": Contestant(DPOTrainer, options=PRECOMPUTED, completions_only=True),
    "SelfRefineDPOTrainer, precomputed": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig, PRECOMPUTED),
}
# 512 tokens, as in the paper: a body that outweighs the head, and a head that outweighs the body
SHAPES = (Shape(4096, 256, 8, 2, 256, 255), Shape(32000, 256, 4, 2, 256, 255))


def main() -> None:
    args = argument_parser(__doc__, repeats=5).parse_args()
    text = (
        "`make bench` measures this: trainers in turn on copies of one model and on the same pairs, in one process, with "
        "gradient checkpointing (TRL's default). A step is loss and gradients; `ratio` is the median over the repeats of its "
        "time to that of `trl.DPOTrainer` under the same `precompute_ref_log_probs`, `peak` what a step allocates. Head GEMMs "
        "are counted, in units of 2·N·V·H FLOP (V vocabulary, H hidden, N completion tokens). On a CPU TRL's head projects "
        'every position, prompt and padding included; "completions only" is the path it takes on a GPU. The refinement prompt is '
        "the paper's; prompts have 256 tokens without it, answers 255.\n\n" + environment("cpu", "fp32")
    )
    rows = []
    for shape in SHAPES:
        for lora in (True, False):
            for contestants in (CONTESTANTS, PRECOMPUTED_CONTESTANTS):
                rows += measure(contestants, shape, lora=lora, repeats=args.repeats, checkpointing=True)
                write(rows, args.output / "self_refine_dpo", "An Sr-DPO step beside a DPO step", text)


if __name__ == "__main__":
    main()
