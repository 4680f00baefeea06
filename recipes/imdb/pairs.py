"""
Makes the preference pairs of the IMDb study: the SFT model continues every prompt four times, the classifier scores the continuations, and
of each two the more positive one is chosen.

    python recipes/imdb/pairs.py --model data/gpt2-large-sft-imdb

In: the prompts of prepare.py. Out: train.jsonl and test.jsonl, TRL preference datasets, up to six pairs for a prompt, with the scores.
Two continuations with the same score or the same text are no pair; they are counted.
"""

import argparse
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
from datasets import load_dataset
from sentiment import positive
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


# 4 completions, 6 pairs: DPO (https://huggingface.co/papers/2305.18290), appendix C.1, whose study TDPO's repeats
SAMPLES = 4
NEW_TOKENS = 64  # our choice: neither paper says how long a continuation is
PROMPTS_AT_ONCE = 256


def load_policy(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to sample from, on the GPU in bfloat16 if there is one, and its tokenizer, which may lack a padding token."""
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if cuda else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], samples: int = 1
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """
    Continue prompts, at temperature 1 over the whole vocabulary, without what the model's `generation_config.json` says.

    Returns:
        `tuple`: the continuations as text, those of a prompt one after the other; the tokens, prompts included, of shape `(N, P + R)`;
        and the mask of the continuations' tokens, EOS included, of shape `(N, R)`.
    """
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    ids = model.generate(
        **batch,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=samples,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = ids[:, batch["input_ids"].size(1) :]
    ended = new == tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.long() == 0  # up to the first EOS, which counts
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(new, mask, strict=True)]
    return texts, ids, mask


def continues(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> bool:
    """Whether the prompt's tokens stay the same if the two are tokenized together, as a trainer does."""
    ids = tokenizer(prompt)["input_ids"]
    return tokenizer(prompt + text)["input_ids"][: len(ids)] == ids


def make_pairs(prompt: str, texts: list[str], scores: list[float], dropped: Counter[str]) -> list[dict]:
    """
    Every two continuations, the one with the higher score chosen.

    Example:

    ```python
    >>> make_pairs("I", [" hate", " love"], [0.1, 0.9], Counter())
    [{'prompt': 'I', 'chosen': ' love', 'rejected': ' hate', 'chosen_score': 0.9, 'rejected_score': 0.1}]
    ```
    """
    rows = []
    for a, b in combinations(range(len(texts)), 2):
        if texts[a] == texts[b] or scores[a] == scores[b]:
            dropped["identical_answers" if texts[a] == texts[b] else "no_margin"] += 1
            continue
        w, l = (a, b) if scores[a] > scores[b] else (b, a)  # noqa: E741
        answers = {"chosen": texts[w], "rejected": texts[l]}
        rows.append({"prompt": prompt, **answers, "chosen_score": scores[w], "rejected_score": scores[l]})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the preference pairs of the IMDb study.")
    parser.add_argument("--model", required=True, help="the SFT model, a directory or its id on the Hub")
    parser.add_argument("--prompts", type=Path, default=Path("recipes/imdb/build/prompts"), help="of prepare.py")
    parser.add_argument("--output", type=Path, default=Path("recipes/imdb/build/pairs"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, tokenizer = load_policy(args.model)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        prompts = load_dataset("json", data_files=str(args.prompts / f"{split}.jsonl"), split="train")["prompt"]
        path, pairs, dropped = args.output / f"{split}.jsonl", 0, Counter()
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                asked = prompts[start : start + PROMPTS_AT_ONCE]
                texts, _, _ = sample(model, tokenizer, asked, SAMPLES)
                scores = positive([prompt for prompt in asked for _ in range(SAMPLES)], texts)
                for i, prompt in enumerate(asked):
                    mine = range(i * SAMPLES, (i + 1) * SAMPLES)
                    usable = [j for j in mine if texts[j].strip() and continues(tokenizer, prompt, texts[j])]
                    dropped["unusable_answer"] += SAMPLES * (SAMPLES - 1) // 2 - len(usable) * (len(usable) - 1) // 2
                    rows = make_pairs(prompt, [texts[j] for j in usable], [scores[j] for j in usable], dropped)
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    pairs += len(rows)
        temporary.replace(path)
        print(f"{path}: {pairs} pairs of {len(prompts)} prompts; left out: {dict(+dropped)}", flush=True)


if __name__ == "__main__":
    main()
