"""
What an Sr-DPO step costs beside a DPO step: `make bench`. Writes `docs/benchmarks/self_refine_dpo.csv` and `.md`.

Side by side, with and without precomputed references: `trl.DPOTrainer` and `SelfRefineDPOTrainer`, whose prompts are longer by
the paper's refinement prompt; and Sr-DPO computed on whole sequences, without sharing the prompts of a pair.
"""

from collections.abc import Iterator

from trl import DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer

from .steps import Contestant, Shape, benchmark, measure


class WholeSequencesTrainer(SelfRefineDPOTrainer):
    """Sr-DPO with `[p ⊕ x, y]` as one sequence per completion, as the plain pairs are."""

    _caches_prompts = False


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


TEXT = (
    "Gradient checkpointing is on (TRL's default). A step is loss and gradients. `ratio` is the median over the repeats of its "
    "time to that of `trl.DPOTrainer` under the same `precompute_ref_log_probs`; `peak` is what a step allocates. Head GEMMs "
    "are counted in units of 2·N·V·H FLOP (V vocabulary, H hidden, N completion tokens). On a CPU TRL's head projects "
    'every position, including prompt and padding; "completions only" is its path on a GPU. The refinement prompt is '
    "the paper's. Prompts have 256 tokens without it, and answers 255."
)


def measured(repeats: int) -> Iterator[list[dict]]:
    for shape in SHAPES:
        for lora in (True, False):
            for contestants in (CONTESTANTS, PRECOMPUTED_CONTESTANTS):
                yield measure(contestants, shape, lora=lora, repeats=repeats, checkpointing=True)


def main() -> None:
    benchmark(__doc__, "self_refine_dpo", "An Sr-DPO step beside a DPO step", TEXT, 5, measured)


if __name__ == "__main__":
    main()
