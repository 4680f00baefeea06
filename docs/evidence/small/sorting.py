"""
A task whose quality gaps are known by construction, small enough for a CPU: sort eight digits, with answers of five qualities.

Quality 5 is the sorted digits, each point less has one of them wrong. The reference learns to answer `Sort : ... =` with any quality and
`Quality q : Sort : ... =` with quality q: `Quality 5 :` asks for the best answer, as the prompt p of Sr-DPO does
(https://huggingface.co/papers/2405.21040). A pair is two answers of different quality, and its gap is the difference.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


DIGITS, BEST = 8, 5
BEST_PROMPT = f"Quality {BEST} :"  # p
PAD, EOS = "<pad>", "</s>"
WORDS = [PAD, EOS, *"0123456789", "Sort", ":", "Quality", "="]


@dataclass
class SortingPair:
    """Two answers; `chosen` has the higher quality, by `gap` points, unless the label is `flipped`."""

    prompt: str
    chosen: str
    rejected: str
    gap: int
    flipped: bool = False


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def problem(generator: random.Random) -> tuple[str, list[int]]:
    digits = [generator.randrange(10) for _ in range(DIGITS)]
    return f"Sort : {' '.join(map(str, digits))} =", sorted(digits)


def answer(generator: random.Random, solution: list[int], quality: int) -> str:
    """The solution with `BEST - quality` digits replaced by others."""
    digits = list(solution)
    for i in generator.sample(range(DIGITS), BEST - quality):
        digits[i] = generator.choice([d for d in range(10) if d != solution[i]])
    return " " + " ".join(map(str, digits))


def make_pairs(count: int, seed: int, flipped: float = 0.0) -> list[SortingPair]:
    """
    Pairs of new problems; a share `flipped` of them has its label the wrong way round. The first n of more pairs are those of n, and
    flipping changes nothing else.
    """
    generator, labels = random.Random(seed), random.Random(f"labels {seed}")
    pairs = []
    for _ in range(count):
        prompt, solution = problem(generator)
        worse, better = sorted(generator.sample(range(1, BEST + 1), 2))
        texts = answer(generator, solution, better), answer(generator, solution, worse)
        wrong = labels.random() < flipped
        chosen, rejected = reversed(texts) if wrong else texts
        pairs.append(SortingPair(prompt, chosen, rejected, better - worse, wrong))
    return pairs


def make_reference(path: Path, seed: int, answers: int = 24000, batch: int = 64) -> None:
    """Train the model that is the start and the reference of every run of a seed, on answers of all qualities, and save it."""
    generator, tokenizer = random.Random(seed), make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, answers // batch)
    for _ in range(answers // batch):
        prompts, completions = [], []
        for _ in range(batch):
            prompt, solution = problem(generator)
            quality = generator.randint(1, BEST)
            prompts.append(f"Quality {quality} : {prompt}" if generator.random() < 0.7 else prompt)
            completions.append(answer(generator, solution, quality))
        texts = [f"{p}{c} {EOS}" for p, c in zip(prompts, completions, strict=True)]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        after = torch.arange(inputs["input_ids"].size(1)) >= torch.tensor([[len(p.split())] for p in prompts])
        labels = inputs["input_ids"].masked_fill(~after | (inputs["attention_mask"] == 0), -100)
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def to_ids(tokenizer, pairs: list[SortingPair], side: str, prefix: str = "") -> torch.Tensor:
    """Prompts and answers of one side, EOS included, of shape `(N, L)`: all prompts have the same length, and so have the answers."""
    texts = [f"{prefix} {pair.prompt}{getattr(pair, side)} {EOS}" for pair in pairs]
    return tokenizer(texts, return_tensors="pt")["input_ids"]


@torch.no_grad()
def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """`log π(y|x)` in nats, of shape `(N,)`, of what `to_ids` returns."""
    logits = model(ids, logits_to_keep=DIGITS + 2, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, -DIGITS - 1 :, None]).sum((1, 2))


@torch.no_grad()
def right_digits(model, tokenizer, count: int, seed: int) -> float:
    """Share of right digits in the policy's own answers to new problems, at temperature 1."""
    generator = random.Random(seed)
    prompts, solutions = zip(*(problem(generator) for _ in range(count)), strict=True)
    torch.manual_seed(seed)
    inputs = tokenizer(list(prompts), return_tensors="pt")
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        top_k=0,
        temperature=1.0,
        max_new_tokens=DIGITS,
        min_new_tokens=DIGITS,
        pad_token_id=tokenizer.pad_token_id,
    )
    wanted = tokenizer([" ".join(map(str, solution)) for solution in solutions], return_tensors="pt")["input_ids"]
    return float((out[:, -DIGITS:] == wanted).float().mean())
