"""
Makes the quickstart's input: a tiny untrained model and the problems it will learn, sorting digits.

    python recipes/quickstart/prepare.py --output recipes/quickstart/build

In: a seed. Out, byte for byte the same every time:

    model/        a random Llama of 0.1M parameters with a word-level tokenizer and a chat template
    sft.jsonl     the warm start, in the order it is to be trained in: `prompt`, `completion`, `draft`
    train.jsonl   prompts for the rounds: `prompt`, `solution`
    eval.jsonl    held-out prompts, likewise

No problem is in two of the files. A row of sft.jsonl with a `draft` teaches refining: the SFT stage renders its prompt with the
recipe's template, so the template is not written down here. No model is trained here and nothing is downloaded.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>"
WORDS = [*"0123456789", "Sort", ":", "Draft", ".", "Write", "a", "better", "answer"]

# Every turn ends with EOS: TRL adds one to non-conversational rows only.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' ' + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; words are separated by spaces."""
    specials = [PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT]
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A random Llama. Two heads, because vLLM's CPU attention wants heads of 32 or more."""
    torch.manual_seed(seed)
    token_ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            **token_ids,
        )
    )
    model.generation_config = GenerationConfig(**token_ids)
    return model


def problems(rng: random.Random, digits: int, count: int) -> list[list[str]]:
    """`count` different lists of random digits."""
    if count > 10**digits // 2:
        raise ValueError(f"{count} different problems of {digits} digits were asked for; at most {10**digits // 2}.")
    seen = {}  # a dict keeps the order of insertion, a set does not
    while len(seen) < count:
        seen[tuple(rng.choices("0123456789", k=digits))] = None
    return [list(problem) for problem in seen]


def miscounted(rng: random.Random, solution: list[str]) -> list[str]:
    """The error of a weak model: in order, but some digits are there too often and others not often enough."""
    draft = list(solution)
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(draft))
        draft[index] = str(min(9, max(0, int(draft[index]) + rng.choice([-2, -1, 1, 2]))))
    return sorted(draft)


def edited(rng: random.Random, solution: list[str]) -> list[str]:
    """A local corruption: one or two edits, which may leave the draft out of order or of another length."""
    draft = list(solution)
    for _ in range(rng.randint(1, 2)):
        index = rng.randrange(len(draft))
        edit = rng.choice(["replace", "replace", "swap", "drop", "double"])
        if edit == "replace":
            draft[index] = rng.choice("0123456789")
        elif edit == "swap":
            other = rng.randrange(len(draft))
            draft[index], draft[other] = draft[other], draft[index]
        elif edit == "drop" and len(draft) > 1:
            del draft[index]
        elif edit == "double":
            draft.insert(index, draft[index])
    return draft


def draft_of(rng: random.Random, solution: list[str]) -> list[str]:
    """
    What is to be refined: 30 % are right already (keep what is right), and the rest are half and half of the two kinds of
    error. After the warm start, the second answer beats the first by 21 points so, by 5 with local edits alone (three seeds).
    """
    kind = rng.choices(["right", "miscounted", "edited"], weights=[30, 35, 35])[0]
    if kind == "right":
        return list(solution)
    return miscounted(rng, solution) if kind == "miscounted" else edited(rng, solution)


def user_message(problem: list[str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Sort : " + " ".join(problem)}]


def prompt_rows(problems: list[list[str]]) -> list[dict]:
    return [{"prompt": user_message(problem), "solution": " ".join(sorted(problem))} for problem in problems]


def sft_rows(
    rng: random.Random, problems: list[list[str]], direct_rows: int, refine_rows: int, direct_share: float
) -> list[dict]:
    """
    Direct rows first, then refinement rows with a few direct ones among them, over the same problems again and again.

    The order is the curriculum: direct answering starts underfit and refining ahead of it, which is what leaves the rounds
    something to do. Train with `train_sampling_strategy: sequential`.
    """
    rows = []
    for index in range(direct_rows + refine_rows):
        problem = problems[index % len(problems)]
        solution = sorted(problem)
        direct = index < direct_rows or rng.random() < direct_share
        rows.append(
            {
                "prompt": user_message(problem),
                "completion": [{"role": "assistant", "content": " ".join(solution)}],
                "draft": None if direct else " ".join(draft_of(rng, solution)),
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data.")
    parser.add_argument("--output", type=Path, default=Path("recipes/quickstart/build"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=int, default=12, help="length of a problem")
    parser.add_argument("--train_size", type=int, default=7500, help="prompts for all rounds together")
    parser.add_argument("--eval_size", type=int, default=500, help="held-out prompts")
    parser.add_argument("--sft_problems", type=int, default=4000, help="different problems in sft.jsonl")
    parser.add_argument("--sft_direct_rows", type=int, default=2560, help="rows before the first draft")
    parser.add_argument("--sft_refine_rows", type=int, default=8960, help="rows after them, most with a draft")
    parser.add_argument("--sft_direct_share", type=float, default=0.05, help="share without a draft among the latter")
    args = parser.parse_args(argv)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    print(f"{args.output / 'model'}: {model.num_parameters()} parameters, {len(tokenizer)} words")

    rng = random.Random(args.seed)
    everything = problems(rng, args.digits, args.sft_problems + args.train_size + args.eval_size)
    warm_start, rest = everything[: args.sft_problems], everything[args.sft_problems :]
    sft = sft_rows(rng, warm_start, args.sft_direct_rows, args.sft_refine_rows, args.sft_direct_share)
    write_jsonl(args.output / "sft.jsonl", sft)
    write_jsonl(args.output / "train.jsonl", prompt_rows(rest[: args.train_size]))
    write_jsonl(args.output / "eval.jsonl", prompt_rows(rest[args.train_size :]))


if __name__ == "__main__":
    main()
