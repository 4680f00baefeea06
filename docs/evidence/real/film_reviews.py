"""
The task of tdpo_frontier.py: a pretrained model continues openings of film reviews, and VADER's lexicon says how positive a continuation is.

Openings are filled-in templates, nothing is copied from a data set. A model continues them from Python lists of token ids, in float32. Nothing
here trains.
"""

import random
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .distributions import sums_over_completions


NEW_TOKENS = 40
SAMPLES = 4  # continuations of each opening, for up to 6 pairs

TEMPLATES = (
    "The {part} of this {length} {kind} {verb}",
    "{who} watched this {length} {kind} {when} and",
    "For a {length} {kind}, it",
    "{who} thought that the {part} of this {kind}",
    "As a {length} {kind}, this",
    "When this {length} {kind} begins, the {role}",
    "The {role} in this {length} {kind} {verb}",
    "{who} saw this {kind} {when}, and the {part}",
)
WORDS = {
    "part": "plot ending script dialogue music editing pace camerawork cast story opening lighting sound setting".split(),
    "kind": "western musical sequel remake documentary cartoon film movie picture adaptation".split(),
    "length": "two-hour three-hour short long recent French Italian Japanese black-and-white made-for-television".split(),
    "who": ["I", "We", "My sister", "My brother", "A friend of mine", "The whole family", "My neighbour", "Our class"],
    "when": ["last night", "yesterday", "on Sunday", "on a plane", "at home", "at a festival", "years ago", "twice"],
    "role": "director lead hero detective narrator father mother teacher stranger soldier".split(),
    "verb": ["is", "was", "seems", "seemed", "turned out to be", "felt"],
}
# Written for this file: reviews of either sentiment, behind which the pretrained model writes both kinds itself
BAD = (
    "This film was a waste of two hours. The jokes were stale and nobody in the cast seemed to care.",
    "I found the story weak and the characters annoying. It was the worst evening I have had in a cinema this year.",
    "The second half is a boring mess, and the ending made me angry.",
)
GOOD = (
    "This film was a joy from start to finish. The jokes were fresh and the cast was wonderful.",
    "I loved the story and its charming characters. It was the best evening I have had in a cinema this year.",
    "The second half is moving and clever, and the ending made me smile.",
)
SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


def make_openings(count: int, seed: int) -> list[str]:
    """Distinct openings of reviews, in random order; about 32,000 are possible."""
    generator, openings = random.Random(seed), {}
    while len(openings) < count:
        words = {slot: generator.choice(choices) for slot, choices in WORDS.items()}
        openings[generator.choice(TEMPLATES).format(**words)] = None
    return list(openings)


def shown_reviews(opening: str, generator: random.Random) -> str:
    """The opening behind three good reviews, three bad ones, or three of both."""
    shown = generator.sample(generator.choice((GOOD, BAD, GOOD + BAD)), 3)
    return "Reviews of films:\n\n" + "".join(f"Review: {review}\n\n" for review in shown) + f"Review: {opening}"


def first_sentences(text: str, sentences: int = 2) -> str | None:
    """
    The first complete sentences of a continuation; `None` if it has none, or is not the running text of a review.

    Example:

    ```python
    >>> first_sentences(" is slow. I slept. Then")
    ' is slow. I slept.'
    ```
    """
    found = SENTENCE.findall(text.split("\n")[0].replace("’", "'"))[:sentences]
    kept = "".join(found)
    plain = kept.isascii() and not re.search(r"review|rating|http|[<>\[\]{}*_#|\"]|\d{3}|\s\s", kept, re.IGNORECASE)
    return kept if plain and kept.startswith(" ") and len(kept.split()) >= 4 else None


@cache
def analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the reward is VADER's lexicon, which is not installed: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()


def reward(text: str) -> float:
    """VADER's compound score, in [-1, 1]: https://ojs.aaai.org/index.php/ICWSM/article/view/14550"""
    return analyzer().polarity_scores(text)["compound"]


def load_model(path: str | Path) -> PreTrainedModel:
    """A model in float32 (TF32 on a GPU, if there is one) that samples from its whole distribution unless told otherwise."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return model.to("cuda" if cuda else "cpu").eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Its EOS is the model's: the tokenizer of a pretrained model may name the end of a chat's turn, which the model has never seen."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(AutoConfig.from_pretrained(path).eos_token_id)
    return tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], seed: int, *, batch_size: int = 512, top_p: float = 1.0
) -> list[list[int]]:
    """A continuation of each prompt at temperature 1: token ids, the last one EOS unless it was cut off."""
    torch.manual_seed(seed)
    eos, pad, continuations = model.config.eos_token_id, model.config.pad_token_id, []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in batch], device=model.device)
        attention = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch], device=model.device)
        new = model.generate(input_ids=ids, attention_mask=attention, top_p=top_p)[:, length:].tolist()
        continuations += [row[: row.index(eos) + 1] if eos in row else row for row in new]
    return continuations


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, openings: list[str]) -> list[list[int]]:
    """BOS and the opening's tokens, as TRL's trainers tokenize a prompt."""
    return [tokenizer(opening)["input_ids"] for opening in openings]


def completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """The tokens behind the prompt's, EOS last, as TRL's trainers tokenize a completion."""
    start = len(tokenizer(prompt)["input_ids"])
    return [*tokenizer(prompt + completion)["input_ids"][start:], tokenizer.eos_token_id]


def measure(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: list[str],
    seed: int,
) -> dict[str, float]:
    """
    Averages over one continuation of each opening by the policy.

    Returns:
        `dict`: `reward`; `kl` per continuation in nats; `entropy` in nats per token; `length` in tokens, EOS included; `finished`, the share that
        ends with EOS; `distinct_2`, different pairs of adjacent words over all pairs.
    """
    prompts = prompt_ids(tokenizer, openings)
    completions = sample(policy, prompts, seed)
    sums = sums_over_completions(policy, reference, prompts, completions, rows=128)
    texts = [text_of(tokenizer, ids) for ids in completions]
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    count, tokens = len(openings), sum(map(len, completions))
    return {
        "reward": sum(map(reward, texts)) / count,
        "kl": float(sums["kl"].mean()),
        "entropy": float(sums["entropy"].sum()) / tokens,
        "length": tokens / count,
        "finished": sum(ids[-1] == tokenizer.eos_token_id for ids in completions) / count,
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def make_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, openings: list[str], seed: int
) -> list[dict[str, str]]:
    """
    Pairs of a model's continuations of each opening, the one with the higher reward chosen, in random order. Left out are continuations that were cut off or whose
    tokens a trainer would read differently, and pairs with equal rewards.
    """
    prompts = [ids for ids in prompt_ids(tokenizer, openings) for _ in range(SAMPLES)]
    completions = sample(model, prompts, seed)
    pairs = []
    for i, opening in enumerate(openings):
        scored = [
            (reward(text), text)
            for ids in completions[i * SAMPLES : (i + 1) * SAMPLES]
            if (text := text_of(tokenizer, ids)) and completion_ids(tokenizer, opening, text) == ids
        ]
        for two in combinations(scored, 2):
            (low, rejected), (high, chosen) = sorted(two)
            if low < high:
                pairs.append({"prompt": opening, "chosen": chosen, "rejected": rejected})
    random.Random(seed).shuffle(pairs)
    return pairs
