"""
Cards for what a run made: a model card from TRL's template, and a dataset card for its pairs.
"""

import textwrap
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from ... import __version__
from ...data_files import BUILDERS
from ...trainers.model_card import completed, trl_card
from ..checks.overlap import prompts_kind
from ..config import AriesConfig
from ..data.records import read_json, read_rows
from ..run_dir import RunDir, keep_templates


PAPER = {
    "title": "ARIES: Stimulating Self-Refinement of Large Language Models by Iterative Preference Optimization",
    "id": "2502.05605",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{zeng2025aries,
            title        = {{ARIES: Stimulating Self-Refinement of Large Language Models by Iterative Preference Optimization}},
            author       = {Yongcheng Zeng and Xinyu Cui and Xuanfa Jin and Guoqing Liu and Zexu Sun and Quan He and Dong Li and Ning Yang and Jianye Hao and Haifeng Zhang and Jun Wang},
            year         = 2025,
            eprint       = {arXiv:2502.05605},
        }"""),
}
FORMS = {
    "merged": "the adapter merged into the base model, in {dtype}",
    "adapter": "a PEFT adapter, to be loaded on the base model",
    "copy": "all weights, in {dtype}",
}
PAIRS_CARD = """\
---
{front_matter}
---

# {name}

{rows:,} preference rows that ARIES (https://huggingface.co/papers/{paper_id}) made and trained on in rounds 1 to {rounds}, written by
trl-ext {version}. In each round, the previous policy answers a prompt and refines its own answer; a better and a worse answer of this
chain become a pair.

```python
from datasets import load_dataset

pairs = load_dataset("{repo}", split="train")
```

`prompt`, `chosen` and `rejected` are the columns of TRL's `DPOTrainer`. The others are:

| column | |
|---|---|
| `round` | the round |
| `turn` | 0 if the prompt is the question, 1 if it asks for a better answer than a draft |
| `draft` | whether that draft is the `chosen` or the `rejected` answer |
| `weight` | how often an epoch repeats the row |
| `prompt_id` | the prompt's dataset and row |
| `chosen_turn`, `rejected_turn`, `chosen_score`, `rejected_score` | the answers' places in the chain, and their scores |

## Prompts

{prompts}

## Recipe

```yaml
{recipe}```
"""


REFINING = """\
This model answers, and improves its answers turn by turn:

```python
{code}
```

`select=["reward_model", "NAME"]` or `["verifier", "file.py:function"]` returns the best answer of the chain instead of the last one."""


def public_recipe(run: RunDir) -> str:
    """The run's recipe without its place on this machine. Recipes never hold secrets."""
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    recipe.pop("env", None)
    return yaml.safe_dump(recipe | {"output_dir": run.path.name}, sort_keys=False, allow_unicode=True)


def on_hub(name: str) -> bool:
    """Whether a model or a dataset is named as on the Hub rather than by a path."""
    path = Path(name).expanduser()
    return not (path.is_absolute() or name.startswith(".") or path.suffix in BUILDERS or path.exists())


def sources(config: AriesConfig) -> list[str]:
    """The datasets of the prompts."""
    return [entry.path for entry in config.prompts.entries()]


def model_card(
    run: RunDir,
    config: AriesConfig,
    name: str,
    repo: str,
    number: int,
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    measured: dict[str, Any],
) -> str:
    """
    TRL's card, with what was trained, on what, by which recipe, and how it was evaluated.

    `name` is the model's name, `repo` where it will be found (a name on the Hub or a path), `form` one of [`FORMS`], and `measured` what the
    check at export found.
    """
    base = config.model["model_name_or_path"]
    datasets = [source for source in sources(config) if on_hub(source)]
    card = trl_card(
        base=base if on_hub(base) else None,
        name=name,
        repo=repo,
        dataset=datasets[0] if len(datasets) == 1 else None,
        tags=["trl", "trl-ext", "aries"],
        method="ARIES",
        paper=PAPER,
    )
    card.data.library_name = "peft" if form == "adapter" else "transformers"
    card.data.pipeline_tag = "text-generation"
    sections = {
        "This model": f"The policy after round {number} of {config.rounds}: {FORMS[form].format(**measured)}. Trainer of the "
        f"rounds: `{config.training.get('trainer', 'dpo')}`. Checked at export: its log-probabilities differ from the trained "
        f"policy's by {measured['difference']:.2g} nats per token (root mean square over {measured['tokens']} tokens).",
        "Data": "Prompts: "
        + ", ".join(f"`{source if on_hub(source) else Path(source).name}`" for source in sources(config))
        + ".",
        "Evaluation": evaluation_table(run, number),
        "Refining": REFINING.format(code=refining(run, config, base, repo, form == "adapter")),
        "Recipe": f"```yaml\n{public_recipe(run)}```",
    }
    sections = {heading: text for heading, text in sections.items() if text}
    return completed(str(card), base, tokenizer.chat_template is not None, sections)


def refining(run: RunDir, config: AriesConfig, base: str, repo: str, is_adapter: bool) -> str:
    """A program that has the policy answer and refine as in the run."""
    recipe, text = yaml.safe_load(run.recipe.read_text(encoding="utf-8")), "A question."
    prompt = next(read_rows(run.evaluation_prompts))["prompt"]
    generation = {
        k: v for k, v in (recipe.get("generation") or {}).items() if k in ("answer_pattern", "max_model_len")
    }
    refinements = {k: v for k, v in (recipe.get("refinements") or {}).items() if k != "turns"}
    refinements["template"] = keep_templates(config).refinements.template  # also if the default becomes another one
    arguments = {
        **({"model": base, "adapter": repo} if is_adapter else {"model": repo}),
        "turns": config.refinements.turns,
        "generation": generation,
        "drafts": recipe.get("drafts"),
        "refinements": refinements,
    }
    lines = [
        "from trl_ext import refine",
        "",
        "rows = refine(",
        f"    [{(text if isinstance(prompt, str) else [{'role': 'user', 'content': text}])!r}],",
        *(f"    {name}={value!r}," for name, value in arguments.items() if value),
        ")",
        'print(rows[0]["answer"])',
    ]
    return "\n".join(lines)


def evaluation_table(run: RunDir, number: int) -> str:
    """Scores of the policy's answers next to round 0's, the direct answer first; empty without scores."""
    columns = {}
    for n in dict.fromkeys((0, number)):
        metrics = read_json(run.round(n).metrics)
        if metrics is not None:
            columns[n] = [turn for turn in metrics["turns"] if turn["score"] is not None]
    if not columns.get(number):
        return ""
    rows = [f"| answer | {' | '.join(f'round {n}' for n in columns)} |", "|---|" + "---|" * len(columns)]
    for turns in zip(*columns.values(), strict=False):
        name = "direct" if turns[0]["turn"] == 1 else f"refined {turns[0]['turn'] - 1} x"
        cells = [
            f"{turn['score']:.3f}" + (" [{:.3f}, {:.3f}]".format(*turn["interval"]) if turn["interval"] else "")
            for turn in turns
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return f"Mean scores over the {prompts_kind(run)} prompts, with 95 % intervals.\n\n" + "\n".join(rows)


def pairs_card(run: RunDir, config: AriesConfig, name: str, repo: str, rounds: list[int], rows: int) -> str:
    """The card of a run's pairs."""
    front_matter = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "round_*.jsonl"}]},
            *(
                {"config_name": f"round_{n:02d}", "data_files": [{"split": "train", "path": f"round_{n:02d}.jsonl"}]}
                for n in rounds
            ),
        ],
        "tags": ["preference", "trl", "trl-ext", "aries"],
    }
    return PAIRS_CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False).rstrip(),
        name=name,
        rows=rows,
        rounds=rounds[-1],
        repo=repo,
        prompts="\n".join(f"- `{source if on_hub(source) else Path(source).name}`" for source in sources(config)),
        recipe=public_recipe(run),
        paper_id=PAPER["id"],
        version=__version__,
    )
