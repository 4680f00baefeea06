"""
Verifiers: whatever TRL takes as a reward function, and what a process of their own keeps from the run.

Oracles: what TRL 1.16's `GRPOTrainer._calculate_rewards` passes and takes, and the functions' own values, by hand.
"""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_ext.aries.children import ChildError, run_child
from trl_ext.aries.config import AriesConfig, EvaluationConfig, PromptsConfig, ScorerConfig, ScoresConfig
from trl_ext.aries.data.prompts import Prompts
from trl_ext.aries.data.records import Answer, Chain, read_jsonl, write_json, write_jsonl
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.scoring.scores import ScoreCache, ScoreTask, each_form, score_rows
from trl_ext.aries.scoring.verifier import Verifier, call_verifier, load_verifier
from trl_ext.aries.scoring.watch import ends_explained
from trl_ext.aries.stages.messages import AnsweringMessage, CheckScorersMessage
from trl_ext.recipe import RecipeError


KINDS = """
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from trl.rewards import get_soft_overlong_punishment


@dataclass
class Part:
    text: str


def plain(completions, **kwargs):
    return [len(Part(c).text) for c in completions]

def numpy_numbers(completions, **kwargs):
    return [np.float32(len(Part(c).text)) for c in completions]

def numpy_array(completions, **kwargs):
    return np.array([len(c) for c in completions], dtype=np.int64)

def numpy_booleans(completions, **kwargs):
    return np.array([len(c) > 1 for c in completions])

def torch_numbers(completions, **kwargs):
    return [torch.tensor(len(c)) for c in completions]

def torch_tensor(completions, **kwargs):
    return torch.tensor([float(len(c)) for c in completions], requires_grad=True)

def generator(completions, **kwargs):
    return (float(len(c)) for c in completions)

async def asynchronous(completions, **kwargs):
    return [float(len(c)) for c in completions]

def needs_ids(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def finds_ids(completions, **kwargs):
    return [float(len(ids)) for ids in kwargs["completion_ids"]]

def logs(completions, log_extra, log_metric, **kwargs):
    log_extra("length", [len(c) for c in completions])
    log_metric("mean", 1.0)
    return [float(len(c)) for c in completions]


class Scorer:
    def __call__(self, completions, **kwargs):
        return [float(len(c)) for c in completions]


class Asynchronous:
    async def __call__(self, completions, **kwargs):
        return [float(len(c)) for c in completions]


def _scaled(completions, k, **kwargs):
    return [k * len(c) for c in completions]


an_object = Scorer()
an_asynchronous_object = Asynchronous()
a_partial = partial(_scaled, k=2.0)
of_trl = get_soft_overlong_punishment(3, 2)
"""


def scored(*texts: str, **columns: list) -> list[tuple]:
    return [
        (Chain(f"p-{i}", f"question {i}"), Answer(1, text, 1, "stop"), {k: v[i] for k, v in columns.items()})
        for i, text in enumerate(texts)
    ]


def words(text: str) -> list[int]:
    """Token ids: one for each word."""
    return list(range(len(text.split())))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    file = tmp_path_factory.mktemp("kinds") / "kinds.py"
    file.write_text(KINDS)
    return file


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, [1.0, 3.0]) for name in ("plain", "numpy_numbers", "numpy_array", "torch_numbers", "torch_tensor")),
        *((name, [1.0, 3.0]) for name in ("generator", "asynchronous", "an_object", "an_asynchronous_object", "logs")),
        ("numpy_booleans", [0.0, 1.0]),
        ("a_partial", [2.0, 6.0]),
        ("needs_ids", [1.0, 2.0]),
        ("finds_ids", [1.0, 2.0]),
        ("of_trl", [0.0, -0.5]),  # of 1 and 2 tokens, with 1 free of charge and 2 to the bound: (1 - 2) / 2
    ],
)
def test_what_trl_takes(kinds, name, expected):
    """The answers `a` and `b c` have 1 and 3 characters, 1 and 2 words."""
    function = load_verifier(f"{kinds}:{name}")
    for _ in range(2):  # an event loop is not closed after the first call
        scores = call_verifier(function, scored("a", "b c"), words)
        assert scores == expected and set(map(type, scores)) == {float}


def test_what_is_not_in_the_file(kinds):
    """Classes, what begins with an underscore and imports are no verifiers to choose from."""
    with pytest.raises(RecipeError, match="has no function `Scorer`") as error:
        load_verifier(f"{kinds}:Scorer")
    assert "'an_object'" in str(error.value) and "dataclass" not in str(error.value)
    assert "'_scaled'" not in str(error.value)
    with pytest.raises(RecipeError, match="Did you mean `an_object`"):
        load_verifier(f"{kinds}:an_objekt")


def test_rewards_of_trl():
    """A thought in tags, then an answer: 1, and 0 without, as the docstring of `think_format_reward` says."""
    function = load_verifier("trl.rewards:think_format_reward")
    prompt = [{"role": "user", "content": "x"}]
    answers = [(Chain("p", prompt), Answer(1, text, 1, "stop"), {}) for text in ("<think>\nso\n</think>\n4", "4")]
    assert call_verifier(function, answers) == [1.0, 0.0]
    with pytest.raises(RecipeError, match="makes a reward function.*path/to/file.py:reward"):
        load_verifier("trl.rewards:get_soft_overlong_punishment")
    with pytest.raises(RecipeError, match="has no reward function `nothing`; it has .*think_format_reward"):
        load_verifier("trl.rewards:nothing")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.ones((len(completions), 1))", "for answer 1 of p-0.*finite number"),
        ("return np.array([1.0, np.nan])", "returned nan for answer 1 of p-1"),
        ("return np.float64(1.0)", "returned a float64 for 2 answers. Return a list"),
        ("return torch.tensor(1.0)", "returned a Tensor for 2 answers"),
        ("return 'ab'", "returned text for 2 answers"),
        ("return {'a': 1.0, 'b': 2.0}", "returned 2 scores for 2 answers. Return a list with a number"),
        ("return [1j, 1.0]", "for answer 1 of p-0.*finite number"),
    ],
)
def test_what_is_no_score(tmp_path, body, message):
    (tmp_path / "v.py").write_text(f"import numpy as np, torch\ndef f(completions, **kwargs):\n    {body}\n")
    with pytest.raises(RecipeError, match=message):
        call_verifier(load_verifier(f"{tmp_path}/v.py:f"), scored("a", "b"))


def test_an_error_is_shown_with_its_line_its_prompt_and_its_columns(tmp_path):
    """The third of four answers is the one that fails, whatever it is called together with."""
    file = tmp_path / "v.py"
    file.write_text("def f(prompts, completions, right):\n    return [1 / int(r) for r in right]\n")
    with pytest.raises(RecipeError) as error:
        call_verifier(load_verifier(f"{file}:f"), scored("a", "b", "c", "d", right=["1", "2", "0", "4"]))
    message = str(error.value)
    assert (
        f"`f` raised ZeroDivisionError: division by zero at {file}:2 (`return [1 / int(r) for r in right]`)" in message
    )
    assert "for answer 1 of p-2, the text 'c', to the text 'question 2', right = the text '0'." in message
    assert "f(right=[...], prompts=[...], completions=[...])" in message


def test_columns_that_it_cannot_take_are_named(tmp_path):
    (tmp_path / "v.py").write_text(
        "def f(completions, solutions, **kwargs):\n    return []\ndef g(completions):\n    return []\n"
    )
    answers = scored("a", solution=["1"])
    with pytest.raises(RecipeError, match="missing a required .*'solutions'.*Did you mean `solution`.*solution=\\["):
        call_verifier(load_verifier(f"{tmp_path}/v.py:f"), answers)
    with pytest.raises(RecipeError, match=r"unexpected keyword argument 'solution'.*add `\*\*kwargs`"):
        call_verifier(load_verifier(f"{tmp_path}/v.py:g"), answers)


def test_token_ids_are_the_policy_s(tiny_model_path, tmp_path):
    """Oracle: the tokenizer itself, without special tokens."""
    task = write_task(
        tmp_path, "def f(completions, completion_ids, **kwargs):\n    return [sum(i) for i in completion_ids]\n"
    )
    scores = run(tmp_path, tiny_model_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    expected = [float(sum(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in ("a b", "c")]
    assert [row["scores"] for row in scores] == [expected] * 3 and task.answers.exists()


# In a process of its own


RUN = Path("run")  # relative, as a recipe's paths may be


def write_task(directory: Path, source: str) -> ScoreTask:
    """The evaluation answers of a run without a round."""
    (directory / "v.py").write_text(source)
    run_dir = RunDir(directory / RUN)
    run_dir.round(1).path.mkdir(parents=True)
    prompts = [{"prompt_id": f"p-{i}", "prompt": f"question {i}", "right": "c"} for i in range(3)]
    answers = [Answer(1, "a b", 2, "stop"), Answer(2, "c", 1, "stop")]
    write_jsonl(run_dir.evaluation_prompts, prompts)
    chains = (Chain(row["prompt_id"], row["prompt"], answers).to_row() for row in prompts)
    write_jsonl(run_dir.round(1).evaluation, chains)
    return ScoreTask(run_dir.evaluation_prompts, run_dir.round(1).evaluation)


def run(directory: Path, model: Path | None = None, check: bool = False, **settings) -> list[dict]:
    """The stage on the files of [`write_task`], given by relative paths."""
    config = AriesConfig(
        output_dir=str(RUN),
        rounds=1,
        model={"model_name_or_path": str(model)},
        prompts=PromptsConfig("p.jsonl"),
        evaluation=EvaluationConfig("e.jsonl"),
        training={},
        scores=ScoresConfig(**({"verifier": "v.py:f"} | settings)),
    )
    here = os.getcwd()
    os.chdir(directory)
    try:
        run_dir = RunDir(RUN)
        write_json(run_dir.resolved, asdict(config))
        stage, message, made = "score", AnsweringMessage(RUN, answering=1), [run_dir.round(1).evaluation_scores]
        if check:
            rows = each_form(Prompts([("e.jsonl", read_jsonl(run_dir.evaluation_prompts), 3)]).placed())
            stage, message, made = "check_scorers", CheckScorersMessage(RUN, [rows]), []
        log = run_dir.logs / "scores.log"
        with ends_explained(run_dir, log, made):
            run_child(f"trl_ext.aries.stages.{stage}", message, log, lambda done, total: None)
        return [] if check else read_jsonl(made[0])
    finally:
        os.chdir(here)


def test_prints_go_to_the_log_and_another_directory_changes_nothing(tmp_path, capfd):
    write_task(
        tmp_path,
        "import os\nos.chdir('/')\nprint('imported')\n"
        "def f(completions, right, **kwargs):\n"
        "    os.chdir('/tmp')\n    os.system('echo from a shell')\n    print('called')\n"
        "    return [float(c == r) for c, r in zip(completions, right)]\n",
    )
    assert [row["scores"] for row in run(tmp_path)] == [[0.0, 1.0]] * 3
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / RUN / "logs" / "scores.log").read_text()
    assert [log.count(text) for text in ("imported", "called", "from a shell")] == [1, 1, 1]
    assert not RunDir(tmp_path / RUN).verifier_call.exists()


@pytest.mark.parametrize("where", ["call", "import"])
@pytest.mark.parametrize("check", [True, False])
def test_a_verifier_that_ends_its_process(tmp_path, where, check):
    end = "os._exit(0)"
    write_task(tmp_path, f"import os\n{end if where == 'import' else ''}\ndef f(completions, **kwargs):\n    {end}\n")
    what = "called with .* answers, of which the first is answer 1 of p-0" if where == "call" else "importing"
    with pytest.raises(RecipeError, match="(?s)the verifier `f` .*: it ended its process, with exit code 0") as error:
        run(tmp_path, check=check)
    assert what.partition(" .*")[0] in str(error.value) and "scores.log" in str(error.value)
    assert not RunDir(tmp_path / RUN).round(1).evaluation_scores.exists()


def test_a_verifier_that_is_killed(tmp_path):
    """By the kernel where memory runs out: what it was called with is said, and the log's end."""
    write_task(
        tmp_path, "import os, signal\ndef f(completions, **kwargs):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.raises(ChildError, match="(?s)the verifier `f` .* to the text 'question 0'.*: .*SIGKILL"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("hang", "line"),
    [
        ("while True:\n        pass", "4|5"),
        ("time.sleep(600)", "4"),
        ("re.search('(a+)+$', 'a' * 60 + 'b')", "4"),  # keeps Python from running anything else
        ("try:\n        time.sleep(600)\n    except BaseException:\n        pass", "5"),
    ],
)
def test_a_verifier_that_hangs_meets_its_timeout(tmp_path, hang, line):
    """What it scored before is kept. Each of these would take longer than anyone waits."""
    write_task(tmp_path, f"import re, time\ndef f(completions, **kwargs):\n    time.sleep(0)\n    {hang}\n")
    error = hung(tmp_path, f"was in {tmp_path}/v.py:({line}), in `f`")
    assert "raise `scores.timeout`" in error
    assert "the text 'a b', to the text 'question 0', right = the text 'c'" in error


def hung(directory: Path, where: str) -> str:
    """The error of a verifier that hangs `where`. If the time was up before it came to that, it gets more."""
    for timeout in (0.5, 5.0, 50.0):
        with pytest.raises(RecipeError, match="it took longer than its `timeout`") as error:
            run(directory, timeout=timeout)
        if re.search(where, str(error.value)):
            break
    assert re.search(where, str(error.value))
    return str(error.value)


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_verifier_forks_holds_nothing_up(tmp_path, hangs):
    """It would live for ten minutes after the process that forked it."""
    end = "time.sleep(600)" if hangs else "os._exit(0)"
    write_task(
        tmp_path,
        "import os, time\ndef f(completions, **kwargs):\n    if os.fork() == 0:\n        time.sleep(600)\n"
        f"    time.sleep(0.1)\n    {end}\n",
    )
    if hangs:
        hung(tmp_path, r"v.py:6, in `f`")
    else:
        with pytest.raises(RecipeError, match="it ended its process"):
            run(tmp_path)


def test_a_process_that_ends_between_two_calls(tmp_path):
    write_task(
        tmp_path,
        "import os, trl_ext.aries.scoring.scores as scores\nscores.ScoreCache.add = lambda self, rows: os._exit(0)\n"
        "def f(completions, **kwargs):\n    return [1.0] * len(completions)\n",
    )
    with pytest.raises(ChildError, match="ended before its work was done, with exit code 0"):
        run(tmp_path)


def test_a_timeout_is_for_one_call(tmp_path):
    write_task(tmp_path, "def f(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    assert [row["scores"] for row in run(tmp_path, timeout=600.0)] == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("settings", [{"timeout": 0.0, "verifier": "v.py:f"}, {"timeout": 1.0, "reward_model": "rm"}])
def test_a_timeout_that_cannot_be(settings):
    with pytest.raises(ValueError, match="timeout"):
        ScorerConfig(**settings)


def test_what_it_raises_ends_the_stage_with_its_place(tmp_path):
    write_task(tmp_path, "def f(completions, **kwargs):\n    raise KeyError('score')\n")
    with pytest.raises(
        RecipeError, match=f"`f` raised KeyError: 'score' at {tmp_path}/v.py:2 .*to the text 'question 0'"
    ):
        run(tmp_path)
    assert "Traceback (most recent call last)" in (tmp_path / RUN / "logs" / "scores.log").read_text()


def test_the_loop_s_process_imports_no_verifier():
    """Its modules, in a process that has just imported the loop, and neither torch nor vLLM with it."""
    code = "import sys, trl_ext.aries.rounds; print([m for m in ('torch', 'transformers', 'vllm', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_second_run_calls_it_for_nothing(tmp_path):
    task = write_task(
        tmp_path,
        "def f(completions, **kwargs):\n    open(__file__ + '.calls', 'a').write('.')\n    return [1.0] * len(completions)\n",
    )
    found, run_dir = run(tmp_path), RunDir(tmp_path / RUN)
    run_dir.round(1).evaluation_scores.unlink()
    assert run(tmp_path) == found
    assert (tmp_path / "v.py.calls").read_text() == "."
    cache = ScoreCache(run_dir.score_cache)
    assert list(score_rows(task, [Verifier(ScorerConfig(verifier=f"{tmp_path}/v.py:f"))], cache)) == found


def test_a_row_without_a_column_that_the_verifier_takes(tmp_path):
    """It is named before anything is generated, unless the parameter has a default. `null` is a value."""
    write_task(tmp_path, "def f(completions, right, **kwargs):\n    return [0.0] * len(completions)\n")
    prompts = RunDir(tmp_path / RUN).evaluation_prompts
    first, second, third = read_jsonl(prompts)
    write_jsonl(prompts, [first | {"other": "x"}, second | {"right": None}, third])
    run(tmp_path, check=True)
    third["wright"] = third.pop("right")
    write_jsonl(prompts, [first | {"other": "x"}, second, third])
    with pytest.raises(RecipeError) as error:
        run(tmp_path, check=True)
    assert str(error.value) == (
        f"e.jsonl, row 3: no column `right`, which the verifier `f` ({tmp_path}/v.py) takes. Did you mean `wright`? Add it (`null` if "
        "the row has none), or give the parameter a default: `right=None`."
    )
    (tmp_path / "v.py").write_text("def f(completions, right=None, **kwargs):\n    return [0.0] * len(completions)\n")
    run(tmp_path, check=True)
