"""
Runs one preference training: the counterpart of TRL's `scripts/dpo.py`, for the trainers of this package.

In: the arguments after `trl-ext tdpo`. Out: a trained model in `output_dir`. The only changes w.r.t. TRL's script: unknown keys
are errors, a dataset may be a local file, and errors in options, checkpoint, model path or data are reported before any model is
loaded.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data_files import is_data_file, source_arguments
from ..model_files import broken_weights, folder_problem, load_problem
from ..outputs import check_trainer_output
from ..processes import die_with_launcher
from ..recipe import RecipeError, parse_flat, take_flag
from ..terminal import no_weight_bars, printable, quiet_imports


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

    from ..rows.pairs import Account
    from ..trainers.tdpo_trainer import TokenLevelTrainer


# Columns that DPOTrainer reads
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "image", "images")


def exit_code(run: Callable[[list[str]], None], argv: Sequence[str]) -> int:
    """Call `run(argv)`. A [`RecipeError`] becomes one `error:` line on stderr and exit code 2."""
    die_with_launcher()
    quiet_imports()
    try:
        run(list(argv))
    except RecipeError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    return 0


def parse_args(
    config_class: type, argv: Sequence[str], prog: str | None = None
) -> tuple["ScriptArguments", "DPOConfig", "ModelConfig", "DatasetMixtureConfig"]:
    """Parse `--config recipe.yaml --key value ...` into TRL's four dataclasses, with `config_class` instead of `DPOConfig`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    path, overrides = take_flag(argv, "config")
    return parse_flat(path, (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig), overrides, prog)


def train(trainer_class: type["TokenLevelTrainer"], argv: Sequence[str]) -> None:
    """
    Parse, check, train, save.

    Raises:
        [`RecipeError`]: an error in the recipe, on the command line or in the data.
    """
    script_args, training_args, model_args, dataset_args = parse_args(trainer_class.config_class, argv)
    from ..trainers.trackers import check_trackers

    try:
        trainer_class.refuse_options(training_args)
        check_trackers(training_args)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    checkpoint = find_checkpoint(training_args)
    config = check_model(model_args, training_args.trust_remote_code)
    check_trainer_output(training_args.output_dir, model_args.model_name_or_path)
    processing_class = load_tokenizer(model_args, config, training_args.trust_remote_code)
    train_dataset, eval_dataset = load_pairs(
        script_args,
        dataset_args,
        evaluate=training_args.eval_strategy != "no",
        seed=training_args.seed,
        processing_class=processing_class,
    )
    for dataset, name in ((train_dataset, "train"), (eval_dataset, "eval")):
        if dataset is None:
            continue
        try:  # before the model is loaded; the trainer repeats it from the cache of `datasets` and logs the findings
            vocabulary = config.get_text_config().vocab_size
            look_at_rows(dataset, processing_class, training_args, name, vocabulary, trainer_class.takes_rendered)
        except RecipeError as error:
            raise RecipeError(f"{data_name(script_args, dataset_args)}: {error}") from error

    from trl import get_peft_config, get_quantization_config

    from ..trainers.upstream import own_device

    no_weight_bars()
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
            # A fresh one: the cache of `datasets` is keyed by the tokenizer's state, which use changes
            processing_class=load_tokenizer(model_args, config, training_args.trust_remote_code),
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
    """`resume_from_checkpoint` as a path. `true` means the last checkpoint in `output_dir`."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise RecipeError(f"`resume_from_checkpoint`: {asked} is not a directory.{_checkpoints(args.output_dir)}")
        return asked

    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if last is None:
        raise RecipeError(
            f"`resume_from_checkpoint: true`, but {args.output_dir} has no checkpoint. Leave the key out to start from the beginning."
        )
    return last


def _checkpoints(output_dir: str) -> str:
    found = sorted(str(path) for path in Path(output_dir).glob("checkpoint-*"))
    return f" Available: {', '.join(found)}." if found else ""


def check_model(model_args: "ModelConfig", trust_remote_code: bool) -> "PreTrainedConfig":
    """Read the model's configuration, so that a wrong name or path costs seconds."""
    from transformers import AutoConfig

    name = model_args.model_name_or_path
    if name is None:
        raise RecipeError("`model_name_or_path` is missing. Set it to a directory, or to a model's name on the Hub.")
    problem = broken_weights(Path(name)) if Path(name).is_dir() else folder_problem(name)
    if problem:
        raise RecipeError(f"`model_name_or_path`: {problem}")
    try:
        return AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"`model_name_or_path`: {load_problem(name, error)}") from error


def load_tokenizer(
    model_args: "ModelConfig", config: "PreTrainedConfig", trust_remote_code: bool
) -> "PreTrainedTokenizerBase | ProcessorMixin":
    """
    The tokenizer or processor that the trainer will use.

    Raises:
        [`RecipeError`]: it is missing or cannot be read.
    """
    from ..rows.processing import load_processing_class, tokenizer_of

    name = model_args.model_name_or_path
    try:
        processing_class = load_processing_class(name, config, model_args.model_revision, trust_remote_code)
    except Exception as error:  # each library raises its own for a broken file
        raise RecipeError(f"`model_name_or_path`: the tokenizer of {name} cannot be read: {error}") from error
    tokenizer = tokenizer_of(processing_class)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as DPOTrainer does
    return processing_class


def data_name(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> str:
    return ", ".join(entry.path for entry in dataset_args.datasets) or script_args.dataset_name


def look_at_rows(
    dataset: "Dataset | IterableDataset",
    processing_class: "PreTrainedTokenizerBase | ProcessorMixin",
    args: "DPOConfig",
    name: str,
    vocabulary: int,
    takes_rendered: bool = True,
) -> "tuple[Dataset | IterableDataset, Account] | None":
    """
    Prepare rows as the trainer will, before the model is loaded. Returns `None` for images, which only the trainer prepares.

    Raises:
        [`RecipeError`]: no row can be used for training, or more than half cannot.
    """
    from ..trainers.prepared import prepared_pairs

    if {"image", "images"} & set(dataset.column_names or ()):
        return None
    return prepared_pairs(dataset, processing_class, args, name, vocabulary, takes_rendered)


def load_pairs(
    script_args: "ScriptArguments",
    dataset_args: "DatasetMixtureConfig",
    evaluate: bool,
    seed: int,
    processing_class: "PreTrainedTokenizerBase | ProcessorMixin | None",
) -> tuple["Dataset | IterableDataset", "Dataset | IterableDataset | None"]:
    """
    Load the preference pairs.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name` may be a Hub dataset, a local file, a directory of files, or what `save_to_disk` wrote.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture; a `path` in it may be a local file too. `test_split_size` is a share below 1, or a number of rows, with or without a
            mixture.
        evaluate (`bool`):
            Whether to load an evaluation split.
        seed (`int`):
            Seed of the split that `test_split_size` makes. TRL splits without one, so that two runs, or two processes of one run, differ.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Converts a mixture of datasets with different columns to one form.

    Raises:
        [`RecipeError`]: the data or the split does not exist, has no rows, or has no preference pairs.
    """
    import datasets

    train_split, size = script_args.dataset_train_split, dataset_args.test_split_size
    test_split = script_args.dataset_test_split if evaluate or size else None
    if dataset_args.datasets and script_args.dataset_name:
        raise RecipeError("Both `datasets` and `dataset_name` are set. Remove one.")
    if dataset_args.datasets:
        name = ", ".join(entry.path for entry in dataset_args.datasets)
        splits = {train_split: _loaded(name, lambda: _mixture(dataset_args, processing_class))}
    elif script_args.dataset_name:
        name = script_args.dataset_name
        splits = _loaded(name, lambda: _load(script_args))
    else:
        raise RecipeError(
            "No dataset. Set `dataset_name` to a file such as pairs.jsonl or to a name on the Hub, or set a list `datasets:`."
        )
    if size is not None:
        if train_split == test_split:
            raise RecipeError(
                f"`dataset_train_split` and `dataset_test_split` are both `{train_split}`, but `test_split_size` makes two "
                "splits. Leave `dataset_test_split` out."
            )
        if dataset_args.streaming or script_args.dataset_streaming:
            raise RecipeError("`test_split_size` cannot split a streaming dataset. Turn streaming off.")
        rows = int(size) if size >= 1 else size  # from 1 it is a number of rows, as TRL's own field
        halves = _loaded(name, lambda: splits[train_split].train_test_split(test_size=rows, seed=seed))
        splits = {train_split: halves["train"], test_split: halves["test"]}
    for key, split in (("dataset_train_split", train_split), ("dataset_test_split", test_split)):
        if split is None:
            continue
        if split not in splits:
            fix = f"Set `{key}`"
            if key == "dataset_test_split":
                fix += ", or `test_split_size: 0.1`, or `eval_strategy: 'no'`"
            raise RecipeError(f"{name} has no split `{split}`, only {', '.join(splits)}. {fix}.")
        if isinstance(splits[split], datasets.Dataset) and len(splits[split]) == 0:
            raise RecipeError(f"{name}: no rows in the split `{split}`. A preference dataset has one pair per row.")
    return splits[train_split], splits[test_split] if evaluate else None


def _load(script_args: "ScriptArguments"):
    import datasets

    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if is_data_file(name):
        splits = datasets.load_dataset(**source_arguments(name), streaming=streaming)
        # A file has one split, whatever it is called
        return {script_args.dataset_train_split: splits["train"]}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return {script_args.dataset_train_split: saved} if isinstance(saved, datasets.Dataset) else saved
    return datasets.load_dataset(**source_arguments(name), name=script_args.dataset_config, streaming=streaming)


def _mixture(dataset_args: "DatasetMixtureConfig", processing_class: Any) -> "Dataset | IterableDataset":
    """A mixture as TRL's `get_dataset` makes it. Datasets with different columns are converted to TRL's form first."""
    import datasets

    parts = []
    for entry in dataset_args.datasets:
        given = {key: getattr(entry, key) for key in ("name", "data_dir", "data_files")}
        source = given | source_arguments(entry.path)
        part = datasets.load_dataset(**source, split=entry.split, streaming=dataset_args.streaming)
        parts.append(part if entry.columns is None else part.select_columns(entry.columns))
    fractions = [entry.fraction for entry in dataset_args.datasets]
    if any(fraction is not None for fraction in fractions):
        if None in fractions:
            raise RecipeError("`fraction` must be set for all entries of `datasets`, or for none.")
        if dataset_args.streaming:
            raise RecipeError("`fraction` needs datasets of known length. Turn streaming off.")
        whole = sum(fractions)
        total = min(len(part) * whole / fraction for part, fraction in zip(parts, fractions, strict=True) if fraction)
        parts = [part.select(range(round(f * total / whole))) for part, f in zip(parts, fractions, strict=True)]
    if dataset_args.streaming:
        from ..rows.formats import Columns

        read = {tuple(Columns.of(part.column_names or list(next(iter(part), {}))).read) for part in parts}
        if len(read) > 1:  # the first rows decide for all
            shown = " and ".join(", ".join(f"`{name}`" for name in names) for names in sorted(read))
            raise RecipeError(
                f"the datasets have different columns, {shown}, and a stream is read in one form. Rename the columns, or turn streaming off."
            )
    if not dataset_args.streaming and any(part.features != parts[0].features for part in parts):
        if processing_class is None:
            raise RecipeError(
                "the datasets have different columns, and converting them to one form needs the model's tokenizer. Name a model."
            )
        names = [entry.path for entry in dataset_args.datasets]
        parts = [_standard(part, name, processing_class) for part, name in zip(parts, names, strict=True)]
        kinds = {name: part.features["prompt"] for part, name in zip(parts, names, strict=True)}
        text = [name for name, kind in kinds.items() if kind == datasets.Value("string")]
        if 0 < len(text) < len(kinds):
            raise RecipeError(
                f"{' and '.join(text)} contain text, and the others messages. Convert all of them to one kind."
            )
    return datasets.concatenate_datasets(parts)


def _standard(part: "Dataset", name: str, processing_class: Any) -> "Dataset":
    """The usable rows of one dataset of a mixture, with the columns that DPOTrainer reads."""
    from ..rows.judge import Findings, Judge
    from ..rows.pairs import Account, standard_rows

    account = Account(Findings(f"rows of {name}"))
    rows, usable = standard_rows(part, Judge(processing_class, account.findings), account, always=True)
    try:
        account.findings.check()
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    tell(account.lines)
    kept = [column for column in PAIR_COLUMNS if column in rows.column_names]
    return rows.select([index for index, can in enumerate(usable) if can]).select_columns(kept)


def tell(lines: list[str]) -> None:
    """Print to stderr, in the first process of a node only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for line in lines:
            print(printable(line), file=sys.stderr)  # noqa: T201


def _loaded(name: str, load: Callable):
    """Call `load()`. Whatever `datasets` raises for missing, unreadable or malformed data becomes a [`RecipeError`] with its cause."""
    try:
        return load()
    except RecipeError:
        raise
    except (
        Exception
    ) as error:  # besides its own errors, `datasets` lets through those of Arrow, pandas and its decoders
        if "corresponds to no data" in str(error):  # the message of `datasets` for a file without rows
            raise RecipeError(f"{name}: no rows. A preference dataset has one pair per row.") from error
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise RecipeError(f"{name}: cannot be loaded: {error}{cause}") from error
