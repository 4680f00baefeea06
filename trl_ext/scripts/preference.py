"""
One preference-training run: the counterpart of TRL's `scripts/dpo.py`, for the trainers of this package.

In: the arguments after `trl-ext tdpo`. Out: a trained model in `output_dir`. The only changes w.r.t. TRL's script: keys are
strict, a dataset may be a local file, and what can be wrong with options, checkpoint, model path or data is said before any
model is loaded.
"""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data_files import builder_arguments, is_data_file
from ..processes import die_with_launcher
from ..recipe import RecipeError, parse_flat, take_flag
from ..terminal import printable


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

    from ..trainers.shifted_dpo_trainer import ShiftedDPOTrainer


# Largest share of the pairs that may be unusable. [house]
MOST_DROPPED = 0.5


def exit_code(run: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Run; a [`RecipeError`] becomes one `error:` on stderr and exit code 2."""
    die_with_launcher()
    try:
        run(list(argv))
    except RecipeError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    return 0


def parse_args(
    config_class: type, argv: Sequence[str], prog: str | None = None
) -> tuple["ScriptArguments", "DPOConfig", "ModelConfig", "DatasetMixtureConfig"]:
    """Parse `--config recipe.yaml --key value ...` into TRL's four dataclasses, `config_class` in the place of `DPOConfig`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    path, overrides = take_flag(argv, "config")
    return parse_flat(path, (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig), overrides, prog)


def train(trainer_class: type["ShiftedDPOTrainer"], config_class: type, argv: Sequence[str]) -> None:
    """
    Parse, check, train, save.

    Raises:
        [`RecipeError`]: anything in the recipe, on the command line or in the data that cannot work.
    """
    script_args, training_args, model_args, dataset_args = parse_args(config_class, argv)
    from ..trainers.trackers import check_trackers

    try:
        trainer_class._refuse_options(training_args)
        check_trackers(training_args)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    checkpoint = find_checkpoint(training_args)
    check_model(model_args, training_args.trust_remote_code)
    train_dataset, eval_dataset = load_pairs(
        script_args, dataset_args, evaluate=training_args.eval_strategy != "no", seed=training_args.seed
    )

    from trl import get_peft_config, get_quantization_config

    from ..trainers.upstream import own_device

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **own_device(),
    } | (training_args.model_init_kwargs or {})
    try:
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error

    if script_args.ignore_bias_buffers:
        import torch

        # Boolean buffers cannot be broadcast by DDP (transformers#22482)
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.print("Training completed.")
    trainer.save_model(training_args.output_dir)
    data = script_args.dataset_name if not dataset_args.datasets else None
    trainer.create_model_card(Path(training_args.output_dir).name, data)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")


# Checks before any model is loaded


def find_checkpoint(args: "DPOConfig") -> str | None:
    """`resume_from_checkpoint` as a path: `true` stands for the last checkpoint in `output_dir`."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise RecipeError(f"`resume_from_checkpoint`: {asked} is no directory.{_checkpoints(args.output_dir)}")
        return asked

    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if last is None:
        raise RecipeError(
            f"`resume_from_checkpoint: true`, but {args.output_dir} holds no checkpoint. Leave the key out to start anew."
        )
    return last


def _checkpoints(output_dir: str) -> str:
    found = sorted(str(path) for path in Path(output_dir).glob("checkpoint-*"))
    return f" There is: {', '.join(found)}." if found else ""


def check_model(model_args: "ModelConfig", trust_remote_code: bool) -> None:
    """Read the model's configuration, so that a wrong name or path costs seconds."""
    from transformers import AutoConfig

    name = model_args.model_name_or_path
    if name is None:
        raise RecipeError("`model_name_or_path` is missing: a directory, or a model's name on the Hub.")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise RecipeError(f"`model_name_or_path`: {name} is no directory.")
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"`model_name_or_path`: {name}: {error}") from error


def load_pairs(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", evaluate: bool, seed: int
) -> tuple["Dataset | IterableDataset", "Dataset | IterableDataset | None"]:
    """
    Load the preference pairs and look at them.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name` may be a Hub dataset, a local file, a directory of files, or what `save_to_disk` wrote.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture, in which a `path` may be a local file too. `test_split_size` holds for both: a share below 1, or a
            number of rows.
        evaluate (`bool`):
            Whether an evaluation split is wanted.
        seed (`int`):
            For `test_split_size`. TRL splits without a seed, so that two runs, or two processes of one run, differ.

    Raises:
        [`RecipeError`]: no such data, no such split, no rows, no `chosen` and `rejected`, or too few rows with both.
    """
    import datasets
    from trl import get_dataset

    train_split, size = script_args.dataset_train_split, dataset_args.test_split_size
    test_split = script_args.dataset_test_split if evaluate or size else None
    if dataset_args.datasets and script_args.dataset_name:
        raise RecipeError("Both `datasets` and `dataset_name` are given. Remove one.")
    if dataset_args.datasets:
        name = ", ".join(entry.path for entry in dataset_args.datasets)
        entries = [_local_entry(entry) for entry in dataset_args.datasets]
        mixture = dataclasses.replace(dataset_args, datasets=entries, test_split_size=None)
        splits = {train_split: _loaded(name, lambda: get_dataset(mixture)["train"])}
    elif script_args.dataset_name:
        name = script_args.dataset_name
        splits = _loaded(name, lambda: _load(script_args))
    else:
        raise RecipeError(
            "No dataset: give `dataset_name`, a file such as pairs.jsonl or a name on the Hub, or a list `datasets:`."
        )
    if size is not None:
        if train_split == test_split:
            raise RecipeError(
                f"`dataset_train_split` and `dataset_test_split` are both `{train_split}`, and `test_split_size` makes one of "
                "each. Leave `dataset_test_split` out."
            )
        if dataset_args.streaming or script_args.dataset_streaming:
            raise RecipeError("`test_split_size` cannot split a streaming dataset. Turn streaming off.")
        rows = int(size) if size >= 1 else size  # TRL's field is a number; from 1 it is meant in rows
        halves = _loaded(name, lambda: splits[train_split].train_test_split(test_size=rows, seed=seed))
        splits = {train_split: halves["train"], test_split: halves["test"]}
    for key, split in (("dataset_train_split", train_split), ("dataset_test_split", test_split)):
        if split is None:
            continue
        if split not in splits:
            way_out = f"Set `{key}`"
            if key == "dataset_test_split":
                way_out += ", or `test_split_size: 0.1`, or `eval_strategy: 'no'`"
            raise RecipeError(f"{name} has no split `{split}`, only {', '.join(splits)}. {way_out}.")
        splits[split] = _check_pairs(splits[split], f"{name} (split `{split}`)")
        if isinstance(splits[split], datasets.Dataset):  # a stream is not read ahead of the training
            splits[split] = _usable_pairs(splits[split], f"{name} (split `{split}`)")
    return splits[train_split], splits[test_split] if evaluate else None


def _load(script_args: "ScriptArguments"):
    import datasets

    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if is_data_file(name):
        splits = datasets.load_dataset(**builder_arguments(name), streaming=streaming)
        # One file has one split; it is the one asked for
        return {script_args.dataset_train_split: splits["train"]}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return {script_args.dataset_train_split: saved} if isinstance(saved, datasets.Dataset) else saved
    return datasets.load_dataset(
        str(path) if path.is_dir() else name, name=script_args.dataset_config, streaming=streaming
    )


def _local_entry(entry):
    """An entry of `datasets:` whose path is a file, as the builder for it."""
    if not is_data_file(entry.path):
        return entry
    return dataclasses.replace(entry, **builder_arguments(entry.path))


def _loaded(name: str, load: Callable):
    """Load; what `datasets` raises for missing, unreadable or malformed data is the user's to know, with its cause."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except RecipeError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):  # what `datasets` says of a file without rows
            raise RecipeError(f"{name}: no rows. A preference dataset has one pair per row.") from error
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise RecipeError(f"{name}: cannot be loaded: {error}{cause}") from error


def _check_pairs(dataset: "Dataset | IterableDataset", name: str) -> "Dataset | IterableDataset":
    """
    Look at the first row. A text `prompt` beside whole conversations, as in HuggingFaceH4/ultrafeedback_binarized, repeats their
    beginning, and `DPOTrainer` cannot add the two: the column is left out, and the prompt taken from the conversations.
    """
    row = next(iter(dataset), None)
    if row is None:
        raise RecipeError(f"{name}: no rows. A preference dataset has one pair per row.")
    missing = [column for column in ("chosen", "rejected") if column not in row]
    if missing:
        raise RecipeError(
            f"{name}: no column {' and '.join(f'`{column}`' for column in missing)}; found "
            f"{', '.join(f'`{column}`' for column in row)}. A preference dataset has `chosen` and `rejected`, and usually "
            "`prompt`."
        )
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], (str, list)) or not row[column]:
            raise RecipeError(
                f"{name}: `{column}` of the first row is {row[column]!r}; it must be text or a list of messages."
            )
    if not isinstance(row.get("prompt"), str) or isinstance(row["chosen"], str):
        return dataset
    if row["chosen"][0] != row["rejected"][0]:
        raise RecipeError(
            f"{name}: `prompt` is text, and `chosen` and `rejected` are messages without it. Make the prompt messages too: "
            '[{"role": "user", "content": ...}].'
        )
    print(  # noqa: T201
        f"{name}: `prompt` is text beside conversations that begin with it; the conversations are used.",
        file=sys.stderr,
    )
    return dataset.remove_columns("prompt")


def _usable_pairs(dataset: "Dataset", name: str) -> "Dataset":
    """The pairs with two answers that differ; how many others there were is printed, and too many end the run."""
    dropped: Counter[str] = Counter()
    kept = []
    for index, row in enumerate(dataset.select_columns(["chosen", "rejected"])):
        problem = pair_problem(row["chosen"], row["rejected"])
        if problem is None:
            kept.append(index)
        else:
            dropped[problem] += 1
    if not dropped:
        return dataset
    counts = f"{dropped.total():,} of {len(dataset):,} pairs cannot be used: " + ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(dropped.items())
    )
    if dropped.total() > MOST_DROPPED * len(dataset):
        raise RecipeError(f"{name}: {counts}. More than half: look at the data.")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(f"{name}: {counts}. They are left out."), file=sys.stderr)  # noqa: T201
    return dataset.select(kept)


def pair_problem(chosen: Any, rejected: Any) -> str | None:
    """Why there is nothing to learn from a pair, or `None`."""
    if is_empty(chosen) or is_empty(rejected):
        return "with an empty answer"
    return "with identical answers" if chosen == rejected else None


def is_empty(answer: Any) -> bool:
    """Whether an answer, text or messages, has nothing in its text or its last message."""
    if isinstance(answer, list):
        answer = answer[-1].get("content") or answer[-1].get("tool_calls") if answer else None
    return not (answer.strip() if isinstance(answer, str) else answer)
