"""
Keys of RLHFlow's iterative DPO (Online-RLHF, Online-DPO-R1), from its `dpo_iteration/run_dpo.py`.

Its data are answers with rewards, from which the script makes pairs. Its recipes for SFT and reward models are axolotl's.
"""

from typing import Any

from .projects import UNUSED, Migration, Project


GENERATION = ("ports", "eos_ids", "my_world_size", "local_index", "K", "dataset_name_or_path")
NOT_NEEDED = ("margin_scale", "len_penalty", "eos_padding", "eot_token", "mask_prompt")
# Code that makes the pairs of `choose_type: max_min` from the file {source}: the best answer against the worst
PAIRS = (
    "datasets.load_dataset('json', data_files={source!r}, split='train').filter(lambda row: max(row['rewards']) > min(row['rewards']))"
    ".map(lambda row: (lambda a: {{'chosen': a[-1][1], 'rejected': a[0][1]}})(sorted(zip(row['rewards'], row['responses']))))"
    ".select_columns(['prompt', 'chosen', 'rejected']).to_json('pairs.jsonl')"
)


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """The purpose of a recipe that does not train, and the evidence for it."""
    generates = [key for key in GENERATION if key in old]
    return ("generation", f"`{generates[0]}`") if generates and "train_dir" not in old else None


def step(old: dict[str, Any], migration: Migration) -> None:
    source, choose_type = old.pop("train_dir", "..."), old.pop("choose_type", "max_random")
    if old.get("eval_dir") == source:
        del old["eval_dir"]
        migration.recipe["test_split_size"] = 100
        migration.changes.append(
            "`eval_dir` -> `test_split_size: 100`: RLHFlow evaluates on 100 rows of the training data"
        )
    migration.recipe["dataset_name"] = "pairs.jsonl"
    migration.problems.append(
        f"`train_dir: {source}`: answers with rewards, from which RLHFlow makes pairs by `choose_type: {choose_type}`. Make pairs.jsonl from them; "
        f"for `max_min`: `{PAIRS.format(source=source)}` (`a[-2]` is the second best). `trl-ext aries run` replaces the whole loop."
    )


RLHFLOW = Project(
    name="RLHFlow",
    marks=frozenset(("train_dir", "eval_dir", "choose_type", "ref_model", *NOT_NEEDED, *GENERATION)),
    method=method,
    step=step,
    keys=dict.fromkeys(NOT_NEEDED, UNUSED),
    values={},
    advice={"max_training_samples": "add `.select(range(...))` to the code that makes the pairs"},
    types={"train_dir": str, "choose_type": str},
    defaults={"dtype": "bfloat16", "learning_rate": 5.0e-5},
)
