"""
Parity: the policy that answers is the policy that was trained.

In: answers that the engine sampled from a round's policy, with their log-probabilities (`parity.jsonl`). Out: how far those are
from the ones that transformers and PEFT compute for the same tokens, which stops the run where an adapter was not applied, another
round's was, or the base is another one; and, from the same answers, the policy's KL to the initial policy (`parity.json`).

The base is loaded in the precision the engine has it in, so that what is left is rounding. A policy that is trained on an NF4
base and sampled on a 16-bit one really differs between the two: that difference is measured beside it, and accepted.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..children import ChildError, child_main
from ..data.records import read_jsonl, write_json
from ..generation.policy_identity import POLICY_NAMES, compare, root_mean_square


# Root mean square of the difference in nats per token that rounding may make. [house] Measured: 2e-7 for float32 on a CPU. The
# 16-bit bounds are not measured: they leave room for the kernels of two libraries.
TOLERANCES = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.2}


def kl_estimate(policy: list[torch.Tensor], initial: list[torch.Tensor]) -> dict[str, Any]:
    """
    Monte-Carlo estimate of `KL(π ‖ π_0)` in nats, from answers sampled from π at temperature 1: the mean over answers of
    `log π(y|x) − log π_0(y|x)`, summed over tokens. Unbiased, so it may fall below 0 where the policies hardly differ.

    Args:
        policy (`list[torch.Tensor]`), initial (`list[torch.Tensor]`):
            Log-probabilities of the tokens of each answer.

    Returns:
        `dict`: `per_answer`, its `standard_error` over answers, `per_token`, and how many `answers`.
    """
    sums = torch.stack([(p.double() - q.double()).sum() for p, q in zip(policy, initial, strict=True)])
    count = len(sums)
    return {
        "per_answer": sums.mean().item(),
        "standard_error": (sums.std() / math.sqrt(count)).item() if count > 1 else None,
        "per_token": sums.sum().item() / sum(len(p) for p in policy),
        "answers": count,
    }


# The log-probabilities of a policy, by transformers and PEFT


def load_base(
    model: str,
    dtype: str,
    quantization_config: BitsAndBytesConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_cpu: bool = False,
) -> PreTrainedModel:
    """A base model for inference, on the GPU if there is one and it may be used."""
    device = "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=quantization_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        device_map={"": device},
    )
    return base.eval()


@torch.no_grad()
def answer_logps(model: torch.nn.Module, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """
    Log-probabilities of answers given their prompts, one tensor of shape `(T,)` each. One answer at a time: padding would
    change 16-bit results, and there are few of them.
    """
    logps = []
    for row in rows:
        ids = torch.tensor(row["prompt_token_ids"] + row["token_ids"], device=model.device)
        length = len(row["token_ids"])
        logits = model(input_ids=ids[None]).logits[0, -length - 1 : -1]  # (T, V)
        logps.append(logits.float().log_softmax(-1).gather(-1, ids[-length:, None])[:, 0].cpu())
    return logps


def policy_logps(
    policies: dict[str, dict[str, str | None]],
    rows: list[dict[str, Any]],
    load: Callable[[str], PreTrainedModel],
) -> dict[str, list[torch.Tensor]]:
    """
    Log-probabilities of the same answers under several policies; each base is loaded once, adapters are put on it in turn.

    Args:
        policies (`dict[str, dict]`):
            `model` and `adapter` (or `None`) of each, by name.
        rows (`list[dict]`):
            Answers: `prompt_token_ids` and `token_ids`.
        load (`Callable[[str], PreTrainedModel]`):
            Loads a base.
    """
    if any(policy["adapter"] for policy in policies.values()):
        from peft import PeftModel  # seconds that full fine-tuning does not need

    logps = {}
    for path in dict.fromkeys(policy["model"] for policy in policies.values()):
        base = load(path)
        for name, policy in policies.items():
            if policy["model"] != path:
                continue
            if policy["adapter"] is None:
                logps[name] = answer_logps(base, rows)
                continue
            # In the base's precision, as vLLM has it
            adapted = PeftModel.from_pretrained(base, policy["adapter"], autocast_adapter_dtype=False).eval()
            logps[name] = answer_logps(adapted, rows)
            base = adapted.unload()
        del base
    return logps


def engine_quantization(quantization: str | None, dtype: str) -> BitsAndBytesConfig | None:
    """The engine's quantization of the base, where transformers has the same: vLLM's bitsandbytes is NF4 with nested scales."""
    if quantization != "bitsandbytes":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def fault_message(job: dict[str, Any], measured: dict[str, Any]) -> str:
    """What is wrong, by how much, and the way out."""
    policy = job["policies"]["policy"]
    what = f"the adapter {policy['adapter']}" if policy["adapter"] else f"the model {policy['model']}"
    message = (
        f"The engine did not answer with the policy of round {job['round']}, {what}: the log-probabilities of its answers "
        f"differ from the policy's by {measured['difference']:.3g} nats per token (root mean square over "
        f"{measured['tokens']} tokens)"
    )
    if measured["fault"] == "tolerance":
        message += (
            f", and the tolerance is {measured['tolerance']:g}. It has another base model, another adapter or another "
            "precision than the recipe says. If this is its rounding, raise `parity.tolerance`."
        )
    else:
        nearest = measured["others"][measured["fault"]]["difference"]
        message += (
            f", and from those of {POLICY_NAMES[measured['fault']]} by {nearest:.3g}. What the round made was not applied, or is "
            "not the file that it was."
        )
    return f"{message} To generate anew, delete {' and '.join(job['answers'])}, and run again."


def first_names(policies: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Each name with the first name of the same policy."""
    return {name: next(n for n, p in policies.items() if p == policy) for name, policy in policies.items()}


def main(job: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    """
    The child process: compare, estimate the KL, and write both down.

    Raises:
        [`~aries.children.ChildError`]: the answers are not from the policy.
    """
    rows = read_jsonl(Path(job["samples"]))
    if not rows:  # every prompt was too long
        write_json(Path(job["output"]), {"answers": 0, "kl_to_initial": None})
        return
    dtype = rows[0]["dtype"]
    quantization = engine_quantization(job["quantization"], dtype)

    def load(path: str) -> PreTrainedModel:
        return load_base(path, dtype, quantization, **job["loading"])

    first = first_names(job["policies"])
    logps = policy_logps({name: job["policies"][name] for name in dict.fromkeys(first.values())}, rows, load)
    per_token = {name: torch.cat(values) for name, values in logps.items()}
    policy = per_token.pop("policy")
    engine = torch.tensor([logp for row in rows for logp in row["logps"]])
    tolerance = TOLERANCES[dtype] if job["tolerance"] is None else job["tolerance"]
    measured = {"answers": len(rows), "tokens": len(policy), "dtype": dtype}
    measured |= compare(engine, policy, per_token, tolerance)
    if measured["fault"] is not None:
        raise ChildError(fault_message(job, measured))
    del measured["fault"]
    measured["kl_to_initial"] = kl_estimate(logps["policy"], logps[first["initial"]])
    if job["trained_on"] is not None:
        measured["trained_precision_difference"] = root_mean_square(policy, torch.cat(as_trained(job, rows)))
    write_json(Path(job["output"]), measured)


def as_trained(job: dict[str, Any], rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The policy's log-probabilities on the 4-bit base that it is trained on."""
    from trl import ModelConfig, get_quantization_config  # seconds that only this needs

    from ...trainers.upstream import keep_nf4_trainable

    model_args = ModelConfig(**job["trained_on"])

    def load(path: str) -> PreTrainedModel:
        base = load_base(path, model_args.dtype, get_quantization_config(model_args), **job["loading"])
        keep_nf4_trainable(base)  # the kernel of training, not the one of inference
        return base

    return policy_logps({"policy": job["policies"]["policy"]}, rows, load)["policy"]


if __name__ == "__main__":
    child_main(main)
