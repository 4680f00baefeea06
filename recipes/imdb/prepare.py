"""
Makes the prompts of the IMDb study from `stanfordnlp/imdb` (https://huggingface.co/datasets/stanfordnlp/imdb).

    python recipes/imdb/prepare.py --output recipes/imdb/build/prompts

Out: train.jsonl (25,000 rows) and test.jsonl (512), each row with `prompt`: the first 2 to 8 tokens of a review, as text. Reviews stay as
they are, `<br />` included. The SFT needs nothing prepared: it takes the dataset itself.
"""

import argparse
import json
import random
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase


# "prefixes from the IMDB dataset of length 2-8 tokens", 25,000 of them: DPO (https://huggingface.co/papers/2305.18290), appendix C.1
SHORTEST, LONGEST = 2, 8


def prefix(tokenizer: PreTrainedTokenizerBase, review: str, generator: random.Random) -> str:
    """The review's first tokens; how many is drawn, each length as often as another."""
    ids = tokenizer(review, truncation=True, max_length=LONGEST)["input_ids"]
    return tokenizer.decode(ids[: generator.randint(SHORTEST, LONGEST)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the prompts of the IMDb study.")
    parser.add_argument("--dataset", default="stanfordnlp/imdb", help="its id on the Hub, or a directory with a copy")
    parser.add_argument("--tokenizer", default="openai-community/gpt2-large", help="whose tokens are counted")
    parser.add_argument("--train", type=int, default=25_000, help="prompts to learn from, of the training split")
    parser.add_argument("--test", type=int, default=512, help="prompts to measure on, of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("recipes/imdb/build/prompts"))
    args = parser.parse_args(argv)
    tokenizer, generator = AutoTokenizer.from_pretrained(args.tokenizer), random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("test", args.test)):
        reviews = load_dataset(args.dataset, split=split).shuffle(seed=args.seed)  # they come sorted by label
        reviews = reviews.select(range(min(count, len(reviews))))["text"]
        rows = [{"prompt": prefix(tokenizer, review, generator)} for review in reviews]
        path = args.output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
