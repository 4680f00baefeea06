"""
Parity: the policy that answers is the policy that was trained.

In: answers that the engine sampled from a round's policy, with their log-probabilities (`parity.jsonl`). Out
(`parity.json`): how far these are from the ones that transformers and PEFT compute for the same tokens, and, from the same answers, the
policy's KL to the initial policy. The run stops if an adapter was not applied, is another round's, or is on the wrong base.

The base is loaded in the precision the engine has it in, so that what is left is rounding. A policy that is trained on an NF4
base and sampled on a 16-bit one really differs between the two: that difference is measured beside it, and accepted.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..children import ChildError
from ..data.records import read_jsonl, write_json
from ..generation.policy_identity import POLICY_NAMES, compare, root_mean_square
from ..policies import Comparison, Policy


# Root mean square of the difference in nats per token that rounding may make; our choice. Measured: 2e-7 for float32 on a CPU. The
# 16-bit bounds are not measured: they leave room for the kernels of two libraries.
TOLERANCES = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.2}


def kl_estimate(policy: list[torch.Tensor], initial: list[torch.Tensor]) -> dict[str, Any]:
    """
    Monte-Carlo estimate of `KL(π ‖ π_0)` in nats, from answers sampled from π at temperature 1: the mean over answers of
    `log π(y|x) − log π_0(y|x)`, summed over tokens. Unbiased, so it may fall below 0 if the policies hardly differ.

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
    policies: dict[str, Policy],
    rows: list[dict[str, Any]],
    load: Callable[[str], PreTrainedModel],
) -> dict[str, list[torch.Tensor]]:
    """
    Log-probabilities of the same answers under several policies; each base is loaded once, adapters are put on it in turn.

    Args:
        policies (`dict[str, Policy]`):
            The policies, by name.
        rows (`list[dict]`):
            Answers: `prompt_token_ids` and `token_ids`.
        load (`Callable[[str], PreTrainedModel]`):
            Loads a base.
    """
    if any(policy.adapter for policy in policies.values()):
        from peft import PeftModel  # seconds that full fine-tuning does not need

    logps = {}
    for path in dict.fromkeys(policy.model for policy in policies.values()):
        base = load(path)
        for name, policy in policies.items():
            if policy.model != path:
                continue
            if policy.adapter is None:
                logps[name] = answer_logps(base, rows)
                continue
            # In the base's precision, as vLLM has it
            adapted = PeftModel.from_pretrained(base, policy.adapter, autocast_adapter_dtype=False).eval()
            logps[name] = answer_logps(adapted, rows)
            base = adapted.unload()
        del base
    return logps


def engine_quantization(quantization: str | None, dtype: str) -> BitsAndBytesConfig | None:
    """The engine's quantization of the base, if transformers has the same: vLLM's bitsandbytes is NF4 with nested scales."""
    if quantization != "bitsandbytes":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def fault_message(comparison: Comparison, measured: dict[str, Any], answers: list[Path]) -> str:
    """What is wrong, by how much, and what to do."""
    policy = comparison.policies["policy"]
    what = f"the adapter {policy.adapter}" if policy.adapter else f"the model {policy.model}"
    message = (
        f"The engine did not answer with the policy of round {comparison.number}, {what}: the log-probabilities of its answers "
        f"differ from the policy's by {measured['difference']:.3g} nats per token (root mean square over "
        f"{measured['tokens']} tokens)"
    )
    if measured["fault"] == "tolerance":
        message += (
            f", and the tolerance is {measured['tolerance']:g}. Its base model, its adapter or its precision "
            "is not the recipe's. If the difference is only rounding, raise `parity.tolerance`."
        )
    else:
        nearest = measured["others"][measured["fault"]]["difference"]
        message += (
            f", and from those of {POLICY_NAMES[measured['fault']]} by {nearest:.3g}. The round's policy was not applied, or its "
            "file has changed."
        )
    return f"{message} To generate again, delete {' and '.join(map(str, answers))}, and type the same command."


def same_policy(policies: dict[str, Policy]) -> dict[str, str]:
    """Map each name to the first name of the same policy."""
    return {name: next(n for n, p in policies.items() if p == policy) for name, policy in policies.items()}


def distinct_logps(comparison: Comparison, rows: list[dict[str, Any]], dtype: str) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities under the policies of a comparison, in the engine's precision. Equal policies are there once, under their first name."""
    quantization = engine_quantization(comparison.quantization, dtype)
    names = dict.fromkeys(same_policy(comparison.policies).values())
    policies = {name: comparison.policies[name] for name in names}
    return policy_logps(policies, rows, lambda path: load_for(comparison, path, dtype, quantization))


def load_for(
    comparison: Comparison, path: str, dtype: str, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel:
    return load_base(path, dtype, quantization, comparison.revision, comparison.trust_remote_code, comparison.use_cpu)


def check_parity(comparison: Comparison, samples: Path, output: Path, answers: list[Path]) -> None:
    """
    Compare, estimate the KL, and write both down.

    Args:
        comparison ([`~aries.policies.Comparison`]):
            The policy, and those that it might be mistaken for.
        samples (`Path`), output (`Path`):
            What the engine sampled, and where the result goes.
        answers (`list[Path]`):
            Files to delete if the samples are not from the policy.

    Raises:
        [`~aries.children.ChildError`]: they are not.
    """
    rows = read_jsonl(samples)
    if not rows:  # every prompt was too long
        write_json(output, {"answers": 0, "kl_to_initial": None})
        return
    dtype = rows[0]["dtype"]
    logps = distinct_logps(comparison, rows, dtype)
    per_token = {name: torch.cat(values) for name, values in logps.items()}
    policy = per_token.pop("policy")
    engine = torch.tensor([logp for row in rows for logp in row["logps"]])
    tolerance = TOLERANCES[dtype] if comparison.tolerance is None else comparison.tolerance
    measured = {"answers": len(rows), "tokens": len(policy), "dtype": dtype}
    measured |= compare(engine, policy, per_token, tolerance)
    if measured["fault"] is not None:
        raise ChildError(fault_message(comparison, measured, answers))
    del measured["fault"]
    initial = same_policy(comparison.policies)["initial"]
    measured["kl_to_initial"] = kl_estimate(logps["policy"], logps[initial])
    if comparison.trained_on is not None:
        measured["trained_precision_difference"] = root_mean_square(policy, torch.cat(as_trained(comparison, rows)))
    write_json(output, measured)


def as_trained(comparison: Comparison, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The policy's log-probabilities on the 4-bit base that it is trained on."""
    from trl import ModelConfig, get_quantization_config  # seconds that only this needs

    from ...trainers.upstream import keep_nf4_trainable

    model_args = ModelConfig(**comparison.trained_on)

    def load(path: str) -> PreTrainedModel:
        base = load_for(comparison, path, model_args.dtype, get_quantization_config(model_args))
        keep_nf4_trainable(base)  # the kernel of training, not the one of inference
        return base

    return policy_logps({"policy": comparison.policies["policy"]}, rows, load)["policy"]
