"""
Makes the rows of the quickstart on a real model: sentences under two constraints. Nothing is downloaded, and the rows are the same for the
same seed.

    python recipes/quickstart-real/prepare.py --output recipes/quickstart-real/build

In: a seed. Out:

    train.jsonl   prompts for the rounds: `prompt`, and `thing` and `constraints` for the verifier
    eval.jsonl    held-out prompts, likewise; half of them, with `unseen`, combine kinds of constraint that come together nowhere else
    sft.jsonl     the warm start, likewise, with `completion` and, in refinement rows, `draft`

No prompt comes twice, in one file or in two.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from verifier import Constraint, is_about, kept


THINGS = """river, old bridge, garden, morning train, small village, lighthouse, baker, forest, harbor, teacher, market, violin, library,
mountain road, kitchen, rain, clock tower, fisherman, island, orchard, night sky, sailor, museum, desert, letter, farm, stone wall, theater,
doctor, bicycle, lake, candle, castle, school, dancer, autumn wind, tailor, meadow""".replace("\n", " ").split(", ")
VERBS = "waits rests changes sings sleeps grows shines listens moves stays returns works dreams".split()
ADVERBS = "slowly gently quietly calmly softly proudly patiently bravely warmly alone".split()
PLACES = """near the sea, under a grey cloud, behind the last house, beside an open door, along the quiet road, at the edge of town,
between two hills, above the valley, in the pale light, by the fire, without a sound""".replace("\n", " ").split(", ")
# What a constraint of each kind may ask for, and how it asks
VALUES = {
    "start": "today sometimes often perhaps tonight here now soon".split(),
    "end": "together forever again tomorrow everywhere home anyway too".split(),
    "include": "golden silver little friendly famous empty gentle hidden simple narrow".split(),
    "count": [str(number) for number in range(6, 14)],
    "mark": ["!", "?"],
    "capitals": [""],
}
TEXTS = {
    "start": 'Begin with the word "{}".',
    "end": 'End with the word "{}".',
    "include": 'Use the word "{}".',
    "count": "Use exactly {} words.",
    "mark": 'End with "{}".',
    "capitals": "Write in capital letters only.",
}
# The parts of a sentence, and those that keep to each kind
ORDER = "start the include thing verb adverb places end".split()
PARTS = {kind: [kind] for kind in VALUES} | {"count": ["adverb", "places"]}
# Kinds that come together in evaluation prompts alone
UNSEEN = [{"start", "mark"}, {"include", "capitals"}, {"count", "end"}]
SEEN = [pair for pair in combinations(VALUES, 2) if set(pair) not in UNSEEN]

Row = dict[str, Any]
Parts = dict[str, str]


# Sentences


def draw_parts(generator: random.Random, values: dict[str, str]) -> Parts:
    """The parts of a sentence, those that `values` asks for and others at random."""
    chosen = {kind: generator.choice(["", *VALUES[kind]]) for kind in ("start", "include", "end")}
    places = generator.sample(PLACES, generator.choice([0, 1, 1, 2]))
    return chosen | {
        "verb": generator.choice(VERBS),
        "adverb": generator.choice(["", *ADVERBS]),
        "places": " ".join(places),
        "mark": ".",
        "capitals": "no",
        **values,
    }


def sentence(thing: str, parts: Parts) -> str:
    parts = parts | {"the": "the", "thing": thing}
    text = " ".join(parts[name] for name in ORDER if parts[name]) + parts["mark"]
    return text[0].upper() + text[1:] if parts["capitals"] == "no" else text.upper()


def good_parts(generator: random.Random, thing: str, constraints: list[Constraint]) -> Parts:
    """Those of a sentence that keeps to all constraints."""
    values = {constraint["kind"]: constraint["value"] for constraint in constraints}
    while True:
        parts = draw_parts(generator, values)
        answer = sentence(thing, parts)
        if is_about(answer, thing) and all(kept(answer, constraints)):
            return parts


def draft_of(generator: random.Random, thing: str, constraints: list[Constraint], parts: Parts) -> str:
    """The sentence with other parts for one constraint or both, so that it does not keep to all of them."""
    kinds = [constraint["kind"] for constraint in constraints]
    while True:
        broken = generator.sample(kinds, generator.choice([1, 2]))
        others = draw_parts(generator, {})
        draft = sentence(thing, parts | {name: others[name] for kind in broken for name in PARTS[kind]})
        if is_about(draft, thing) and not all(kept(draft, constraints)):
            return draft


# Rows


def prompts(generator: random.Random, pairs: list[tuple[str, str]]) -> Iterator[Row]:
    """Prompts with constraints of these pairs of kinds, without end; no two are the same."""
    made = set()
    while True:
        thing = generator.choice(THINGS)
        kinds = generator.sample(generator.choice(pairs), 2)
        constraints = [{"kind": kind, "value": generator.choice(VALUES[kind])} for kind in kinds]
        asked = " ".join(TEXTS[constraint["kind"]].format(constraint["value"]) for constraint in constraints)
        prompt = f"Write one sentence about the {thing}. {asked}\nSentence:"
        if prompt not in made:
            made.add(prompt)
            yield {"prompt": prompt, "thing": thing, "constraints": constraints}


def sft_rows(generator: random.Random, row: Row) -> list[Row]:
    """
    A direct row and a refinement row. A third of the direct answers keep to all constraints. All refinements do, and a fifth of them are the draft
    as it was: what is right stays.
    """
    thing, constraints = row["thing"], row["constraints"]
    parts = good_parts(generator, thing, constraints)
    good, draft = sentence(thing, parts), draft_of(generator, thing, constraints, parts)
    direct = generator.choice([draft, draft, good])
    given = generator.choice([draft, draft, draft, draft, good])
    return [
        {**row, "completion": f" {direct}"},
        {**row, "draft": given, "completion": f" {good}"},
    ]


def make_rows(seed: int, sft: int, train: int, evaluation: int) -> dict[str, list[Row]]:
    """The rows of each file."""
    generator = random.Random(seed)
    seen, unseen = prompts(generator, SEEN), prompts(generator, [tuple(sorted(pair)) for pair in UNSEEN])
    return {
        "sft": [row for asked in islice(seen, sft) for row in sft_rows(generator, asked)],
        "train": list(islice(seen, train)),
        "eval": [
            {**asked, "unseen": kinds is unseen}
            for _ in range(evaluation // 2)
            for kinds in (seen, unseen)
            for asked in islice(kinds, 1)
        ],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the rows of the quickstart on a real model.")
    parser.add_argument("--output", type=Path, default=Path("recipes/quickstart-real/build"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", type=int, default=96, help="problems of sft.jsonl, each with two rows")
    parser.add_argument("--train", type=int, default=96, help="prompts for all rounds together")
    parser.add_argument("--evaluation", type=int, default=48, help="held-out prompts")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(args.seed, args.sft, args.train, args.evaluation).items():
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
