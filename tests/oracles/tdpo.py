"""
TDPO (https://huggingface.co/papers/2404.11999) written out in float64 from full logits, one function per quantity of
the paper. It is an oracle: it materialises every `(2B, T, V)` tensor and does nothing clever.

Conventions. The first `B` of `2B` rows are the chosen responses, the last `B` the rejected ones. `logits[:, t]` is the
distribution over `labels[:, t]` (the shift is the caller's), and `mask[:, t]` is 1 where `labels[:, t]` belongs to the
response. With `s_t = [x, y_<t]`:

    logratio(x, y) = sum_t  log pi(y_t | s_t) - log pi_ref(y_t | s_t)
    SeqKL(x, y)    = sum_t  KL( pi_ref(. | s_t) || pi(. | s_t) )
                   = sum_t  sum_v pi_ref(v | s_t) (log pi_ref(v | s_t) - log pi(v | s_t))
    u              = beta logratio(x, y_w) - beta logratio(x, y_l)

    TDPO1 = -log sigmoid( u - (beta SeqKL(x, y_l) - beta SeqKL(x, y_w)) )
    TDPO2 = -log sigmoid( u - alpha (beta SeqKL(x, y_l) - sg[beta SeqKL(x, y_w)]) )
    reward(x, y) = beta (logratio(x, y) + SeqKL(x, y)), for the logs
"""

import torch


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`log pi(y_t | s_t)`, shape `(2B, T)`, masked positions included."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)  # (2B, T, V)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def sequence_sum(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the response's tokens, shape `(2B,)`. Masked positions are replaced, not multiplied by zero."""
    return torch.where(mask.bool(), per_token, torch.zeros_like(per_token)).sum(dim=1)


def logratio(
    policy_logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`logratio(x, y)`, shape `(2B,)`. No gradient to the reference."""
    return sequence_sum(token_logps(policy_logits, labels) - token_logps(ref_logits.detach(), labels), mask)


def sequence_kl(policy_logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`SeqKL(x, y)`, shape `(2B,)`: the reference first, over the whole vocabulary, at the response's positions."""
    policy_log_probs = torch.log_softmax(policy_logits.double(), dim=-1)  # (2B, T, V)
    ref_log_probs = torch.log_softmax(ref_logits.detach().double(), dim=-1)  # (2B, T, V)
    kl = (ref_log_probs.exp() * (ref_log_probs - policy_log_probs)).sum(dim=-1)  # (2B, T)
    return sequence_sum(kl, mask)


def tdpo_loss_from_logits(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float,
    alpha: float,
    variant: str,
) -> torch.Tensor:
    """TDPO1 or TDPO2 as the equations above, one value per pair, shape `(B,)`."""
    logratio_w, logratio_l = logratio(policy_logits, ref_logits, labels, mask).chunk(2)
    kl_w, kl_l = sequence_kl(policy_logits, ref_logits, mask).chunk(2)
    u = beta * logratio_w - beta * logratio_l
    if variant == "tdpo1":
        return -torch.nn.functional.logsigmoid(u - (beta * kl_l - beta * kl_w))
    if variant == "tdpo2":
        return -torch.nn.functional.logsigmoid(u - alpha * (beta * kl_l - (beta * kl_w).detach()))
    raise ValueError(variant)


def tdpo_rewards_from_logits(
    policy_logits: torch.Tensor, ref_logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's rewards of the chosen and of the rejected responses, `(B,)` each; the same for both variants."""
    rewards = beta * (logratio(policy_logits, ref_logits, labels, mask) + sequence_kl(policy_logits, ref_logits, mask))
    chosen_rewards, rejected_rewards = rewards.detach().chunk(2)
    return chosen_rewards, rejected_rewards


def sft_loss_from_logits(policy_logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TRL's `"sft"` term, a scalar: the mean negative log-likelihood of all the batch's chosen tokens."""
    chosen_logps, _ = token_logps(policy_logits, labels).chunk(2)
    chosen_mask, _ = mask.bool().chunk(2)
    return -chosen_logps[chosen_mask].mean()
