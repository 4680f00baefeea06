"""
Selection by rule alone, and what keeps it from collapsing. `make evidence-by-rule`.

    python -m docs.evidence.small.by_rule

Out: `by_rule.csv`, a row per run and policy, the tables of its page, and a directory of runs, which `aries.py` makes and measures. A
second call goes on with the runs that are missing.
"""

from pathlib import Path

from . import aries
from .refining_stays import DEFAULT, HOT, run_arms


RULE = {"selection": "rule_based"}
THREE = RULE | {"agreement": 3, "settled_similarity": 1.0}  # of twelve digits, one wrong makes a list wrong
CHANGED = {"min_changed": 0.95, "guard": "skip"}
APART = {"drafts": {"temperature": 1.5}, "refinements": {"temperature": 0.5}}
ARMS = {
    "by rule": {"pairs": RULE},
    "three agree": {"pairs": THREE},
    "three agree, hot drafts": {"pairs": THREE} | HOT,
    "less changed, skipped": {"pairs": RULE | CHANGED, "scores": {}},  # without scores, only the rule can see anything
    "hot drafts, cold refinements": {"pairs": RULE} | APART,
}
aries.ALL_METHODS |= ARMS


if __name__ == "__main__":
    run_arms(__doc__, {"sorting": [DEFAULT, *ARMS]}, Path(__file__).with_suffix(".csv"))
