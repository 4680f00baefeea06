"""Checks of a trainer's recipe: keys, data as the trainer sees it, and memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ModelConfig, ScriptArguments

from .. import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from ..recipe import Recipe, RecipeError, parse_flat, take_flag
from ..recipe_values import LAUNCH_KEYS
from ..rows.formats import Columns
from ..rows.judge import TOKENS
from ..rows.processing import tokenizer_of
from ..scripts.preference import load_pairs, look_at_rows
from .checks import Check, Report, gigabytes
from .environment import last_line
from .memory import Estimate, training_memory
from .samples import SAMPLED_ROWS, check_unknown, checkpoint_dtype, percent, read_model, show, show_lengths
from .shape import Shape, model_shape


SELF_REFINE_KEYS = {f.name for f in dataclasses.fields(SelfRefineDPOConfig)} - {
    f.name for f in dataclasses.fields(TDPOConfig)
}


def check(recipe: Recipe, overrides: Sequence[str], probe: bool, report: Report) -> None:
    """
    Raises:
        [`RecipeError`]: the remaining checks depend on something that is wrong.
    """
    given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in overrides if flag.startswith("--")}
    self_refine = bool(SELF_REFINE_KEYS & {*recipe.mapping, *given})
    trainer, config = (SelfRefineDPOTrainer, SelfRefineDPOConfig) if self_refine else (TDPOTrainer, TDPOConfig)
    command = "self-refine-dpo" if self_refine else "tdpo"
    report.heading(f"{recipe.path}, for trl-ext {command}")
    for key in LAUNCH_KEYS:  # for `accelerate launch`
        _, overrides = take_flag(overrides, key)
    no_gpu = not torch.cuda.is_available() and not recipe.mapping.get("use_cpu") and "use_cpu" not in given
    on_cpu = ["--use_cpu", "--bf16", "false"] if no_gpu else []
    classes = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    script_args, args, model_args, dataset_args = parse_flat(recipe, classes, [*overrides, *on_cpu])
    try:
        trainer.refuse_options(args)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    report.add(Check("ok", "keys", f"{len(recipe.mapping)} keys, all known"))
    if no_gpu:
        report.add(
            Check("failed", "device", "no CUDA device, but the recipe needs one", "Add `--use_cpu --bf16 false`.")
        )
        args.bf16 = recipe.mapping.get("bf16", not args.fp16)  # its value on a GPU
    model = report.attempt("model", _model, model_args, args, report)
    evaluate = args.eval_strategy != "no"
    processing_class = None if model is None else model[1]
    data = report.attempt("data", load_pairs, script_args, dataset_args, evaluate, args.seed, processing_class)
    known = data is not None and report.attempt("columns", check_data, *data, report)
    if known and model is not None:
        prompts = [
            None if rows is None else report.attempt("rows", check_rows, rows, name, model, args, trainer, report)
            for rows, name in zip(data, ("train", "eval"), strict=True)
        ]
        if None not in prompts:
            check_overlap(*prompts, report)
    if model is not None:
        if self_refine:
            count = len(tokenizer_of(model[1])(args.refinement_prompt)["input_ids"])
            report.add(Check("ok", "refinement", f"`refinement_prompt` adds {count} tokens to every prompt"))
        dtype = checkpoint_dtype(model[0]) if model_args.dtype in (None, "auto") else model_args.dtype
        shape = find_shape(model[0], model_args, args.trust_remote_code, report)
        if shape is not None:
            check_memory(training_memory(shape, model_args, args, dtype), report)
    if not probe or report.counts["failed"] or not isinstance(data[0], Dataset):
        report.add(no_estimate(probe))
        return
    from .probe import probe_training

    report.add(probe_training(command, recipe, overrides, args, len(data[0])))


def _model(
    model_args: ModelConfig, args: DPOConfig, report: Report
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | ProcessorMixin]:
    name = model_args.model_name_or_path
    if name is None:
        raise RecipeError("`model_name_or_path` is missing: a directory, or a model's name on the Hub.")
    found = read_model(name, model_args.model_revision, args.trust_remote_code, "model_name_or_path")
    report.add(Check("ok", "model", f"{name}: {', '.join(found[0].architectures or ['?'])}"))
    return found


def find_shape(config: PreTrainedConfig, model_args: ModelConfig, trust: bool, report: Report) -> Shape | None:
    """The model's sizes, or `None` with a warning that memory cannot be estimated."""
    try:
        return model_shape(config, model_args, trust)
    except Exception as error:  # the architecture's own code may raise anything
        found = f"no estimate for {config.model_type}: {type(error).__name__}: {last_line(str(error))}"
        report.add(Check("warning", "memory", found))
        return None


def no_estimate(probe: bool) -> Check:
    if probe:
        return Check("ok", "time", "skipped: something above failed, or the data is streamed")
    return Check("ok", "time", "skipped: `--probe` runs a little of the recipe to estimate it")


def check_data(train: Any, evaluation: Any, report: Report) -> bool:
    names = train.column_names or list(next(iter(train), {}))
    columns = Columns.of(names)
    used = [*dict.fromkeys([*columns.read, *(name for name in ("tools", "chat_template_kwargs") if name in names)])]
    others = [name for name in names if name not in used]
    found = f"{', '.join(used)} used" + (f"; not used: {', '.join(others)}" if others else "")
    if columns.prompt is None:
        found += "; the prompt is what chosen and rejected share at their start"
    report.add(Check("ok", "columns", found))
    sizes = [("train", train)] + ([("evaluation", evaluation)] if evaluation is not None else [])
    counted = (f"{name} {len(rows):,}" if isinstance(rows, Dataset) else f"{name} streamed" for name, rows in sizes)
    report.add(Check("ok", "rows", ", ".join(counted)))
    return True


def check_rows(
    rows: Dataset | IterableDataset,
    name: str,
    model: tuple[PreTrainedConfig, PreTrainedTokenizerBase | ProcessorMixin],
    args: DPOConfig,
    trainer: type[DPOTrainer],
    report: Report,
) -> list[int] | None:
    """
    What the training does with the rows; for the train dataset also two samples and the lengths.

    Returns:
        `list[int]`: a hash of each prompt, `None` if the rows are streamed or have images.
    """
    disable_progress_bars()
    config, processing_class = model
    vocabulary = config.get_text_config().vocab_size
    looked_at = look_at_rows(rows, processing_class, args, name, vocabulary, trainer.takes_rendered)
    if looked_at is None:
        report.add(
            Check("ok", "samples", f"skipped: the {name} dataset has images, which the trainer reads batch by batch")
        )
        return None
    prepared, account = looked_at
    for line in filter(None, [account.conversion]):
        report.add(Check("ok", "form", line))
    for line in [*account.findings.drops, *account.findings.warnings]:
        found, _, fix = line.partition("). ")
        report.add(Check("warning", "rows", f"{found})", fix))
    streamed = isinstance(prepared, IterableDataset)
    if name == "train":
        if streamed:
            prepared = Dataset.from_list(list(prepared.select_columns(list(TOKENS)).take(SAMPLED_ROWS)))
        check_samples(prepared, account.findings.dropped["too long"], tokenizer_of(processing_class), args, report)

    if streamed:
        return None
    hashes = [tuple(hash(tuple(row[column])) for column in TOKENS) for row in prepared.select_columns(list(TOKENS))]
    repeated = len(hashes) - len(set(hashes))
    if repeated:
        text = f"{percent(repeated, len(hashes))} rows of the {name} dataset repeat an earlier one"
        report.add(Check("warning", "repeated", text, "Leave them out, unless they are to count more."))
    return [prompt for prompt, *_ in hashes]


def check_overlap(train: list[int], evaluation: list[int], report: Report) -> None:
    """How many evaluation prompts training sees too."""
    trained = set(train)
    common = sum(prompt in trained for prompt in evaluation)
    text = f"{percent(common, len(evaluation))} evaluation prompts are also in the train dataset"
    fix = "Evaluate on other prompts: the trainer's evaluation does not see that these are known." if common else None
    report.add(Check("warning" if common else "ok", "overlap", text, fix))


def check_samples(
    prepared: Dataset, too_long: int, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, report: Report
) -> None:
    """Two samples as the trainer sees them, and how many pairs `max_length` cuts."""
    report.add(Check("ok", "samples", "the first two, as the trainer sees them"))
    for row in prepared.select(range(min(2, len(prepared)))):
        for part in ("prompt", "chosen", "rejected"):
            show(report, part, row[f"{part}_ids"], tokenizer)
    first = prepared[0]
    if tokenizer.eos_token_id not in first["chosen_ids"][-3:]:
        fix = "The model will not learn to stop. Does the chat template end its turns with another token?"
        report.add(Check("warning", "EOS", f"the first chosen answer does not end with {tokenizer.eos_token}", fix))

    rows = prepared.select(range(min(SAMPLED_ROWS, len(prepared))))
    unknown = check_unknown("pairs", [sum((row[column] for column in TOKENS), []) for row in rows], tokenizer)
    if unknown is not None:
        report.add(unknown)
    table = prepared.select_columns(list(TOKENS)).with_format("arrow")[:]
    prompts, chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in TOKENS)
    longest = prompts + np.maximum(chosen, rejected)
    if args.max_length is None:
        text = "`max_length: null` cuts nothing; the memory below is for sequences of 1,024 tokens"
        report.add(Check("ok", "lengths", text))
        return show_lengths(report, longest)
    cut = int((longest > args.max_length).sum())
    found = f"{percent(cut, len(longest))} pairs are longer than `max_length: {args.max_length}`"
    found += f", {too_long:,} more have a prompt that fills it alone; longest pair {longest.max():,} tokens"
    state = "warning" if cut > 0.05 * len(longest) else "ok"
    fix = "Raise `max_length`: these answers lose their ends." if state == "warning" else None
    report.add(Check(state, "lengths", found, fix))
    show_lengths(report, longest)


def check_memory(estimate: Estimate, report: Report) -> None:
    """An estimate with its arithmetic, compared with the first GPU's memory."""
    found = f"{estimate.stage}: about {gigabytes(estimate.total)} on one GPU, nothing sharded"
    check = Check("ok", "memory", found)
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info(0)[1]
        check.found += f"; cuda:0 has {gigabytes(total)}"
        if estimate.total > total:
            check.state = "warning"
            check.fix = (
                "Lower `per_device_train_batch_size` or `max_length`, load the base in 4 bits, or shard with "
                "`accelerate_config: fsdp2`."
                if estimate.stage == "training"
                else "Lower `generation.max_model_len`, or raise `generation.tensor_parallel_size`."
            )
    report.add(check)
    for line in estimate.lines():
        report.detail(line)
