"""
A controlled-generation task in the manner of TDPO's study on IMDb (https://huggingface.co/papers/2404.11999, section 5.1), small enough for
a CPU: invented reviews, a language model that has learned to write them, and a sentiment that can be counted.

A review is a few sentences, `the plot was rather dull .`. Its adjectives mostly agree with a hidden sentiment, adverbs and nouns have
unequal frequencies: there is something to lose by drifting away. The prompt is a review's beginning, the reward of a
continuation is (good adjectives - bad adjectives) / adjectives, in [-1, 1].
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .training import ON_CPU


GOOD = ("good", "great", "fine", "moving", "clever", "funny", "warm", "rich", "vivid", "superb")
BAD = ("bad", "dull", "weak", "boring", "stale", "silly", "cold", "poor", "flat", "awful")
NOUNS = ("film", "plot", "cast", "music", "acting", "ending", "story", "script", "pace", "camera", "humour", "style")
ADVERBS = ("very", "rather", "quite", "really", "simply", "often")
OTHER = ("the", "was", "seemed", "and", "but", ".")
PAD, EOS = "<pad>", "</s>"
AGREEMENT = 0.75  # share of adjectives that have the review's sentiment
LONGEST_PROMPT, NEW_TOKENS = 8, 32
# What every training on the reviews has
TRAINING = {
    "optim": "rmsprop",  # TDPO's
    "warmup_steps": 30,
    "lr_scheduler_type": "constant_with_warmup",
    "max_grad_norm": 10.0,
    "max_length": 64,
    **ON_CPU,
}


def draw(generator: random.Random, words: tuple[str, ...]) -> str:
    """A word; the n-th is 1 / n times as frequent as the first."""
    return generator.choices(words, weights=[1 / n for n in range(1, len(words) + 1)])[0]


def sentence(generator: random.Random, good: bool) -> list[str]:
    def adjective() -> str:
        return draw(generator, GOOD if good == (generator.random() < AGREEMENT) else BAD)

    words = ["the", draw(generator, NOUNS), generator.choice(("was", "seemed"))]
    if generator.random() < 0.5:
        words.append(draw(generator, ADVERBS))
    words.append(adjective())
    if generator.random() < 0.3:
        words += [generator.choice(("and", "but")), adjective()]
    return [*words, "."]


def review(generator: random.Random) -> list[str]:
    good = generator.random() < 0.5
    return [word for _ in range(generator.randint(3, 5)) for word in sentence(generator, good)]


def reward(text: str) -> float:
    """(good - bad) / (good + bad) adjectives; 0 where there is none."""
    words = text.split()
    good, bad = (sum(word in kind for word in words) for kind in (GOOD, BAD))
    return (good - bad) / (good + bad) if good + bad else 0.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, EOS, *OTHER, *NOUNS, *ADVERBS, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def make_reference(path: Path, reviews: int = 4000, epochs: int = 6, seed: int = 0) -> None:
    """Train the language model that is the start and the reference of every run, on the whole text, and save it."""
    generator, tokenizer = random.Random(seed), make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    texts = [" ".join([*review(generator), EOS]) for _ in range(reviews)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * len(texts) // 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % (len(texts) // 64) == 0:
            generator.shuffle(texts)
        start = step * 64 % len(texts)
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_prompts(count: int, seed: int) -> list[str]:
    """Beginnings of reviews, of 2 to 8 words, as in the IMDb study of DPO (https://huggingface.co/papers/2305.18290)."""
    generator = random.Random(seed)
    return [" ".join(review(generator)[: generator.randint(2, LONGEST_PROMPT)]) for _ in range(count)]


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], seed: int, batch_size: int = 256) -> list[str]:
    """One continuation of each prompt, at temperature 1 over the whole vocabulary."""
    torch.manual_seed(seed)
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def make_pairs(model, tokenizer, prompts: int, seed: int, samples: int = 4) -> list[dict[str, str]]:
    """Pairs of the reference's own continuations, as in that study: the one with the higher reward is chosen; ties are left out."""
    texts = make_prompts(prompts, seed)
    continuations = sample(model, tokenizer, [text for text in texts for _ in range(samples)], seed)
    pairs = []
    for i, prompt in enumerate(texts):
        mine = continuations[i * samples : (i + 1) * samples]
        for a in range(samples):
            for b in range(a):
                if reward(mine[a]) != reward(mine[b]):
                    chosen, rejected = sorted((mine[a], mine[b]), key=reward, reverse=True)
                    pairs.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    random.Random(seed).shuffle(pairs)
    return pairs


@dataclass
class Measured:
    """
    Of a policy's own continuations of held-out prompts, averages over them.

    Args:
        reward (`float`):
            The reward, in [-1, 1].
        kl (`float`):
            Σ_t KL(π(.|s_t) ‖ π_ref(.|s_t)) in nats: an estimate of KL(π ‖ π_ref) per continuation with exact terms.
        entropy (`float`):
            Of π(.|s_t), in nats per token.
        distinct_2 (`float`):
            Different pairs of words over all pairs.
    """

    reward: float
    kl: float
    entropy: float
    distinct_2: float


def log_probs(
    model, tokenizer, prompts: list[str], completions: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(log π(.|s_t), mask, token ids)` over the completions' positions, EOS included; shapes (N, T, V), (N, T) and (N, T)."""
    rows = [
        (tokenizer(p)["input_ids"], [*tokenizer(c)["input_ids"], tokenizer.eos_token_id][:NEW_TOKENS])
        for p, c in zip(prompts, completions, strict=True)
    ]
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        mask[i, len(p) : len(p) + len(c)] = True
    attention = torch.arange(length) < torch.tensor([[len(p) + len(c)] for p, c in rows])
    with torch.no_grad():
        logits = model(ids, attention_mask=attention.long()).logits
    return logits[:, :-1].log_softmax(-1), mask[:, 1:], ids[:, 1:]


def sequence_kl(of: torch.Tensor, to: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over sequences of Σ_t KL(of ‖ to), from log-probabilities."""
    kl = (of.exp() * (of - to)).sum(-1)
    return float((kl * mask).sum(-1).mean())


def compare(policy, reference, tokenizer, pairs: list[dict[str, str]], side: str) -> tuple[torch.Tensor, float]:
    """Of one side of the pairs: log π(y|x) − log π_ref(y|x), `(N,)`, and the mean of Σ_t KL(π_ref ‖ π), in nats."""
    prompts, texts = ([pair[key] for pair in pairs] for key in ("prompt", side))
    logps, mask, ids = log_probs(policy, tokenizer, prompts, texts)
    ref_logps, _, _ = log_probs(reference, tokenizer, prompts, texts)
    ratios = (logps - ref_logps).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (ratios * mask).sum(-1), sequence_kl(ref_logps, logps, mask)


def measure(model, reference, tokenizer, prompts: list[str], seed: int) -> Measured:
    completions = sample(model, tokenizer, prompts, seed)
    logps, mask, _ = log_probs(model, tokenizer, prompts, completions)
    ref_logps, _, _ = log_probs(reference, tokenizer, prompts, completions)
    entropy = -(logps.exp() * logps).sum(-1)
    bigrams = [pair for text in completions for pair in zip(text.split(), text.split()[1:], strict=False)]
    return Measured(
        reward=sum(map(reward, completions)) / len(completions),
        kl=sequence_kl(logps, ref_logps, mask),
        entropy=float((entropy * mask).sum() / mask.sum()),
        distinct_2=len(set(bigrams)) / max(len(bigrams), 1),
    )
