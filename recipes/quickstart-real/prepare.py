"""
Makes the rows of the quickstart on a real model: sentences under constraints. The same rows for the same seed; nothing is downloaded.

    python recipes/quickstart-real/prepare.py --output recipes/quickstart-real/build

    sft.jsonl     the warm start: `prompt`, `completion`, `draft`. Direct answers satisfy half of the constraints, refined ones all
    train.jsonl   prompts for the rounds: `prompt`, and for the verifier `thing` and `constraints`
    eval.jsonl    held-out prompts, likewise; `unseen` says that its two kinds of constraint come together here alone

No two prompts, of any file, are the same.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verifier import kept


THINGS = """river, old bridge, garden, morning train, small village, lighthouse, baker, forest, harbor, teacher, market, violin, library,
mountain road, kitchen, rain, clock tower, fisherman, island, orchard, night sky, sailor, museum, desert, letter, farm, stone wall, theater,
doctor, bicycle, lake, candle, castle, school, dancer, autumn wind, tailor, meadow""".replace("\n", " ").split(", ")
VERBS = "waits rests changes sings sleeps grows shines listens moves stays returns works dreams".split()
ADVERBS = "slowly gently quietly calmly softly proudly patiently bravely warmly alone".split()
PLACES = """near the sea, under a grey cloud, behind the last house, beside an open door, along the quiet road, at the edge of town,
between two hills, above the valley, in the pale light, by the fire, without a sound""".replace("\n", " ").split(", ")
WORDS = {
    "start": "today sometimes often perhaps tonight here now soon".split(),
    "end": "together forever again tomorrow everywhere home anyway too".split(),
    "include": "golden silver little friendly famous empty gentle hidden simple narrow".split(),
    "mark": ["!", "?"],
    "count": [str(n) for n in range(6, 14)],
    "capitals": [""],
}
TEXTS = {
    "start": 'Begin with the word "{}".',
    "end": 'End with the word "{}".',
    "include": 'Use the word "{}".',
    "mark": 'End with "{}".',
    "count": "Use exactly {} words.",
    "capitals": "Write in capital letters only.",
}
# Kinds of constraint that come together in evaluation prompts alone
UNSEEN = ({"start", "mark"}, {"include", "capitals"}, {"count", "end"})


def constraints_of(generator: random.Random, unseen: bool) -> list[dict[str, str]]:
    while True:
        kinds = generator.sample(list(WORDS), 2)
        if (set(kinds) in UNSEEN) == unseen:
            return [{"kind": kind, "value": generator.choice(WORDS[kind])} for kind in kinds]


def prompt_of(thing: str, constraints: list[dict[str, str]]) -> str:
    asked = " ".join(TEXTS[c["kind"]].format(c["value"]) for c in constraints)
    return f"Write one sentence about the {thing}. {asked}\nSentence:"


def sentence(generator: random.Random, thing: str, values: dict[str, str]) -> str:
    """A sentence that may satisfy the constraints with these values."""
    parts = [values.get("start") or generator.choice(["", "", *WORDS["start"]]), "the"]
    parts += [values.get("include") or generator.choice(["", *WORDS["include"]]), thing, generator.choice(VERBS)]
    parts += [generator.choice(["", *ADVERBS]), *generator.sample(PLACES, generator.choice([0, 1, 1, 2]))]
    parts.append(values.get("end") or generator.choice(["", "", *WORDS["end"]]))
    text = " ".join(part for part in parts if part)
    text = text[0].upper() + text[1:] + values.get("mark", ".")
    return text.upper() if "capitals" in values else text


def answer_of(generator: random.Random, thing: str, constraints: list[dict[str, str]], good: bool) -> str:
    """A sentence that satisfies all constraints, or at most one of the two."""
    while True:
        values = {c["kind"]: c["value"] for c in constraints if good or generator.random() < 0.5}
        answer = sentence(generator, thing, values)
        about, *found = kept(answer, thing, constraints)
        if about and all(found) == good:
            return answer


def problems(generator: random.Random) -> Iterator[tuple[str, list[dict[str, str]], bool]]:
    """Things and constraints, without end; no two are the same."""
    seen = set()
    while True:
        unseen = generator.random() < 0.3
        thing, constraints = generator.choice(THINGS), constraints_of(generator, unseen)
        if prompt_of(thing, constraints) not in seen:
            seen.add(prompt_of(thing, constraints))
            yield thing, constraints, unseen


def make_rows(seed: int, sft: int, train: int, evaluation: int) -> dict[str, list[dict[str, Any]]]:
    generator = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "train": [], "eval": []}
    for thing, constraints, unseen in problems(generator):
        prompt = prompt_of(thing, constraints)
        row = {"prompt": prompt, "thing": thing, "constraints": constraints}
        if len(rows["eval"]) < evaluation and (unseen or generator.random() < 0.2):
            rows["eval"].append(row | {"unseen": unseen})
        elif not unseen and len(rows["sft"]) < 2 * sft:
            draft, better = (answer_of(generator, thing, constraints, good) for good in (False, True))
            direct = generator.choice([draft, draft, better])
            rows["sft"] += [
                {"prompt": prompt, "completion": f" {direct}\n"},
                {"prompt": prompt, "draft": f" {draft}", "completion": f" {better}\n"},
            ]
        elif not unseen and len(rows["train"]) < train:
            rows["train"].append(row)
        if (len(rows["sft"]), len(rows["train"]), len(rows["eval"])) == (2 * sft, train, evaluation):
            return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("recipes/quickstart-real/build"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", type=int, default=96, help="problems of sft.jsonl, two rows each")
    parser.add_argument("--train", type=int, default=192)
    parser.add_argument("--evaluation", type=int, default=64)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(args.seed, args.sft, args.train, args.evaluation).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
