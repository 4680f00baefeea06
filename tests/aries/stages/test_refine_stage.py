"""`trl-ext aries refine` on the real engine: the tiny sorting model, killed in the middle. Oracle: the same in Python, undisturbed."""

import io
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import trl_ext
from trl_ext.aries import children
from trl_ext.aries.children import Reporter
from trl_ext.aries.config import RefineConfig
from trl_ext.aries.data.records import read_jsonl, write_jsonl
from trl_ext.aries.results.work_dir import WorkDir
from trl_ext.aries.stages.refine import check_prompts
from trl_ext.recipe import RecipeError


TURNS = 4
VERIFIER = "recipes/quickstart/verifier.py:partial_match"
TEMPLATE = "{{ question }} Draft : {{ draft }} . Write a better answer ."
GENERATION = {"max_model_len": 64, "max_num_seqs": 2, "dtype": "float32", "cpu_kv_cache_gib": 1}


@pytest.fixture
def forked(monkeypatch):
    """The stages that this process starts are forked from a server that other tests use too. Those of a command are fresh processes."""
    monkeypatch.setitem(children.SERVER_OF, "trl_ext.aries.stages.refine", "vllm")


@pytest.mark.vllm
def test_a_killed_command_gives_the_same_file(forked, sorting, tmp_path):
    prompts = read_jsonl(sorting / "train.jsonl")[:24]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    model, output = str(sorting / "model"), tmp_path / "killed.jsonl"
    expected = trl_ext.refine(
        tmp_path / "prompts.jsonl",
        model,
        turns=TURNS,
        select=["verifier", VERIFIER],
        generation=GENERATION,
        drafts={"temperature": 1.0, "max_tokens": 8},
        refinements={"template": TEMPLATE},
        output=tmp_path / "whole.jsonl",
    )
    check(expected, prompts)

    command = [sys.executable, "-m", "trl_ext.cli", "aries", "refine", "--model", model]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--turns", str(TURNS), "--output", str(output)]
    command += [f"--generation.{key}={value}" for key, value in GENERATION.items()]
    command += ["--drafts.temperature=1.0", "--drafts.max_tokens=8", "--refinements.template", TEMPLATE]
    command += ["--select", "verifier", VERIFIER]
    while not killed(command, output.with_name("killed.jsonl.work") / "answers.jsonl.part", lines=12):
        output.unlink()  # it had ended before this process saw it
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not output.with_name("killed.jsonl.work").exists()


@pytest.mark.vllm
def test_a_run_answers_as_in_its_evaluation(forked, whole_run):
    """Oracle: the greedy answers of the last round's policy, its adapter and its template included, that the run evaluated."""
    path, _ = whole_run
    prompts = [{"prompt": row["prompt"]} for row in read_jsonl(path / "evaluation_prompts.jsonl")]
    rows = trl_ext.refine(prompts, run=path, drafts={"temperature": 0.0}, quiet=True)
    evaluated = read_jsonl(path / "round_02" / "evaluation.jsonl")
    for row, chain in zip(rows, evaluated, strict=True):
        assert [answer["text"] for answer in row["answers"]] == [answer["text"] for answer in chain["answers"]]


@pytest.mark.parametrize(
    ("prompt", "template", "stop", "said"),
    [
        ([{"role": "user", "content": "Sort : 2 1"}], True, None, None),
        ("Sort : 2 1", True, None, "continues them as they are"),
        ("Sort : 2 1", True, ["\n"], None),
        ("Sort : 2 1", False, None, None),
        ([{"role": "user", "content": "Sort : 2 1"}], False, None, RecipeError),
    ],
)
def test_prompts_and_the_tokenizer(sorting, tmp_path, prompt, template, stop, said):
    """Texts are continued, which is seldom meant for a chat model, unless `stop` says where to end; messages need a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(sorting / "model")
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.save_pretrained(tmp_path / "model")
    work, reports = WorkDir(tmp_path), io.StringIO()
    write_jsonl(work.prompts, [{"prompt_id": "p", "prompt": prompt}])
    config = RefineConfig(model={"model_name_or_path": str(tmp_path / "model")}, drafts={"stop": stop})
    if said is RecipeError:
        with pytest.raises(RecipeError, match="chat template"):
            check_prompts(work, config, Reporter(reports))
    else:
        check_prompts(work, config, Reporter(reports))
        assert said in reports.getvalue() if said else not reports.getvalue()


def killed(command: list[str], file: Path, lines: int) -> bool:
    """Start a command, and kill it once a file has so many lines. `False` if it had ended before."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while lines_in(file) < lines:
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read()
                return False
            time.sleep(0.005)
        process.kill()
    return file.exists()


def lines_in(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.read_bytes().count(b"\n")
    return 0


def check(rows: list[dict], prompts: list[dict]) -> None:
    """Every prompt has its chain, and the answer that the verifier scores highest, the latest of equals."""
    assert [row["prompt"] for row in rows] == [prompt["prompt"] for prompt in prompts]
    assert len({row["answer"] for row in rows}) > 1
    for row in rows:
        answers = [answer for answer in row["answers"] if answer["finish_reason"] == "stop" and answer["text"]]
        assert [answer["turn"] for answer in row["answers"]] == list(range(1, TURNS + 1))
        if answers:
            best = max(answers, key=lambda answer: (answer["score"], answer["turn"]))
            assert (row["answer"], row["turn"], row["score"]) == (best["text"], best["turn"], best["score"])
