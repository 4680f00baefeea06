"""
Refinement by itself without an engine: what is asked, what is chosen, what is written, and what a killed command goes on with. The
processes are played by [`Played`]; `tests/aries/stages/test_refine_stage.py` has the real ones.
"""

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.aries import model_server

import trl_ext
from trl_ext.aries.children import ChildError, Reporter
from trl_ext.aries.config import AriesConfig, SettledConfig
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, read_rows, write_jsonl
from trl_ext.aries.results import refine as module
from trl_ext.aries.results.chosen import choose
from trl_ext.aries.results.refine import resolve
from trl_ext.aries.results.work_dir import WorkDir
from trl_ext.aries.scoring.reward_model import RewardModel
from trl_ext.aries.stages import refine as stages
from trl_ext.cli import main
from trl_ext.recipe import Recipe, RecipeError, parse_section


VERIFIER = (
    "def right(completions, solution, **kwargs):\n    return [float(a == b) for a, b in zip(completions, solution)]\n"
)
TEXTS = {"Sort : 2 1": ["2 1", "1 2", "1 2", "2 1"], "Sort : 4 3": ["3 4", "4", "3", ""]}


class Played:
    """Plays `run_child`: answers come from a table, and verifiers are called in this process. `fails` steps raise, once each."""

    def __init__(self):
        self.steps: list[str] = []
        self.fails: list[str] = []

    def __call__(self, name, message, log, update, env=None, on_note=None):
        self.steps.append(message.step)
        if message.step in self.fails:
            self.fails.remove(message.step)
            raise ChildError("killed")
        if message.step != "answers":
            return stages.main(message, Reporter(io.StringIO()))
        work = WorkDir(message.work)
        turns = work.read_config().refinements.turns
        chains = [
            Chain(
                row["prompt_id"],
                row["prompt"],
                [
                    Answer(turn, text, len(text.split()), "stop")
                    for turn, text in enumerate(TEXTS[question(row["prompt"])][:turns], start=1)
                ],
            )
            for row in read_rows(work.prompts)
        ]
        write_jsonl(work.answers, (chain.to_row() for chain in chains))


def question(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.fixture
def played(monkeypatch, tmp_path) -> Played:
    """A directory with a model, an adapter on it, a verifier and prompts, in which the processes are played."""
    monkeypatch.chdir(tmp_path)
    for folder, file, content in (
        ("model", "config.json", {}),
        ("adapter", "adapter_config.json", {"base_model_name_or_path": "model", "r": 8}),
    ):
        Path(folder).mkdir()
        Path(folder, file).write_text(json.dumps(content))
    Path("verifier.py").write_text(VERIFIER)
    write_jsonl(
        Path("prompts.jsonl"),
        [{"prompt": prompt, "solution": solution} for prompt, solution in SOLUTIONS],
    )
    monkeypatch.setattr(module, "run_child", played := Played())
    return played


SOLUTIONS = [("Sort : 2 1", "1 2"), ("Sort : 4 3", "3 4")]
COMMAND = ["aries", "refine", "--model", "model", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]


def whole(*texts: str) -> list[Answer]:
    return [Answer(turn, text, 1, "stop") for turn, text in enumerate(texts, start=1)]


CUT = Answer(9, "cut", 1, "length")


@pytest.mark.parametrize(
    ("answers", "scores", "chosen"),
    [
        (whole("a", "b", "b", "c"), [0.0, 1.0, 1.0, 0.5], {"last": 3, "scores": 2, "rule": 2, "all": None}),
        (whole("a", "b"), [1.0, 0.0], {"last": 1, "scores": 0, "rule": 1}),
        ([*whole("a"), CUT], [0.0, 1.0], {"last": 0, "scores": 0, "rule": 0}),
        ([*whole("a", ""), CUT], [-1.0, 5.0, 5.0], {"last": 0, "scores": 0, "rule": 0}),
        ([CUT, CUT], [None, None], {"last": 1, "scores": 1, "rule": 1}),
        (whole("a", "b", "c"), [-2.0, -1.0, None], {"scores": 1}),
        ([], [], {"last": None, "scores": None, "rule": None}),
    ],
)
def test_choice(answers, scores, chosen):
    """By hand: the last whole one; the best whole one, the latest of equals; the last whole one like the one before it."""
    chain = Chain("p", "x", answers)
    assert {select: choose(chain, scores, select, SettledConfig()) for select in chosen} == chosen


@pytest.mark.parametrize(
    ("settled", "chosen"),
    [
        ({}, 4),
        ({"agreement": 3}, 2),
        ({"agreement": 4}, 5),
        ({"agreement_pattern": "#(.)"}, 5),
        ({"agreement": 3, "agreement_pattern": "#(.)"}, 5),
    ],
)
def test_the_rule(settled, chosen):
    """By hand: answers 1 to 3 are the same, and so are 4 and 5; what the pattern finds is the same in 4 to 6. Else the last."""
    chain = Chain("p", "x", whole("a", "a", "a", "b #1", "b #1", "c #1"))
    assert choose(chain, [None] * 6, "rule", SettledConfig(**settled)) == chosen


def test_the_best_by_a_verifier(played, capsys):
    assert main([*COMMAND, "--select", "verifier", "verifier.py:right"]) == 0
    first, second = read_jsonl(Path("out.jsonl"))
    assert [(row["answer"], row["turn"], row["score"]) for row in (first, second)] == [
        ("1 2", 3, 1.0),
        ("3 4", 1, 1.0),
    ]
    assert [answer["score"] for answer in first["answers"]] == [0.0, 1.0, 1.0, 0.0]
    assert (first["prompt_id"], first["prompt"], first["stopped"]) == ("prompts-0000001", "Sort : 2 1", None)
    assert played.steps == ["check", "answers", "scores"]
    assert "out.jsonl: chosen: y1 1, y3 1; mean scores: y1 0.5, y2 0.5, y3 0.5, y4 0" in capsys.readouterr().out
    assert not Path("out.jsonl.work").exists()


@pytest.mark.parametrize(("select", "turns"), [("last", [4, 3]), ("rule", [3, 3])])
def test_without_scores_nobody_is_asked(played, select, turns):
    assert main([*COMMAND, "--select", select]) == 0
    assert [row["turn"] for row in read_jsonl(Path("out.jsonl"))] == turns
    assert played.steps == ["answers"]


def test_the_best_by_a_judge(played):
    """Longer is better, in both places."""
    judge = model_server.ChatServer(
        lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]" if len(a) < len(b) else "[[C]]"
    )
    flags = [
        "--select",
        "judge",
        "--scores.judge.model",
        "m",
        "--scores.judge.template",
        "A={{ answer_a }}\nB={{ answer_b }}",
    ]
    with model_server.running(judge):
        assert main([*COMMAND, *flags, f"--scores.judge.base_url={judge.url}"]) == 0
    rows = read_jsonl(Path("out.jsonl"))
    assert [(row["answer"], row["turn"]) for row in rows] == [("2 1", 4), ("3 4", 1)]
    assert [answer["score"] for answer in rows[1]["answers"]] == [1.0, 0.5, 0.5, 0.0]


def test_a_reward_model_has_a_process_of_its_own(played, monkeypatch):
    """Which fills the cache; here it is filled by the length of the answers."""

    def score(self, tasks, cache, progress):
        for chain, _ in (item for task in tasks for item in task):
            rows = zip(self.keys(chain, {}), chain.answers, strict=True)
            cache.add([{"key": key, "score": float(len(answer.text))} for key, answer in rows if key not in cache])
        return []

    monkeypatch.setattr(RewardModel, "score", score)
    monkeypatch.setattr(stages, "check_reward_model", lambda name, revision, conversational: None)
    assert main([*COMMAND, "--select", "reward_model", "rm"]) == 0
    assert [row["score"] for row in read_jsonl(Path("out.jsonl"))] == [3.0, 3.0]
    assert played.steps == ["check", "answers", "reward_model", "scores"]


def test_formats(played):
    messages = [*COMMAND[:-1], "messages.jsonl", "--format", "messages", "--turns", "2"]
    assert main(messages) == 0
    assert read_jsonl(Path("messages.jsonl"))[0] == {
        "prompt_id": "prompts-0000001",
        "messages": [{"role": "user", "content": "Sort : 2 1"}, {"role": "assistant", "content": "1 2"}],
        "generator": "model-last",
    }
    assert main([*COMMAND[:-1], "all.json", "--format", "alpaca_eval", "--turns", "2", "--select", "all"]) == 0
    rows = json.loads(Path("all.json").read_text())
    assert [(row["output"], row["generator"]) for row in rows] == [
        *(("2 1", "model-y1"), ("1 2", "model-y2")),
        *(("3 4", "model-y1"), ("4", "model-y2")),
    ]


def test_a_failed_command_is_continued(played, capsys):
    command = [*COMMAND, "--select", "verifier", "verifier.py:right"]
    played.fails = ["scores"]
    assert main(command) == 1
    assert not Path("out.jsonl").exists()
    assert main([*command, "--drafts.temperature", "1.0"]) == 2
    assert "drafts.temperature: 0.7 -> 1.0" in capsys.readouterr().err
    with open("prompts.jsonl", "a") as file:
        file.write('{"prompt": "Sort : 4 3"}\n')
    assert main(command) == 2, "other prompts"
    Path("prompts.jsonl").write_text("".join(Path("prompts.jsonl").read_text().splitlines(keepends=True)[:2]))
    assert main(command) == 0
    assert played.steps == ["check", "answers", "scores", "check", "scores"], "answered once"


def test_a_kill_after_the_output_was_written(played, monkeypatch):
    """The same command removes what is left beside it."""
    with monkeypatch.context() as killing:
        killing.setattr(module.shutil, "rmtree", lambda path, **options: sys.exit("killed"))
        with pytest.raises(SystemExit):
            main([*COMMAND, "--quiet"])
    written = Path("out.jsonl").read_bytes()
    assert main(COMMAND) == 0
    assert Path("out.jsonl").read_bytes() == written
    assert not Path("out.jsonl.work").exists()


def test_a_file_that_came_in_between_is_kept(played):
    played.fails = ["answers"]
    assert main(COMMAND) == 1
    Path("out.jsonl").write_text("mine")
    assert main(COMMAND) == 2
    assert Path("out.jsonl").read_text() == "mine"


def test_who_scores_may_change(played):
    """What was answered is not answered again for another selection."""
    played.fails = ["scores"]
    assert main([*COMMAND, "--select", "verifier", "verifier.py:right"]) == 1
    assert main([*COMMAND, "--select", "rule", "--generation.max_num_seqs", "8"]) == 0
    assert played.steps == ["check", "answers", "scores"]


def test_who_scores_is_checked_if_it_has_changed(played, monkeypatch, capsys):
    """A language model would score with a new, random head."""

    def refuse(name, revision, conversational):
        raise ValueError(f"{name} is no reward model.")

    monkeypatch.setattr(stages, "check_reward_model", refuse)
    played.fails = ["scores"]
    assert main([*COMMAND, "--select", "verifier", "verifier.py:right"]) == 1
    assert main([*COMMAND, "--select", "reward_model", "lm"]) == 2
    assert "lm is no reward model" in capsys.readouterr().err
    assert played.steps == ["check", "answers", "scores", "check"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.tmp", "out.jsonl.work/mine"])
def test_nothing_is_overwritten(played, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("mine")
    assert main(COMMAND) == 2
    assert Path(name).read_text() == "mine" and played.steps == []


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--select", "best"], "--select"),
        (["--select", "last", "x"], "--select"),
        (["--select", "judge"], "select"),
        (["--select", "verifier", "v.py:f", "--scores.reward_model", "m"], "scores"),
        (["--select", "rule", "--refinements.strategy", "parallel"], "refinements.strategy"),
        (["--round", "1"], "--round"),
        (["--model", "nowhere/at/all"], "model.model_name_or_path"),
        (["--model", "adapter"], "--adapter adapter"),
        (["--adapter", "model"], "adapter_config.json"),
        (["--drafts.max_tokens", "2048"], "drafts.max_tokens"),
        (["--drafts.temprature", "1.0"], "`temprature` in `drafts`"),
        (["--pairs.selection", "rule_based"], "`selection` in `pairs`"),
        (["--prompts", "none.jsonl"], "prompts.dataset"),
        (["--output", "nowhere/out.jsonl"], "--output"),
    ],
)
def test_errors_name_the_key(played, capsys, flags, key):
    assert main([*COMMAND, *flags]) == 2
    assert key in capsys.readouterr().err
    assert played.steps == []


def test_keys_are_a_recipes(played):
    flags = ["--generation.max_model_len", "600", "--refinements.strategy", "few_shot", "--prompts.dataset", "x"]
    config = resolve(None, None, ["last"], {"model": {"model_name_or_path": "model"}}, flags)
    assert config.generation.max_model_len == 600
    assert "drafts" in config.refinements.template
    assert resolve(None, None, ["last"], {"adapter": "adapter"}).model.model_name_or_path == "model"


# In Python


@pytest.mark.parametrize("chat", [False, True])
def test_from_python(played, chat):
    prompts = [[{"role": "user", "content": text}] if chat else text for text, _ in SOLUTIONS]
    rows = trl_ext.refine(prompts, model="model", turns=2, quiet=True)
    assert [(row["prompt"], row["answer"]) for row in rows] == list(zip(prompts, ["1 2", "4"], strict=True))
    assert trl_ext.refine(prompts, model="model", refinements={"turns": 2}, quiet=True) == rows
    assert not list(Path().glob("*.work"))


def test_from_python_with_columns(played):
    rows = [{"prompt": prompt, "solution": solution} for prompt, solution in SOLUTIONS]
    found = trl_ext.refine(rows, "model", select=["verifier", "verifier.py:right"], output="mine.jsonl", quiet=True)
    assert [row["answer"] for row in found] == ["1 2", "3 4"]
    assert found == read_jsonl(Path("mine.jsonl"))
    by_file = trl_ext.refine(
        "prompts.jsonl", "model", select="scores", scores={"verifier": "verifier.py:right"}, quiet=True
    )
    assert by_file == found
    assert trl_ext.refine([], "model") == []


# With a run


@pytest.fixture
def run(played) -> Path:
    """A run of two rounds, of which round 1 is finished, moved since."""
    path = Path("runs/mine")
    settings = {
        "output_dir": "elsewhere",
        "rounds": 2,
        "model": {"model_name_or_path": "model", "use_peft": True},
        "prompts": {"dataset": "p.jsonl"},
        "evaluation": {"dataset": "e.jsonl"},
        "generation": {"answer_pattern": "(.*)"},
        "drafts": {"temperature": 0.3},
        "refinements": {"turns": 4, "template": "{{ question }} {{ draft }}"},
        "scores": {"verifier": "verifier.py:right"},
        "pairs": {"selection": "rule_based", "settled_similarity": 0.5, "agreement": 3, "agreement_pattern": "(.)"},
        "training": {},
    }
    config = parse_section(Recipe(None, settings, {}), AriesConfig)
    path.mkdir(parents=True)
    (path / "resolved.json").write_text(json.dumps(asdict(config) | {"inputs": {}}))
    (path / "recipe.yaml").write_text(json.dumps(settings))
    for number in (0, 1):
        (path / f"round_0{number}").mkdir()
        (path / f"round_0{number}" / "manifest.json").write_text("{}")
    adapter = path / "round_01" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    return path


def test_a_run_brings_its_policy_and_its_settings(run):
    config = resolve(run, None, ["last"], {})
    assert (config.model.model_name_or_path, config.adapter) == ("model", str(run / "round_01" / "adapter"))
    assert (config.generation.answer_pattern, config.drafts.temperature, config.refinements.turns) == ("(.*)", 0.3, 4)
    assert config.refinements.template == "{{ question }} {{ draft }}"
    assert config.pairs == SettledConfig(settled_similarity=0.5, agreement=3, agreement_pattern="(.)")
    assert not config.scores.each(), "new prompts need not have the columns that a run's verifier asks for"
    assert resolve(run, 0, ["scores"], {}).scores.verifier == "verifier.py:right"
    assert resolve(run, 0, ["verifier"], {}).adapter is None
    assert (
        resolve(run, None, ["last"], {"refinements": {"turns": 3}}, ["--drafts.temperature=0.9"]).drafts.temperature
        == 0.9
    )


def test_a_run_on_the_command_line(run, played):
    assert (
        main(
            [
                "aries",
                "refine",
                str(run),
                "--prompts",
                "prompts.jsonl",
                "--output",
                "out.jsonl",
                "--format",
                "messages",
            ]
        )
        == 0
    )
    assert read_jsonl(Path("out.jsonl"))[0]["generator"] == "mine-last"
    for flags in (["--round", "2"], ["--model", "model"]):
        assert main(["aries", "refine", str(run), "--prompts", "prompts.jsonl", "--output", "o.jsonl", *flags]) == 2
    with pytest.raises(RecipeError, match="not the directory of a run"):
        resolve(Path("model"), None, ["last"], {})
