"""Checks of an ARIES recipe: what the loop checks before it starts, rendered prompts, and the memory of each stage."""

import contextlib
import io
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, Template
from jinja2.meta import find_undeclared_variables
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from ..aries.checks.overlap import count_overlap, overlap_lines
from ..aries.children import ChildError
from ..aries.config import AriesConfig, ScorerConfig, sampling_by_turn
from ..aries.data.records import read_json
from ..aries.data.sft import sft_row
from ..aries.data.templates import refinement_prompt
from ..aries.generation.drafts import encode_prompt, render_row
from ..aries.generation.refinements import Strategy
from ..aries.inputs import Inputs, local_inputs, read_inputs
from ..aries.rounds import Rounds
from ..aries.run_dir import RunDir
from ..aries.scoring.verifier import load_verifier, needed_columns
from ..aries.training.settings import trainer_settings
from ..aries.training.train import trainer_classes
from ..launch import Launch, recipe_launch
from ..recipe import Recipe, RecipeError, parse_section
from ..rows.processing import tokenizer_of
from .checks import Check, Report
from .flat_recipe import check_memory, find_shape, no_estimate
from .memory import BYTES, Estimate, Item, concurrency, engine_dtype, engine_memory, overhead, training_memory
from .samples import SAMPLED_ROWS, check_bos, check_unknown, checkpoint_dtype, percent, read_model, show, show_lengths
from .shape import Shape, classifier_parameters


JUDGE_VARIABLES = {"messages", "question", "answer_a", "answer_b"}
PLACEHOLDER = "(the draft)"
# Warn if more of the chains than this give no pair. Our choice
MANY_ALIKE = 0.8
HARDER = "Use harder prompts, a finer score or a higher `drafts.temperature`."
ANSWER, FULL_TEXT = "(the answer)", "<think>\n(the thought)\n</think>\n\n(the answer)"


def check(recipe: Recipe, probe: bool, report: Report) -> None:
    """
    Raises:
        [`RecipeError`]: the remaining checks depend on something that is wrong.
    """
    report.heading(f"{recipe.path}, for trl-ext aries")
    config = parse_section(recipe, AriesConfig)
    report.add(Check("ok", "keys", "all sections parse"))
    name, revision = config.model["model_name_or_path"], config.model.get("model_revision", "main")
    model = report.attempt("model", read_model, name, revision, config.trust_remote_code, "model.model_name_or_path")
    if model is not None:
        report.add(Check("ok", "model", f"{name}: {', '.join(model[0].architectures or ['?'])}"))
    launch, template = recipe_launch(recipe), Strategy(config.refinements).templates[0]
    report.attempt("output_dir", RunDir(Path(config.output_dir)).check_free, local_inputs(config, launch))
    inputs = report.attempt("data", read_inputs, config)
    if inputs is not None:
        check_data(config, inputs, report)
    if model is not None and inputs is not None:
        check_settings(config, inputs, recipe, launch, report)
        report.attempt("samples", check_samples, config, inputs, template, tokenizer_of(model[1]), report)
    if model is not None:
        report.attempt("memory", estimates, config, model[0], report)
    if not probe or report.counts["failed"]:
        check_ceiling(config, report)
        report.add(no_estimate(probe))
        return
    from .probe import probe_aries

    for found in probe_aries(config, inputs, launch):
        report.add(found)


def check_data(config: AriesConfig, inputs: Inputs, report: Report) -> None:
    columns = [key for key in inputs.prompts[0] if key != "prompt_id"]
    needed = ["prompt", *sorted(set().union(*map(columns_of, config.all_scorers)))]
    missing = [column for column in needed if column not in columns]
    found = f"found {', '.join(columns)}; needed {', '.join(needed)}"
    fix = f"Add a column {', '.join(missing)} to the prompts, or use another scorer." if missing else None
    report.add(Check("failed" if missing else "ok", "columns", found, fix))
    kind = "messages" if inputs.conversational else "text"
    found = f"{len(inputs.prompts):,} prompts ({kind}), {inputs.round_size:,} a round × {config.rounds} rounds, "
    found += f"{len(inputs.evaluation_prompts):,} for evaluation"
    report.add(Check("ok", "rows", found + (f", {len(inputs.sft_rows):,} for SFT" if inputs.sft_rows else "")))
    lines = overlap_lines(count_overlap(inputs.prompts, inputs.evaluation_prompts, inputs.sft_rows))
    for line in lines or ["no evaluation prompt is trained on, and no row is repeated"]:
        report.add(Check("warning" if lines else "ok", "overlap", line))


def columns_of(scorer: ScorerConfig) -> set[str]:
    """Columns other than `prompt` that a scorer needs: a verifier's parameters, a judge's variables."""
    if scorer.verifier is not None:
        # It may print and change the directory
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(os.getcwd()):
            return needed_columns(load_verifier(scorer.verifier))
    if scorer.judge is not None:
        return find_undeclared_variables(Environment().parse(scorer.judge.template)) - JUDGE_VARIABLES
    return set()


def check_settings(config: AriesConfig, inputs: Inputs, recipe: Recipe, launch: Launch | None, report: Report) -> None:
    """Run the loop's own checks: scorers, the trainer's keys, the tokenizer, reward models, servers."""
    # In a temporary directory: the run's stays as it is
    with tempfile.TemporaryDirectory() as directory:
        loop = Rounds(replace(config, output_dir=directory), inputs, launch=launch)
        try:
            with contextlib.redirect_stdout(io.StringIO()), loop.dir.opened(loop.config, "", {}):
                loop.check(recipe)
        except RecipeError as error:
            for line in str(error).splitlines():
                report.add(Check("failed", "settings", line))
        except ChildError as error:
            report.add(Check("failed", "settings", str(error).splitlines()[-1]))
        else:
            report.add(
                Check("ok", "settings", "the loop accepts scorers, trainer, tokenizer, reward models and servers")
            )
        for event in loop.dir.read_events():
            if event["event"] == "note":
                report.add(Check("warning", "settings", event["note"]))


def check_samples(
    config: AriesConfig, inputs: Inputs, template: Template, tokenizer: PreTrainedTokenizerBase, report: Report
) -> None:
    """Two prompts and their refinement prompts as rendered, and how many prompts are too long."""
    if inputs.conversational and tokenizer.chat_template is None:
        return  # reported with the settings
    report.add(
        Check("ok", "samples", "the first two prompts, and their refinement prompts with a placeholder for the draft")
    )
    for row in inputs.prompts[:2]:
        ids = encode_prompt(tokenizer, row["prompt"])
        show(report, "prompt", ids, tokenizer)
        show(report, "refinement prompt", encode_prompt(tokenizer, _around(row["prompt"], template)), tokenizer)
    check_learned(config, inputs.prompts[0]["prompt"], tokenizer, report)
    if inputs.sft_rows:
        check_sft(config, inputs.sft_rows, template, tokenizer, report)
    found = check_bos(encode_prompt(tokenizer, inputs.prompts[0]["prompt"]), tokenizer)
    if found is not None:
        report.add(found)

    rows = inputs.prompts[:SAMPLED_ROWS]
    sampling, limit = sampling_by_turn(config), config.generation.max_model_len
    empty = len(tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"])
    answers = max(turn.max_tokens for turn in sampling)
    prompts, refined = [encode_prompt(tokenizer, row["prompt"]) for row in rows], 0
    lengths = [len(ids) for ids in prompts]
    direct = sum(length + sampling[0].max_tokens > limit for length in lengths)
    for row in rows:
        around = len(encode_prompt(tokenizer, _around(row["prompt"], template))) - empty
        refined += around + sampling[0].max_tokens + answers > limit
    fix = "Raise `generation.max_model_len`, or lower `drafts.max_tokens`: these chains stop with `prompt_too_long`."
    text = f"{percent(direct, len(rows))} prompts are too long for `drafts.max_tokens` in `max_model_len: {limit}`"
    report.add(Check("warning" if direct else "ok", "lengths", text, fix if direct else None))
    show_lengths(report, lengths)
    for found in filter(None, [check_unknown("prompts", prompts, tokenizer)]):
        report.add(found)
    if config.refinements.strategy == "chain":
        text = f"{percent(refined, len(rows))} chains would be too long to refine the longest possible draft"
        many = refined > 0.05 * len(rows)
        report.add(Check("warning" if many else "ok", "refinements", text, fix if many else None))


def check_learned(config: AriesConfig, prompt: Any, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
    """A training row as rendered, with a warning if the chat template adds to the answer, such as an empty thought."""
    text = FULL_TEXT if config.pairs.learn == "full_text" else ANSWER
    row = render_row(tokenizer, prompt, text)
    is_text = isinstance(prompt, str)  # otherwise the template adds the special tokens
    show(report, "training row", tokenizer(row, add_special_tokens=is_text)["input_ids"], tokenizer)
    start = prompt if is_text else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    if row.startswith(start + text):
        return
    added = row.removeprefix(start).partition(text)[0]
    found = (
        f"the chat template writes {added!r} before an answer"
        if added
        else "the chat template changes the prompt or the answer"
    )
    report.add(
        Check(
            "warning",
            "answer",
            f"{found}, and the model learns the row as rendered",
            "With an empty thought, the model learns to answer without one. To learn the thought as well, set `pairs.learn: full_text` and "
            "`generation.answer_pattern`.",
        )
    )


def check_sft(
    config: AriesConfig,
    rows: list[dict[str, Any]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
) -> None:
    """The first SFT row that answers directly and the first that refines, as rendered; and how long the rows are."""
    refine = sum(row.get("draft") is not None for row in rows)
    report.add(Check("ok", "SFT rows", f"{len(rows) - refine:,} answer directly, {refine:,} refine a draft"))
    for title, refines in (("SFT row", False), ("SFT row that refines", True)):
        for row in [row for row in rows if (row.get("draft") is not None) == refines][:1]:
            show(report, title, render_sft(tokenizer, sft_row(row, template)), tokenizer)
    rendered = [render_sft(tokenizer, sft_row(row, template)) for row in rows[:SAMPLED_ROWS]]
    limit = trainer_settings(config, 0, "unused").config["max_length"]
    lengths = [len(ids) for ids in rendered]
    cut = sum(length > limit for length in lengths) if limit is not None else 0
    text = f"{percent(cut, len(rendered))} SFT rows are longer than `max_length: {limit}`"
    fix = "Raise `sft.max_length`: these answers lose their ends." if cut else None
    report.add(Check("warning" if cut else "ok", "lengths", text, fix))
    show_lengths(report, lengths)
    for found in filter(None, [check_unknown("SFT rows", rendered, tokenizer)]):
        report.add(found)


def render_sft(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """A prompt and its completion as the SFT learns them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]


def check_ceiling(config: AriesConfig, report: Report) -> None:
    """How many chains give no pair since their answers score alike, as far as that is known: from the run's own rounds."""
    if config.pairs.selection != "best_over_worst":
        return
    run = RunDir(Path(config.output_dir))
    drops = {n: found for n in range(1, config.rounds + 1) if (found := read_json(run.round(n).drops)) is not None}
    if not drops:
        text = "a prompt whose answers all score alike gives no pair; `--probe` or the first round says how many do"
        report.add(Check("ok", "ceiling", text))
        return
    number, found = max(drops.items())
    alike = found["dropped"].get("no_margin", 0)
    many = alike > MANY_ALIKE * found["chains"]
    text = f"in round {number} of {run.path}, {percent(alike, found['chains'])} chains gave no pair, since their answers score alike"
    report.add(Check("warning" if many else "ok", "ceiling", text, HARDER if many else None))


def _around(prompt: Any, template: Template) -> Any:
    return refinement_prompt(prompt, [PLACEHOLDER], template)


def estimates(config: AriesConfig, model_config: PreTrainedConfig, report: Report) -> None:
    """Memory of the engine (unless servers generate), each reward model and training, which take turns on the GPU."""
    model_args = ModelConfig(**config.model)
    shape = find_shape(model_config, model_args, config.trust_remote_code, report)
    if shape is None:
        return
    checkpoint = checkpoint_dtype(model_config)
    if config.generation.base_urls is None:
        dtype = engine_dtype(config.generation, checkpoint)
        rank = config.model.get("lora_r", 16) if model_args.use_peft else None
        engine = engine_memory(shape, config.generation, dtype, rank)
        check_memory(engine, report)
        _engine_room(shape, config, dtype, engine, report)
    for scorer in config.all_scorers:
        if scorer.reward_model is not None:
            check_memory(reward_memory(scorer.reward_model, scorer.reward_model_revision), report)
    settings = trainer_settings(config, 1, "unused")
    _, config_class = trainer_classes(settings)
    on_any_machine = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None}
    try:
        args = config_class(**settings.config | on_any_machine)
    except (TypeError, ValueError):
        return  # reported with the settings
    args.bf16 = config.training.get("bf16", not config.training.get("fp16", False))
    args.fp16 = config.training.get("fp16", False)
    if model_args.dtype not in (None, "auto"):
        checkpoint = model_args.dtype
    has_ref = model_args.use_peft and (config.rounds > 1 or config.sft is not None)
    check_memory(training_memory(shape, model_args, args, checkpoint, has_ref), report)


def _engine_room(shape: Shape, config: AriesConfig, dtype: str, engine: Estimate, report: Report) -> None:
    if not torch.cuda.is_available():
        report.detail(f"{'':>10}  on a CPU: the weights, and `cpu_kv_cache_gib: {config.generation.cpu_kv_cache_gib}`")
        return
    fit = concurrency(shape, config.generation, dtype, engine, torch.cuda.mem_get_info(0)[1])
    share, cache = config.generation.gpu_memory_utilization, config.generation.gpu_kv_cache_gib
    where = f"{share:.0%} of cuda:0" if cache is None else f"`gpu_kv_cache_gib: {cache:g}`"
    report.detail(f"{'':>10}  in {where}, {fit} sequences of `max_model_len` fit at once")


def reward_memory(name: str, revision: str | None) -> Estimate:
    """Memory of a reward model's weights, in the checkpoint's data type."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`scores.reward_model`: {name} cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error
    dtype, count = checkpoint_dtype(config), classifier_parameters(config)
    weights = Item("weights", count * BYTES[dtype], f"{count:,} parameters × {BYTES[dtype]} B ({dtype})")
    return Estimate(f"reward model {name}", [weights, overhead()])
