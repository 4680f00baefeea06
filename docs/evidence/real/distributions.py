"""
Log-probabilities of completions, and exact KL between a policy and a reference, from whole distributions and with no code of the trainers.

In: causal LMs whose logits are their head's outputs, and token ids. Out: sums over the positions of each completion.
"""

from collections import defaultdict

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


def predicting_states(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], rows: int
) -> torch.Tensor:
    """
    The states that predict the completions' T tokens, one completion behind the other, `(T, H)`. The model's body is called without its
    head, and so without a trainer's autocast.
    """
    states = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        ids = [torch.tensor(prompts[i] + completions[i], device=model.device) for i in batch]
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        body = model.base_model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask, use_cache=False)
        for row, i in zip(body.last_hidden_state, batch, strict=True):
            first = len(prompts[i]) - 1  # the prompt's last token predicts the completion's first
            states[i] = row[first : first + len(completions[i])]
    return torch.cat(states)


@torch.no_grad()
def sums_over_completions(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    rows: int = 32,
    positions: int = 512,
) -> dict[str, torch.Tensor]:
    """
    Sums over each completion's positions t, of exact terms over the whole vocabulary.

    Args:
        policy, reference (`PreTrainedModel`):
            π and π_ref. If the reference is `None`, `logps` is all there is.
        prompts, completions (`list[list[int]]`):
            N of each, as token ids.
        rows (`int`, *optional*, defaults to `32`):
            Sequences in a forward.
        positions (`int`, *optional*, defaults to `512`):
            Positions whose V logits of each model are held at a time.

    Returns:
        `dict`: tensors of shape `(N,)` in float64, in nats. `logps` and `ref_logps` are the completion's log π and log π_ref, `kl` is
        Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)), `seq_kl` Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)), and `entropy` the sum of the entropies of π(·|s_t).
    """
    labels = torch.tensor([token for ids in completions for token in ids], device=policy.device)  # (T,)
    states = predicting_states(policy, prompts, completions, rows)
    ref_states = None if reference is None else predicting_states(reference, prompts, completions, rows)
    found = defaultdict(list)
    for part in torch.arange(len(labels), device=policy.device).split(positions):
        label = labels[part, None]
        log_p = policy.get_output_embeddings()(states[part]).log_softmax(-1)  # (positions, V)
        values = {"logps": log_p.gather(-1, label).squeeze(-1)}
        if reference is not None:
            log_q = reference.get_output_embeddings()(ref_states[part]).log_softmax(-1)
            values |= {
                "ref_logps": log_q.gather(-1, label).squeeze(-1),
                "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
                "seq_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
                "entropy": -(log_p.exp() * log_p).sum(-1),
            }
        for name, value in values.items():
            found[name].append(value.double().cpu())
    lengths = [len(ids) for ids in completions]
    return {name: torch.stack([of.sum() for of in torch.cat(parts).split(lengths)]) for name, parts in found.items()}
