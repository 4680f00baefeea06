"""
What keeps refining alive: other refinement rows, other drafts, another weight. `make evidence-refining`.

    python -m docs.evidence.small.refining_stays --seeds 3

In: seeds. Out: `refining_stays.csv`, a row per run and policy, the tables of its page, and a directory of runs, which `aries.py` makes and
measures. So "default" is its "ARIES, DPO", with the same data and SFT model. A second call goes on with the runs that are missing.
"""

import argparse
from itertools import product
from pathlib import Path

import torch

from ..tables import cell, grouped, table, write
from . import aries


HERE = Path(__file__).parent
DEFAULT = aries.FIRST
HOT = {"drafts": {"temperature": 1.5}, "refinements": {"temperature": 1.0}}
MORE = {"pairs": {"refinement_weight": 4}}  # the quickstart's direct weight is 2
TWICE = {"training": {"num_train_epochs": 4}}  # nearly as much training as MORE
SQUARED = {"training": {"objective": "squared", "objective_alpha": 0.941}}
SQUARED_TWICE = {"training": SQUARED["training"] | TWICE["training"]}
EARLIER = {"pairs": {"earlier_rounds": 2}}
ROLLED_BACK = {"health": {"on_setback": "roll_back"}}
# What an arm's recipe changes in the quickstart's, by section
ARMS = {
    DEFAULT: {},
    "rejected drafts": {"pairs": {"drafts": "rejected"}},
    "neighbors": {"pairs": {"refinement_rows": "neighbors"}},
    "neighbors, rejected drafts": {"pairs": {"refinement_rows": "neighbors", "drafts": "rejected"}},
    "both": {"pairs": {"refinement_rows": "both"}},
    "squared, 4 to 1": {"training": {"objective": "squared", "objective_alpha": 0.8}},
    "squared, 16 to 1": SQUARED,
    "squared, 16 to 1, twice the epochs": SQUARED_TWICE,
    "squared, 32 to 1, twice the epochs": {"training": SQUARED_TWICE["training"] | {"objective_alpha": 0.97}},
    "hot drafts": HOT,
    "earlier rounds": EARLIER,
    "earlier rounds, twice the epochs": EARLIER | TWICE,
    "more refining": MORE,
    "hot drafts, more refining": HOT | MORE,
    "twice the epochs": TWICE,
    "more refining, twice the epochs, rolled back": MORE | TWICE | ROLLED_BACK,
    "refining only": {"pairs": {"direct_weight": 0}},
}
# For the task whose rounds lose
ROLLED_BACK_ARMS = {
    "squared, 16 to 1, twice the epochs, rolled back": SQUARED_TWICE | ROLLED_BACK,
    "more refining, rolled back": MORE | ROLLED_BACK,
    "twice the epochs, rolled back": TWICE | ROLLED_BACK,
    "earlier rounds, twice the epochs, rolled back": EARLIER | TWICE | ROLLED_BACK,
}
# An exact verifier sees no step of an edit but the last
PARTIAL_ARMS = {
    "neighbors, partial scores": ARMS["neighbors"] | aries.PARTIAL,
    "best answers, only neighbors, partial scores": {
        "pairs": {"refinement_rows": "neighbors", "direct_weight": 0},
        **aries.METHODS["best answers"],
        **aries.PARTIAL,
    },
}
TASKS = {
    "sorting": [*ARMS],
    "editing": [
        DEFAULT,
        "rejected drafts",
        "squared, 16 to 1",
        "hot drafts",
        "earlier rounds",
        "earlier rounds, twice the epochs",
        "more refining",
        "twice the epochs",
        *ROLLED_BACK_ARMS,
        "refining only",
        "ARIES, partial scores",
        *PARTIAL_ARMS,
    ],
}
aries.ALL_METHODS |= ARMS | ROLLED_BACK_ARMS | PARTIAL_ARMS


def answers_table(rows: list[dict]) -> str:
    """Answers by round, in %, and the rows of all three rounds."""
    head = ["", "seeds", "answer", "SFT", "round 1", "round 2", "round 3", "training rows"]
    lines = []
    for (method,), group in grouped(rows, "method").items():
        seeds = len({row["seed"] for row in group})
        trained = sum(row["rows"] for row in group if row["round"] > 0) / seeds
        for answer in ("y1", "y2", "y4"):
            by_round = [[100 * row[answer] for row in group if row["round"] == number] for number in range(4)]
            name = method.replace(DEFAULT, "default").replace("ARIES, partial", "default, partial")
            last = f"{trained:,.0f}" if answer == "y1" else ""
            lines.append([name, str(seeds), answer, *(cell(values, 1) for values in by_round), last])
    return table(head, lines)


def run_arms(description: str, tasks: dict[str, list[str]], output: Path) -> None:
    """The command of an experiment: runs of some arms beside the default, measured, as rows of `output` and as tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=[*tasks])
    parser.add_argument("--methods", nargs="*", help="run only these, and the default")
    parser.add_argument("--root", type=Path, default=Path("runs/evidence"), help="where the runs are")
    parser.add_argument("--output", type=Path, default=output)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict] = []
    for seed, task in product(range(args.seeds), args.tasks):
        for method in tasks[task]:
            # What an earlier call has run is in the tables too
            if (
                args.methods is None
                or method in (DEFAULT, *args.methods)
                or aries.measured(task, method, seed, args.root).exists()
            ):
                rows += aries.run(task, method, seed, args.root)
                write(sorted(rows, key=aries.place), args.output)
                print(
                    {key: rows[-1][key] for key in ("task", "method", "seed", "round", "y1", "y2", "y4")}, flush=True
                )
    for task in args.tasks:
        of_task = [row for row in sorted(rows, key=aries.place) if row["task"] == task]
        print(f"\n## {task.capitalize()}\n\n{answers_table(of_task)}")


if __name__ == "__main__":
    run_arms(__doc__, TASKS, HERE / "refining_stays.csv")
