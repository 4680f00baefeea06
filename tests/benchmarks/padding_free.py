"""
What a step costs on pairs of real lengths: `make bench`. Writes `docs/benchmarks/padding_free.csv` and `.md`.

Side by side, on batches of 8 pairs: `trl.DPOTrainer`, `TDPOTrainer` with `padding_free`, and with `share_prompt` too, and `SelfRefineDPOTrainer`. The tokens are random; how many there are is HH-RLHF's.
"""

import csv
import random
from collections.abc import Iterator
from pathlib import Path

from trl import DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer

from .steps import HEAD_GEMMS, Contestant, HeadWork, Shape, benchmark, completion_tokens, measure, prepare


# Tokens of the pairs of HH-RLHF's test split "harmless-base" (https://huggingface.co/datasets/Anthropic/hh-rlhf) with Llama 3.1's
# tokenizer, as DPOTrainer sees them: prompt, chosen and rejected with their ends of sequence, and the words with which both answers begin
LENGTHS = Path(__file__).with_name("hh_lengths.csv")
PADDING_FREE = {"padding_free": True}
BOTH = {"padding_free": True, "share_prompt": True}
CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer, completions_only=True),
    "TDPOTrainer, padding_free": Contestant(TDPOTrainer, TDPOConfig, PADDING_FREE),
    "TDPOTrainer, padding_free, share_prompt": Contestant(TDPOTrainer, TDPOConfig, BOTH),
    "SelfRefineDPOTrainer, padding_free, share_prompt": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig, BOTH),
}


def real_lengths(pairs: int) -> list[tuple[int, int, int, int]]:
    """The lengths of some pairs, shuffled, in the columns' order; answers with their ends of sequence."""
    with open(LENGTHS, newline="") as file:
        rows = [tuple(map(int, row.values())) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return rows[:pairs]


def text_lengths(pairs: int) -> list[tuple[int, int, int, int]]:
    """[`real_lengths`] without the ends of sequence, which DPOTrainer adds."""
    return [(prompt, chosen - 1, rejected - 1, alike) for prompt, chosen, rejected, alike in real_lengths(pairs)]


def real_shape(hidden: int, layers: int, batches: int, pairs: int = 8, vocabulary: int = 4096) -> Shape:
    return Shape(vocabulary, hidden, layers, pairs, batches=batches, lengths=text_lengths(pairs * batches))


SHAPE = real_shape(512, 1, batches=2)
# Of so many batches, on a narrower model, whose products are counted: what takes part in them is the same
COUNTED = real_shape(64, 1, batches=16)


def linear_flop(shape: Shape) -> dict[str, int]:
    """FLOP of a step of each in the layers' linear products: all but the head's, whose number docs/tdpo.md derives."""
    _, batches, run = prepare(CONTESTANTS, shape, lora=True, checkpointing=True)
    head = 2 * completion_tokens(batches) * shape.vocabulary * shape.hidden
    found = {}
    for name, contestant in CONTESTANTS.items():
        with HeadWork(shape) as work:
            run(name)
        found[name] = work.all_flop - HEAD_GEMMS[contestant.trainer_class.__name__] * head
    return found


TEXT = (
    "Batches have 8 pairs, with LoRA and gradient checkpointing. The pairs have the lengths of HH-RLHF's "
    "(`tests/benchmarks/hh_lengths.csv`: lengths, no text). `linear FLOP` are the matrix products of the layers, counted on "
    f"{COUNTED.batches} batches. `seconds` is the CPU time for the loss and gradients of {SHAPE.batches} batches, and `time` "
    "the median over the repeats of its ratio to that of `trl.DPOTrainer` with its head on the completions only, as on a GPU. "
    "`peak` is what a step allocates."
)


def measured(repeats: int) -> Iterator[list[dict]]:
    counted = linear_flop(COUNTED)
    yield [
        {
            "trainer": row["trainer"],
            "linear FLOP": round(counted[row["trainer"]] / counted["DPOTrainer"], 3),
            "seconds": row["seconds"],
            "time": row["ratio"],
            "peak MiB": row["peak MiB"],
            "peak": row["peak ratio"],
        }
        for row in measure(CONTESTANTS, SHAPE, lora=True, repeats=repeats, checkpointing=True)
    ]


def main() -> None:
    benchmark(__doc__, "padding_free", "A step on pairs of real lengths", TEXT, 3, measured)


if __name__ == "__main__":
    main()
