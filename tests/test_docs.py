"""
The documentation against the code: links lead somewhere, quoted lines are in their files, and every key, metric, refused option, drop reason and file is
described.
"""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl_ext import SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.aries.checks.gates import DECISIONS
from trl_ext.aries.config import (
    LOOP_KEYS,
    AriesConfig,
    GenerationConfig,
    PairsConfig,
    ScoresConfig,
)
from trl_ext.aries.config.templates import REFINEMENT_TEMPLATE
from trl_ext.aries.data.pairs import Pair, preference_rows
from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.data.templates import compile_template
from trl_ext.aries.run_dir import RoundDir, RunDir
from trl_ext.aries.scoring.evaluation import evaluation_metrics
from trl_ext.recipe import Recipe, check_keys, parse_section
from trl_ext.trainers.packed_pairs import EXACT_MODEL_TYPES

from .made_run import measure_pairs
from .test_readme import blocks, check_command, commands
from .test_trl_contract import ADDED_METRICS


ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md")) + [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "recipes/README.md")
]
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_comments(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(text: str, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
class TestPage:
    def test_links_lead_somewhere(self, page):
        text = without_comments(page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = page if not file else page.parent / file
            assert target.exists(), link
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), link

    def test_files_exist(self, page):
        text = without_comments(page.read_text(encoding="utf-8"))
        for path in re.findall(r"\b(?:trl_ext|tests|docs|recipes|requirements)/[\w./-]*\w\.\w+", text):
            assert (ROOT / path).exists(), path

    def test_commands_name_what_exists(self, page):
        for command in commands(re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))):
            if "my-sft" not in command:
                check_command(command)


@pytest.mark.parametrize("name", ["recipe_keys.md", "api.md"])
def test_page_made_from_the_code_is_fresh(name, made_pages):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == made_pages[name], "run `make docs`, or python docs/reference.py"


@pytest.fixture(scope="module")
def made_pages() -> dict[str, str]:
    return runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()


def test_home_links_to_every_page():
    assert set(re.findall(r"\]\((\w+)\.md", DOCS["README"])) == DOCS.keys() - {"README"}


def test_table_of_falling_rewards_is_that_of_the_raw_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["falling_rewards.py", "--table"])
    runpy.run_module("docs.evidence.small.falling_rewards", run_name="__main__")
    table = capsys.readouterr().out
    assert table.startswith("| trained with |") and table in DOCS["falling_rewards"]


# The trainers


@pytest.mark.parametrize(("trainer", "page"), [(TDPOTrainer, "tdpo"), (SelfRefineDPOTrainer, "self_refine_dpo")])
class TestTrainerPage:
    def test_refused_options(self, trainer, page):
        table = section(DOCS[page], "What is refused")
        for option in (*trainer.refused_options, "loss_type"):
            assert re.search(rf"^\| `{option}`", table, flags=re.MULTILINE), option

    def test_metrics(self, trainer, page):
        for metric in ADDED_METRICS[trainer]:  # what a step logs, as the contract's tests see it
            assert f"`{metric}`" in section(DOCS[page], "What is logged"), metric

    def test_equations_quote_the_code(self, trainer, page):
        rows = re.findall(r"^\|.*\| `([\w/]+\.py)` \| `(.*)` \|$", DOCS[page], flags=re.MULTILINE)
        assert len(rows) >= 4
        for file, line in rows:
            assert line in (ROOT / file).read_text(encoding="utf-8"), line


def test_every_accepted_architecture_is_listed():
    (paragraph,) = (text for text in DOCS["shared_prompt"].split("\n\n") if "`llama`" in text)
    assert set(re.findall(r"`(\w+)`", paragraph)) == EXACT_MODEL_TYPES


# ARIES


def test_every_section_of_a_recipe_is_explained():
    """The keys themselves are in a page made from the code, which takes the text below each field; here only that none lacks it."""
    for field in dataclasses.fields(AriesConfig):
        assert f"`{field.name}`" in DOCS["recipe_keys"]
    assert not re.findall(r"^\| `\w+` .*\.\* *\|$", DOCS["recipe_keys"], flags=re.MULTILINE)


def test_every_drop_reason_is_explained():
    source = "".join(
        (ROOT / f"trl_ext/aries/{name}.py").read_text()
        for name in ("data/pairs", "generation/chains", "generation/refinements")
    )
    reasons = set(re.findall(r'(?:return |return \[|append\(|stopped = |stopped or )"(\w+)"', source))
    assert {"no_margin", "prompt_too_long", "fewer_than_two_scores"} <= reasons
    assert set(re.findall(r"^\| `(\w+)` \|", section(DOCS["aries"], "Selection"), flags=re.MULTILINE)) == reasons


def test_every_file_of_a_run_is_described():
    files = {path.name for of in (RunDir(Path()), RoundDir(Path("round_00"))) for path in vars(of).values()}
    for file in files - {"", "round_00"}:
        assert re.search(rf"`{re.escape(file)}/?`", DOCS["run_directory"]), file


def test_rows_are_described():
    answer = Answer(turn=1, text="a", tokens=1, finish_reason="stop")
    chain = Chain("p-1", "x", [answer, answer], unanswered=[answer])
    template = compile_template(REFINEMENT_TEMPLATE)
    [row, *_] = preference_rows(Pair(chain, answer, answer, 1.0, 0.0), template, PairsConfig())
    metrics = evaluation_metrics([chain], [[1.0, 0.0]], turns=2)
    guard = measure_pairs([Pair(chain, answer, answer, 1.0, 0.0)])
    described = {
        "`answers.jsonl`": [*chain.to_row(), *dataclasses.asdict(answer)],
        "`pairs.jsonl`": list(row),
        "`guard.json`": ["decision", "trained", *DECISIONS.values(), *guard],
        "`metrics.json`": [*metrics, *metrics["turns"][0]],
    }
    for heading, keys in described.items():
        text = section(DOCS["run_directory"], heading)
        assert [key for key in keys if f"`{key}`" not in text] == []


def test_yaml_blocks_are_recipes():
    """Missing sections are added here; every key in a block must exist."""
    (scored,) = blocks(DOCS["aries_data"], "yaml")
    (squared,) = blocks(DOCS["aries"], "yaml")
    launched, tracked = blocks(DOCS["running_aries"], "yaml")
    scorers = parse_section(Recipe(None, yaml.safe_load(scored)["scores"], {}), ScoresConfig).each()
    assert [(scorer.name, scorer.weight) for scorer in scorers] == [("verifier", 2.0), ("judge", 1.0)]
    trained, *generations = blocks(DOCS["scaling"], "yaml")
    for generation in generations:
        parse_section(Recipe(None, yaml.safe_load(generation)["generation"], {}), GenerationConfig)
    for training in (launched, tracked, squared, trained):
        check_keys(Recipe(None, yaml.safe_load(training), {}), [TDPOConfig], ("training",), also=LOOP_KEYS)
    (paper,) = blocks(DOCS["paper_index"], "yaml")
    recipe = yaml.safe_load(paper)
    recipe["prompts"]["dataset"] = "prompts.jsonl"
    recipe |= {"output_dir": "runs/paper", "model": {"model_name_or_path": "model"}}
    recipe |= {"evaluation": {"dataset": "held_out.jsonl"}, "scores": {"verifier": "verifier.py:score"}}
    assert parse_section(Recipe(None, recipe, {}), AriesConfig).refinements.turns == 4


def test_figure_of_a_run(tmp_path):
    """Labels stay text, and equal scores give equal bytes."""
    for number, scores in enumerate([(0.25, 0.5), (0.75, None)]):
        directory = tmp_path / "run" / f"round_{number:02d}"
        directory.mkdir(parents=True)
        turns = [{"score": score, "standard_error": score and 0.02} for score in scores]
        (directory / "metrics.json").write_text(json.dumps({"prompts": 500, "turns": turns}))
    figures = []
    for name in ("a.svg", "b.svg"):
        script = [sys.executable, str(ROOT / "docs" / "figures" / "quickstart.py"), str(tmp_path / "run")]
        subprocess.run([*script, "--output", str(tmp_path / name)], check=True, capture_output=True)
        figures.append((tmp_path / name).read_text())
    assert figures[0] == figures[1]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figures[0])
    assert {"y1 (direct)", "y2", "round 1", "mean score, 500 held-out prompts"} <= set(texts)
