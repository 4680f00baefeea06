"""
Selection by rule alone, and what keeps it from collapsing. `make evidence-by-rule`.

    python -m docs.evidence.small.by_rule

Out: `by_rule.csv`, a row per run and policy, the tables of its page, and a directory of runs, which `aries.py` makes and measures. A
second call goes on with the runs that are missing.
"""

from pathlib import Path

from . import aries
from .refining_stays import DEFAULT, HOT, run_arms


EXACT = {"selection": "rule_based", "settled_similarity": 1.0}  # a list of digits is right as a whole or not at all
THREE = EXACT | {"agreement": 3}
ARMS = {
    "by rule": aries.METHODS["by rule"],
    "three agree": {"pairs": THREE},
    "three agree, most changed": {"pairs": THREE | {"min_changed": 0.65, "guard": "skip"}},
    "three agree, hot drafts": {"pairs": THREE} | HOT,
}
TASKS = {task: [DEFAULT, *ARMS] for task in ("sorting", "editing")}
aries.ALL_METHODS |= ARMS


if __name__ == "__main__":
    run_arms(__doc__, TASKS, Path(__file__).with_suffix(".csv"))
