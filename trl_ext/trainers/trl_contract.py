"""
What this package, and any subclass of [`ShiftedDPOTrainer`], relies on in TRL 1.16 beyond its documented API: names, their parameters,
and the behaviour of `DPOTrainer._compute_loss`. `trl-ext doctor` and `tests/test_trl_contract.py` (for `make try-trl`) check it. An
additional parameter with a default breaks nothing.
"""

import contextlib
import importlib
import inspect
import tempfile
from collections.abc import Iterator


# Names TRL does not export -> their parameters. For an autograd function, those of `forward` after `ctx`.
NOT_EXPORTED = {
    "trl.data_utils._tokenize": "processing_class input apply_chat_template_kwargs",
    "trl.data_utils.common_prefix_length": "ids other_ids",
    "trl.kernels.chunked_logprob._addmm_fp32": "acc a b",
    "trl.models.utils.disable_gradient_checkpointing": "model gradient_checkpointing_kwargs",
    "trl.trainer.dpo_trainer.DataCollatorForPreference": "pad_token_id max_length truncation_mode pad_to_multiple_of "
    "return_tensors",
    "trl.trainer.utils.FusedCausalLMOutput": "loss log_probs entropy log_sum_sq_probs mean_logits is_top1 label_mask aux_loss",
    "trl.trainer.utils.generate_model_card": "base_model model_name hub_model_id dataset_name tags wandb_url trackio_url "
    "trainer_name trainer_citation template_file paper_title paper_id comet_url",
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.trainer.utils.global_then_local_main_first": "",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "params",
    "trl.trainer.utils.pad": "tensors padding_value padding_side pad_to_multiple_of",
}
NOT_EXPORTED = {tuple(name.rsplit(".", 1)): tuple(names.split()) for name, names in NOT_EXPORTED.items()}

# Methods of DPOTrainer that are overridden or called -> their parameters
METHODS = {
    # The order matters: the trainers pass the first ones by position
    "__init__": "self model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers quantization_config peft_config",
    "_compute_loss": "self model inputs return_outputs",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_precompute_ref_logps": "self dataset name batch_size",
    "_prepare_dataset": "self dataset processing_class args dataset_name",
    "_set_signature_columns_if_needed": "self",
    "create_model_card": "self model_name dataset_name tags",
    "compute_ref_log_probs": "self model inputs",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",  # calls `_compute_loss`
}
METHODS = {name: tuple(names.split()) for name, names in METHODS.items()}


def parameters(function) -> tuple[inspect.Parameter, ...]:
    """The parameters of a function; for an autograd function, those of `forward` after `ctx`."""
    import torch

    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return tuple(inspect.signature(function.forward).parameters.values())[1:]
    return tuple(inspect.signature(function).parameters.values())


def missing(found: tuple[inspect.Parameter, ...], expected: tuple[str, ...]) -> str | None:
    """Why a signature cannot be called with the `expected` parameters, in this order; `None` if it can."""
    names = tuple(parameter.name for parameter in found)
    if tuple(name for name in names if name in expected) != expected:
        return f"takes {names}, not {expected}"
    catching = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in found if p.default is p.empty and p.kind not in catching and p.name not in expected]
    return f"needs {needed} too" if needed else None


def broken() -> list[str]:
    """What differs in the installed TRL, one line each; empty if the contract holds."""
    from trl import DPOTrainer

    problems = []
    for (module, name), expected in NOT_EXPORTED.items():
        try:
            problem = missing(parameters(getattr(importlib.import_module(module), name)), expected)
        except (ImportError, AttributeError) as error:
            problem = f"is gone ({error})"
        problems += [f"{module}.{name} {problem}"] * (problem is not None)
    for name, expected in METHODS.items():
        method = inspect.getattr_static(DPOTrainer, name, None)
        problem = "is gone" if method is None else missing(parameters(method), expected)
        problems += [f"DPOTrainer.{name} {problem}"] * (problem is not None)
    try:
        return problems or behaviour()
    except Exception as error:  # another TRL may raise anything
        return [f"DPOTrainer._compute_loss raises {type(error).__name__}: {error}"]


# The behaviour of `_compute_loss` with a given callable, buffers and outputs


@contextlib.contextmanager
def tiny_trainer() -> Iterator:
    """Make a `DPOTrainer` on two pairs and a Llama of one layer, in memory."""
    from datasets import Dataset
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(
        vocab_size=5, max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes
    )
    rows = [
        {"prompt": "a b", "chosen": " c a", "rejected": " b"},
        {"prompt": "b", "chosen": " a", "rejected": " c c a"},
    ]
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as output_dir:
        yield DPOTrainer(
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            args=DPOConfig(output_dir, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        )
    if not silent:
        enable_progress_bars()


def behaviour() -> list[str]:
    """
    Call `DPOTrainer._compute_loss` as [`ShiftedDPOTrainer`] does, with made-up log-probabilities, and compare the loss, its gradient and the
    rewards with DPO's equations.
    """
    import torch
    import torch.nn.functional as F
    from trl.trainer.utils import FusedCausalLMOutput

    with tiny_trainer() as trainer:
        batch = trainer.data_collator(
            list(trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]))
        )
        mask = batch["completion_mask"][:, 1:]
        generator = torch.Generator().manual_seed(0)
        log_probs = (torch.randn(mask.shape, generator=generator) * mask).requires_grad_()
        ref_logps, weights = torch.randn(2, 2, generator=generator), torch.rand(mask.shape, generator=generator)
        outputs = FusedCausalLMOutput(
            log_probs=log_probs,
            log_sum_sq_probs=log_probs.detach() - weights,
            entropy=torch.zeros(mask.shape),
            mean_logits=torch.zeros(mask.shape),
            is_top1=mask.bool(),
        )
        calls = []

        def policy(**kwargs):
            calls.append(kwargs)
            if not kwargs.get("fused_lm_head"):
                return "logits"
            for buffer, values in zip(buffers.values(), ref_logps, strict=True):
                buffer.copy_(values)
            return outputs

        def called(return_outputs=False, **attributes):
            nonlocal buffers
            calls.clear()
            buffers = {f"ref_{side}_logps": torch.zeros(2) for side in ("chosen", "rejected")}
            vars(trainer).update(attributes, precompute_ref_logps=True)
            return trainer._compute_loss(policy, {**batch, **buffers}, return_outputs)

        buffers = {}
        logratios = log_probs.sum(dim=1).view(2, 2) - ref_logps
        losses = -F.logsigmoid(trainer.beta * (logratios[0] - logratios[1]))
        pair_weights = ((weights * mask).sum(dim=1) / mask.sum(dim=1)).exp().view(2, 2).prod(dim=0)
        loss = called()
        if len(calls) != 1 or not {"input_ids", "attention_mask", "labels", "fused_lm_head"} <= calls[0].keys():
            return ["DPOTrainer._compute_loss calls another model than its argument, or with other inputs"]
        gradient, expected = (torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (loss, losses.mean()))
        summed = "does not sum `log_probs`, or does not read the reference's log-probabilities after the call"
        found = {
            summed: torch.allclose(loss, losses.mean()),
            "has another gradient than DPO's": torch.allclose(gradient, expected),
        }
        rewards = trainer.beta * logratios.mean(dim=1)
        recorded = [trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
        found["has other rewards than β times the log-ratios"] = torch.allclose(torch.tensor(recorded), rewards)
        weighted = called(use_weighting=True)
        found["does not weigh a pair by the mean of `log_probs − log_sum_sq_probs`"] = torch.allclose(
            weighted, (losses * pair_weights).mean()
        )
        found["has a loss without a loss type"] = called(loss_types=[], loss_weights=[], use_weighting=False) == 0.0
        return [f"DPOTrainer._compute_loss {problem}" for problem, holds in found.items() if not holds]
