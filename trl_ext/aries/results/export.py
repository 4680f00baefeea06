"""
Export: the policy of a round as a model of its own, or as an adapter, ready to be loaded or uploaded.

In: a run directory. Out: a directory with the adapter merged into the base in the checkpoint's own data type (not into the NF4 base that
QLoRA trains on), or the adapter as it is, or the weights of full fine-tuning; with the tokenizer and a model card. It gets its name only
after it was loaded and gave the policy's log-probabilities.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...outputs import check_new, new_directory
from ...recipe import RecipeError
from ...terminal import no_weight_bars
from ..checks.parity import TOLERANCES, load_base, policy_logps
from ..children import ChildError
from ..config import AriesConfig
from ..data.disk import writing
from ..data.records import read_jsonl
from ..generation.drafts import encode_prompt
from ..generation.policy_identity import compare
from ..policies import Policy, policy_after
from ..provenance import check_policy
from ..run_dir import RunDir
from .best import best_round
from .cards import FORMS, model_card
from .hub import make_repo, upload
from .progress import RunProgress
from .state import chosen_round


SAMPLES = 16  # answers whose log-probabilities are compared


def export(
    config: AriesConfig,
    number: int | str | None,
    output: Path,
    form: str | None,
    repo: str | None = None,
    private: bool = False,
) -> int:
    """
    Export a finished round and return the exit code, 0.

    Args:
        number (`int` or `str`, *optional*):
            The round, or `"best"`. Default: the last one that was not rolled back, unless the best one is clearly better.
        output (`Path`):
            The directory to make. It must not exist, or be empty.
        form (`str`, *optional*):
            `"merged"` (the default for an adapter) or `"adapter"`; `None` for full fine-tuning, which is copied.
        repo (`str`, *optional*), private (`bool`, *optional*, defaults to `False`):
            A model repository on the Hub to upload it to.

    Raises:
        [`RecipeError`]: the round cannot be exported in this form, `output` is not empty, or the repository cannot be made.
        [`~aries.children.ChildError`]: the written model is not the policy, and is removed; or the upload failed, and the directory stays.
    """
    no_weight_bars()
    run, say = RunDir(Path(config.output_dir)), RunProgress(config.rounds).say
    if number == 0 and config.sft is None:
        raise RecipeError("`--round`: round 0 of a run without SFT is the recipe's model, unchanged.")
    finished = [n for n in range(0 if config.sft else 1, config.rounds + 1) if run.round(n).manifest.exists()]
    best = best_round(run, config, finished) if number is None else None
    if best is not None and best.clear:
        say(f"Exporting the best round in place of the last: {best}. `--round {best.last}` exports the last one.")
        number = best.number
    chosen = chosen_round(run, config, number, finished, "finished")
    if number is None and chosen < finished[-1]:
        say(f"Exporting round {chosen}, since round {finished[-1]} was rolled back.")
    number = chosen
    check_policy(run, config, number)
    policy = policy_after(run, config, number)
    if policy.adapter is None and form is not None:
        raise RecipeError(
            f"round {number} of {run.path} has no adapter: all weights were trained. Leave out --merge and --adapter."
        )
    form = "copy" if policy.adapter is None else form or "merged"
    check_new(output)
    if repo is not None:
        make_repo(repo, "model", private)

    revision = config.model.get("model_revision")
    loading = {"trust_remote_code": config.trust_remote_code, "use_cpu": bool(config.training.get("use_cpu"))}
    tokenizer = AutoTokenizer.from_pretrained(
        policy.adapter or policy.model, trust_remote_code=config.trust_remote_code
    )
    with writing(output), new_directory(output) as directory:
        if form == "merged":
            base = load_base(policy.model, "auto", revision=revision, **loading)
            merged = PeftModel.from_pretrained(base, policy.adapter).merge_and_unload(safe_merge=True)
            merged.save_pretrained(directory)
            del base, merged
        else:
            shutil.copytree(policy.adapter or policy.model, directory, dirs_exist_ok=True)
        tokenizer.save_pretrained(directory)
        rows = evaluation_rows(run, number, tokenizer)
        exported = Policy(policy.model, str(directory)) if form == "adapter" else Policy(str(directory), None)
        # Only the base has a revision
        measured = measure(policy, exported, rows, {policy.model: revision} if policy.adapter else {}, loading)
        card = model_card(run, config, output.name, repo or str(output), number, form, tokenizer, measured)
        (directory / "README.md").write_text(card, encoding="utf-8")

    say(
        f"{output}: {FORMS[form].format(**measured)}. Its log-probabilities differ from those of round {number}'s policy by "
        f"{measured['difference']:.2g} nats per token (root mean square over {measured['tokens']} tokens)."
    )
    if not all(other["distinguishable"] for other in measured["others"].values()):
        say(
            f"Rounding to {measured['dtype']} hides what the training changed: the policy and its base differ by less than that. "
            "Use --adapter to keep it."
        )
    if repo is not None:
        say(upload(output, repo, "model"))
    return 0


def evaluation_rows(run: RunDir, number: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The policy's direct answers to the first evaluation prompts, as token ids."""
    rows = []
    chains = read_jsonl(run.round(number).evaluation)
    for prompt, chain in zip(read_jsonl(run.evaluation_prompts), chains, strict=True):
        if chain["answers"]:
            text_ids = tokenizer(chain["answers"][0]["text"], add_special_tokens=False)["input_ids"]
            token_ids = [*text_ids, tokenizer.eos_token_id]
            rows.append({"prompt_token_ids": encode_prompt(tokenizer, prompt["prompt"]), "token_ids": token_ids})
    return rows[:SAMPLES]


def measure(
    policy: Policy,
    exported: Policy,
    rows: list[dict[str, Any]],
    revisions: dict[str, str | None],
    loading: dict[str, Any],
) -> dict[str, Any]:
    """
    Load what was written, and compare it with the policy in the checkpoint's data type.

    Raises:
        [`~aries.children.ChildError`]: it is not the policy.
    """
    dtypes = []

    def load(path: str) -> PreTrainedModel:
        model = load_base(path, "auto", revision=revisions.get(path), **loading)
        dtypes.append(str(model.dtype).removeprefix("torch."))
        return model

    policies = {"policy": policy, "exported": exported}
    if policy.adapter is not None:
        policies["base"] = Policy(policy.model, None)
    logps = {name: torch.cat(values) for name, values in policy_logps(policies, rows, load).items()}
    found, expected = logps.pop("exported"), logps.pop("policy")
    measured = {"dtype": dtypes[0], "tokens": len(found)}
    measured |= compare(found, expected, logps, TOLERANCES[dtypes[0]])
    if measured["fault"] is not None:
        raise ChildError(
            "the exported model is not the policy, and was removed: its log-probabilities differ from the policy's by "
            f"{measured['difference']:.3g} nats per token (root mean square over {measured['tokens']} tokens; "
            + (
                f"the tolerance is {measured['tolerance']:g})."
                if measured["fault"] == "tolerance"
                else f"from the base model's by {measured['others']['base']['difference']:.3g})."
            )
        )
    return measured
