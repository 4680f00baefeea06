"""
Converts the data of an old recipe: the handbook's `dataset_mixer` and `dataset_mixture` to `dataset_name`, or to TRL's `datasets:`.

The handbook's weights are shares of each dataset's rows, and become slices of a split. TRL's `fraction` is not used: it is a dataset's
share of the mixture.
"""

from typing import Any

from ..recipe import RecipeError


# Columns that the handbook's scripts read; they ignored a text `prompt` beside conversations
COLUMNS = ["chosen", "rejected"]
NO_TEST_SPLIT = (
    "TRL's `datasets:` has only training data. Split off evaluation data with `test_split_size: 0.05` (a share, or a number of "
    "rows), or set `eval_strategy: 'no'`."
)


def sliced(split: str, weight: Any, where: str) -> str:
    """The first rows of a split: `("train", 0.5)` is `train[:50%]`."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
        raise RecipeError(f"{where}: a weight must be a share of the rows, above 0 and at most 1, got {weight!r}.")
    percent = round(weight * 100, 6)
    if percent == 100:
        return split
    if percent != int(percent):
        raise RecipeError(
            f"{where}: a slice of a split needs whole percents, and {weight} is not one. Round the weight, or slice by rows: "
            f"`split: {split}[:5000]`."
        )
    return f"{split}[:{int(percent)}%]"


def from_mixer(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """
    `dataset_mixer` (id -> weight) with `dataset_splits` and `dataset_configs`, taken out of `old` and written to `new`.

    Returns:
        `tuple[list[str], list[str]]`: changes and problems.
    """
    mixer = old.pop("dataset_mixer")
    splits = old.pop("dataset_splits", None) or ["train", "test"]
    splits = [splits] if isinstance(splits, str) else splits
    configs = old.pop("dataset_configs", None)
    if not isinstance(mixer, dict) or not mixer:
        return [], [f"`dataset_mixer` is not a mapping of datasets to weights: {mixer!r}. Set `dataset_name`."]
    configs = [configs] if isinstance(configs, str) else configs or [None] * len(mixer)
    if len(configs) != len(mixer):
        return [], [f"`dataset_configs` has {len(configs)} entries for the {len(mixer)} of `dataset_mixer`."]
    train = [split for split in splits if "train" in split]
    test = [split for split in splits if "test" in split]
    if len(train) + len(test) != len(splits) or not train:
        return [], [
            f"`dataset_splits`: {splits} are not split names with `train` or `test`. Set `dataset_train_split`."
        ]
    if len(mixer) == len(train) == 1 and len(test) <= 1 and set(mixer.values()) <= {1}:
        [name] = mixer
        new["dataset_name"] = name
        if configs[0] is not None:
            new["dataset_config"] = configs[0]
        new["dataset_train_split"] = train[0]
        changes = [f"`dataset_mixer` -> `dataset_name: {name}`: one whole dataset needs no mixture"]
        if test:
            new["dataset_test_split"] = test[0]
        named = f"`dataset_train_split: {train[0]}`" + (f", `dataset_test_split: {test[0]}`" if test else "")
        return [*changes, f"`dataset_splits` -> {named}: TRL's names"], []

    entries, problems = [], []
    for (name, weight), config in zip(mixer.items(), configs, strict=True):
        for split in train:
            try:
                entry = {"path": name, "name": config, "split": sliced(split, weight, f"`dataset_mixer.{name}`")}
            except RecipeError as error:
                problems.append(f"{error} Add it to `datasets:` by hand.")
                continue
            entries.append({k: v for k, v in entry.items() if v is not None} | {"columns": COLUMNS[:]})
    changes = [
        "`dataset_mixer` -> `datasets`: TRL's form. A weight below 1, a share of the dataset's rows, becomes a slice of "
        "the split; `columns` are those that the handbook reads"
    ]
    if entries:
        new["datasets"] = entries
    if test:
        problems.append(f"`dataset_splits`: {', '.join(test)} cannot be named beside `datasets:`. {NO_TEST_SPLIT}")
    return changes, problems


def from_mixture(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """`dataset_mixture` (a list of `id`, `config`, `split`, `columns`, `weight`, with `test_split_size` and `seed`), likewise."""
    mixture = old.pop("dataset_mixture")
    listed = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        return [], ["`dataset_mixture` has no list `datasets`. Write TRL's `datasets:` by hand."]
    entries, problems, weighted = [], [], False
    for index, given in enumerate(listed):
        where = f"`dataset_mixture.datasets[{index}]`"
        given = dict(given)
        weight = given.pop("weight", None)
        entry = {"path": given.pop("id", None) or given.pop("path", None), "name": given.pop("config", None)}
        try:
            split = given.pop("split", "train")
            entry["split"] = split if weight is None else sliced(split, weight, where)
            weighted |= entry["split"] != split
        except RecipeError as error:
            problems.append(f"{error} Add it to `datasets:` by hand.")
            continue
        entry["columns"] = given.pop("columns", None)
        problems += [f"{where}: `{key}` has no counterpart in TRL's `datasets:`. Remove it." for key in given]
        entries.append({k: v for k, v in entry.items() if v is not None})
    new["datasets"] = entries
    changes = ["`dataset_mixture` -> `datasets`: TRL's form; `id` -> `path`, `config` -> `name`"]
    if any("weight" in entry for entry in listed):
        how = "a slice of the split: its first rows, while the handbook shuffled" if weighted else "all rows: left out"
        changes.append(
            f"`weight` of the datasets -> {how}. TRL's `fraction` is something else, a share of the mixture"
        )
    size = mixture.get("test_split_size")
    if size is not None:
        new["test_split_size"] = size
        changes.append("`dataset_mixture.test_split_size` -> `test_split_size`: now a key of the recipe")
    if "seed" in mixture:
        changes.append(
            f"`dataset_mixture.seed: {mixture['seed']}` left out: the recipe's `seed` draws the evaluation split, and "
            "the trainer shuffles"
        )
    extra = set(mixture) - {"datasets", "test_split_size", "seed"}
    problems += [f"`dataset_mixture.{key}` has no counterpart. Remove it." for key in sorted(extra)]
    return changes, problems
