"""
Keys of RLHFlow's iterative DPO (Online-RLHF, Online-DPO-R1), and what they are called here. Facts of its `dpo_iteration/run_dpo.py`.

Its data are answers with rewards, of which the script makes pairs; here pairs are made first, or by ARIES. Its recipes of SFT and of
reward models are axolotl's: see `axolotl.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .projects import Project


if TYPE_CHECKING:
    from .convert import Migration


# `choose_type` -> which of the answers, sorted by reward, are chosen and rejected
CHOSEN_AND_REJECTED = {"max_min": (-1, 0), "max_max": (-1, -2)}
GENERATION = ("ports", "eos_ids", "my_world_size", "local_index", "K", "dataset_name_or_path")


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """What a recipe is for that does not train, and what shows it."""
    shown = [key for key in GENERATION if key in old]
    if shown and "train_dir" not in old:
        return "generation", ", ".join(f"`{key}`" for key in shown)
    return None


def pairs_code(source: str, target: str, choose_type: str) -> str:
    """Python that makes preference pairs of RLHFlow's rows `prompt`, `responses`, `rewards`."""
    chosen, rejected = CHOSEN_AND_REJECTED[choose_type]
    return f"""import datasets
def pair(row):
    ranked = [answer for _, answer in sorted(zip(row['rewards'], row['responses']), key=lambda scored: scored[0])]
    as_messages = isinstance(row['prompt'], list)
    answer = lambda text: [{{'role': 'assistant', 'content': text}}] if as_messages else text
    return {{'prompt': row['prompt'], 'chosen': answer(ranked[{chosen}]), 'rejected': answer(ranked[{rejected}])}}
rows = datasets.load_dataset('json', data_files={source!r}, split='train')
rows = rows.filter(lambda row: sorted(row['rewards'])[{chosen}] > sorted(row['rewards'])[{rejected}])
rows.map(pair, remove_columns=rows.column_names).to_json({target!r})"""


def data(old: dict[str, Any], migration: "Migration") -> None:
    source, test = old.pop("train_dir", ""), old.pop("eval_dir", "")
    choose_type = old.pop("choose_type", "max_random")
    if source:
        target = str(Path(source).with_name(f"{Path(source).stem}_pairs.jsonl"))
        migration.recipe["dataset_name"] = target
        what = (
            f"`train_dir: {source}`: its rows are answers with rewards, of which RLHFlow's script makes pairs by `choose_type: "
            f"{choose_type}`"
        )
        if choose_type in CHOSEN_AND_REJECTED:
            code = "\n    ".join(pairs_code(source, target, choose_type).splitlines())
            how = f"Make them with Python:\n    {code}"
        else:
            how = (
                f"Make {target} of them, with `prompt`, `chosen` and `rejected`; `max_min` and `max_max`, the best against the worst or the "
                "second best, come with code here"
            )
        migration.problems.append(f"{what}. `trl-ext aries run` generates, scores, pairs and trains in one. {how}")
    else:
        migration.problems.append(
            "`train_dir`, from which `choose_type` takes pairs, is missing. Set `dataset_name` to preference pairs."
        )
    if test and test == source:
        migration.recipe["test_split_size"] = 100
        migration.changes.append(
            "`eval_dir` -> `test_split_size: 100`: RLHFlow evaluates on 100 rows of it, which are training data too; these are not"
        )
    elif test:
        migration.problems.append(
            f"`eval_dir: {test}`: a recipe names training data, and a split of it. Make pairs of it likewise, put both files as `train.jsonl` "
            "and `test.jsonl` in one directory, and name that in `dataset_name`."
        )
    rows = old.pop("max_training_samples", -1)
    if rows and rows > 0:
        migration.problems.append(
            f"`max_training_samples: {rows}`: add `.select(range({rows}))` where the pairs are made."
        )


def model(old: dict[str, Any], migration: "Migration") -> None:
    reference = old.pop("ref_model", None)
    if reference and reference != old.get("model_name_or_path"):
        migration.problems.append(
            f"`ref_model: {reference}`: give `ref_model` to the trainer in Python; without it the reference is the model as it starts."
        )
    elif reference:
        migration.changes.append("`ref_model` left out: the reference is the model as it starts")
    if "torch_dtype" not in old and "dtype" not in old:
        migration.recipe["dtype"] = "bfloat16"
        migration.changes.append(
            "`dtype: bfloat16` added: RLHFlow's script loads the policy in float16 and the reference in bfloat16; here both are loaded alike"
        )


RLHFLOW = Project(
    name="RLHFlow",
    marks=frozenset(
        {
            *(
                "train_dir",
                "eval_dir",
                "choose_type",
                "ref_model",
                "margin_scale",
                "len_penalty",
                "eot_token",
                "eos_padding",
            ),
            *GENERATION,
        }
    ),
    method=method,
    steps=(data, model),
    types={"ref_model": str, "train_dir": str, "eval_dir": str, "choose_type": str, "max_training_samples": int},
    gone={
        "margin_scale": "it scales a column that DPO's loss does not read",
        "len_penalty": "it belongs to `choose_type: max_min_p`",
        "eos_padding": "the tokenizer's pad token is used, or else its EOS",
        "eot_token": "the chat template ends the answer of messages, and TRL adds the EOS to text",
        "mask_prompt": "a preference loss is one of the answers alone",
    },
    defaults={"learning_rate": 5.0e-5, "logging_steps": 500},
)
