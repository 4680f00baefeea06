"""What the experiments on the quickstart's task share: its scripts, `prepare` and `verifier`, and what a policy answers, by transformers."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.aries.data.records import read_jsonl
from trl_ext.aries.data.templates import compile_template, refinement_prompt


QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"
sys.path.append(str(QUICKSTART))

import prepare  # noqa: E402, F401
import verifier  # noqa: E402, F401


TURNS = 4
TEMPLATE = compile_template("{{ question }} Draft : {{ draft }} . Write a better answer .")  # the recipe's


class Answers:
    """
    Answers of a policy to prompts, and how many are right.

    Args:
        policy (`Path`), tokenizer (`Path`):
            Directories of the model and of its tokenizer.
        prompts (`Path`):
            A file with `prompt` and `solution`, such as `eval.jsonl`.
        count (`int`, *optional*):
            How many of the prompts; all.
    """

    def __init__(self, policy: Path, tokenizer: Path, prompts: Path, count: int | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        rows = read_jsonl(prompts)[:count]
        self.questions = [row["prompt"][0]["content"] for row in rows]
        self.solutions = [row["solution"] for row in rows]

    @torch.no_grad()
    def answer(self, texts: list[str], temperature: float = 0.0) -> list[str]:
        """One answer to each; greedy at temperature 0."""
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
        batch = self.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        out = self.model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=16, **sampling
        )
        answers = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def refine(self, drafts: list[str], temperature: float = 0.0) -> list[str]:
        asked = zip(self.questions, drafts, strict=True)
        return self.answer([refinement_prompt(question, [draft], TEMPLATE) for question, draft in asked], temperature)

    def chains(self, temperature: float = 0.0) -> list[list[str]]:
        """y1 to y4, each a list over the prompts."""
        turns = [self.answer(self.questions, temperature)]
        while len(turns) < TURNS:
            turns.append(self.refine(turns[-1], temperature))
        return turns

    def share_right(self, answers: list[str]) -> float:
        return sum(a == s for a, s in zip(answers, self.solutions, strict=True)) / len(answers)

    def measure(self) -> dict[str, float]:
        """Shares of right answers, y1 to y4; and of y2 where the draft is y1 of another prompt."""
        turns = self.chains()
        shares = {f"y{number}": self.share_right(answers) for number, answers in enumerate(turns, start=1)}
        drafts_of_others = turns[0][1:] + turns[0][:1]
        return shares | {"y2_of_another": self.share_right(self.refine(drafts_of_others))}
