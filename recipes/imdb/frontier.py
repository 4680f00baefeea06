"""
Measures the frontier of the IMDb study, reward against KL, on the checkpoints of its trainings.

    python recipes/imdb/frontier.py --reference data/gpt2-large-sft-imdb data/gpt2-large-tdpo-imdb data/gpt2-large-dpo-imdb

In: the SFT model, the trainings' output directories, and the test prompts of prepare.py. Out: frontier.csv, a row for each checkpoint and one for
the reference, step 0. The policy continues every prompt once: `reward` is the mean probability of the classifier's POSITIVE, `kl` the mean of
Σ_t KL(π(.|s_t) ‖ π_ref(.|s_t)) in nats, with whole distributions, `entropy` that of π in nats per token. `seq_kl_*` are Σ_t KL(π_ref ‖ π) on the
test pairs, as the training logged them.
"""

import argparse
import csv
import json
import re
from pathlib import Path

import torch
from datasets import load_dataset
from pairs import load_policy, sample
from sentiment import positive
from transformers import PreTrainedModel, PreTrainedTokenizerBase


PROMPTS_AT_ONCE = 64  # two of these times 64 tokens times 50,257 float32 logits are 1.6 GB
LOGGED = {
    "seq_kl_chosen": "eval_position_kl/chosen",
    "seq_kl_rejected": "eval_position_kl/rejected",
    "accuracy": "eval_rewards/accuracies",
}


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a training, with their steps, in order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def logged(checkpoint: Path, step: int) -> dict[str, float | None]:
    """What the training measured on the test pairs at this step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entry = {key: value for row in history if row["step"] == step for key, value in row.items()}
    return {column: entry.get(key) for column, key in LOGGED.items()}


@torch.no_grad()
def measure(
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> dict[str, float]:
    texts, kl, entropy, tokens = [], 0.0, 0.0, 0
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        asked = prompts[start : start + PROMPTS_AT_ONCE]
        found, ids, mask = sample(policy, tokenizer, asked)
        length = ids.size(1) - mask.size(1)
        attention = torch.cat(
            [tokenizer(asked, padding=True, return_tensors="pt")["attention_mask"].to(mask), mask], 1
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": attention.long(),
            "position_ids": (attention.long().cumsum(1) - 1).clamp(min=0),
        }
        log_p, log_q = (
            model(**inputs).logits[:, length - 1 : -1].float().log_softmax(-1) for model in (policy, reference)
        )  # (N, R, V)
        kl += ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum().item()
        entropy -= ((log_p.exp() * log_p).sum(-1) * mask).sum().item()
        tokens += int(mask.sum())
        texts += found
    rewards = positive(prompts, texts)
    return {"reward": sum(rewards) / len(rewards), "kl": kl / len(prompts), "entropy": entropy / tokens}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure reward and KL of the IMDb study's checkpoints.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output directories of the trainings")
    parser.add_argument("--reference", required=True, help="the SFT model")
    parser.add_argument("--prompts", type=Path, default=Path("recipes/imdb/build/prompts"), help="of prepare.py")
    parser.add_argument("--output", type=Path, default=Path("recipes/imdb/build/frontier.csv"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    prompts = load_dataset("json", data_files=str(args.prompts / "test.jsonl"), split="train")["prompt"][:]
    reference, tokenizer = load_policy(args.reference)
    columns = ["run", "step", "reward", "kl", "entropy", *LOGGED]
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: dict) -> None:
            row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(row)
            file.flush()
            print(row, flush=True)

        torch.manual_seed(args.seed)
        write({"run": Path(args.reference).name, "step": 0, **measure(reference, reference, tokenizer, prompts)})
        for run in args.runs:
            for step, path in checkpoints(run):
                policy, _ = load_policy(str(path))
                torch.manual_seed(args.seed)
                measured = measure(policy, reference, tokenizer, prompts)
                write({"run": run.name, "step": step, **measured, **logged(path, step)})


if __name__ == "__main__":
    main()
