"""
What a recipe, a dataset, a model or a server must not be able to do. What models may do is in `aries/test_preflight.py`, what
reaches a terminal in `test_terminal.py`.
"""

import ast
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

import trl_ext
from tests.aries.tiny_run import MINIMAL
from trl_ext.aries.children import run_child
from trl_ext.aries.config import AriesConfig, JudgeConfig, ScorerConfig
from trl_ext.aries.data.records import Answer, Chain, write_jsonl
from trl_ext.aries.manifest import write_manifest
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.scoring.judge import Judge, JudgeError
from trl_ext.aries.scoring.scores import ScoreCache, ScoreTask
from trl_ext.aries.scoring.verifier import load_verifier
from trl_ext.aries.stages.messages import PreflightMessage
from trl_ext.recipe import Recipe, RecipeError, apply_overrides, export_env, load_yaml, parse_section


SECRET = "hf_" + "S3cretS3cretS3cretS3cretS3cretS3cret"[:34]


# Recipes


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [MARKER]]",
        "!!python/object/new:os.system ['touch MARKER']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_recipe_makes_no_objects(tmp_path, value):
    """The first would make a file with PyYAML's unsafe loader."""
    marker = tmp_path / "marker"
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: " + value.replace("MARKER", str(marker)))
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: not valid YAML: could not determine a constructor"):
        load_yaml(file)
    with pytest.raises(RecipeError, match="not a YAML value"):
        apply_overrides(Recipe(None, {}, {}), ["--training", "[" + value.replace("MARKER", str(marker)) + "]"])
    assert not marker.exists()


# Secrets


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"env": {"HF_TOKEN": "abc"}}, "`env.HF_TOKEN` is a secret.*export HF_TOKEN"),
        ({"env": {"WANDB_API_KEY": "abc"}}, "`env.WANDB_API_KEY`.*export WANDB_API_KEY"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}, "`env.AWS_SECRET_ACCESS_KEY`"),
        ({"env": {"MY_PASSWORD": "abc"}}, "`env.MY_PASSWORD`"),
        ({"training": {"hub_token": "abc"}}, "`training.hub_token`.*export HF_TOKEN"),
        ({"sft": {"dataset": "d", "push_to_hub_token": "abc"}}, "`sft.push_to_hub_token`"),
        ({"scores": {"scorers": [{"judge": {"api_key": "abc"}}]}}, r"`scores.scorers\[0\].judge.api_key`"),
        ({"model": {"model_name_or_path": SECRET}}, "`model.model_name_or_path`"),
        ({"scores": {"judge": {"api_key_env": "sk-" + "a" * 40}}}, "`scores.judge.api_key_env`"),
    ],
)
def test_secrets_in_a_recipe_are_refused_without_showing_them(tmp_path, monkeypatch, changes, named):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: " + named) as error:
        export_env(load_yaml(file))
    assert "abc" not in str(error.value) and SECRET not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/a/b", "HF_HOME": "/c", "OMP_NUM_THREADS": 1}},
        {"env": {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}},
        {"sft": {"dataset": "d", "eos_token": "<|im_end|>", "pad_token": "<pad>"}},
    ],
)
def test_what_is_no_secret_is_taken(monkeypatch, changes):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    export_env(Recipe(None, {**MINIMAL, **changes}, {}))


@pytest.mark.parametrize(
    "judge",
    [
        {"base_url": "http://user:abc@localhost/v1"},
        {"base_url": "http://localhost/v1?key=abc"},
        {"base_url": "http://localhost/v1", "api_key_env": "abc-def"},
    ],
)
def test_secrets_of_a_judge_are_refused_without_showing_them(judge):
    recipe = {**MINIMAL, "scores": {"judge": {"model": "m", **judge}}}
    with pytest.raises(RecipeError, match=r"`scores\.judge\.(base_url|api_key_env)`") as error:
        parse_section(Recipe(None, recipe, {}), AriesConfig)
    assert "abc" not in str(error.value)


class Echo(BaseHTTPRequestHandler):
    """A server that quotes the headers it was sent: as a reply without a verdict, and then as an error."""

    requests = 0

    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        Echo.requests += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        said = f"You sent {self.headers['Authorization']} and half of a character: \ud83d"
        body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200 if Echo.requests <= 1 else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_no_file_of_a_run_and_no_error_holds_a_secret(tmp_path, monkeypatch):
    """A key of a judge and a token of the Hub in the environment; then every byte of the run directory is searched."""
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (tmp_path / "stage.py").write_text(
        "from trl_ext.aries.children import child_main\nfrom trl_ext.aries.stages.messages import PreflightMessage\n"
        "def main(message, report):\n    print(message)\n    report(1, 1)\n\nchild_main(main, PreflightMessage)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        judge = {"base_url": url, "model": "m", "api_key_env": "JUDGE_KEY", "max_retries": 0, "max_concurrency": 1}
        mapping = {**MINIMAL, "output_dir": str(tmp_path / "run"), "scores": {"judge": judge}}
        config = parse_section(Recipe(None, mapping, {}), AriesConfig)
        run_dir = RunDir(tmp_path / "run")
        with run_dir.opened(config, yaml.safe_dump(mapping), {}):
            round_dir = run_dir.round(0)
            round_dir.path.mkdir()
            chain = Chain("p", "x", [Answer(1, "a", 1, "stop"), Answer(2, "b", 1, "stop")])
            write_jsonl(round_dir.prompts, [{"prompt_id": "p", "prompt": "x"}])
            write_jsonl(round_dir.answers, [chain.to_row()])
            scorer = Judge(ScorerConfig(judge=JudgeConfig(**judge)))
            task = ScoreTask(round_dir.prompts, round_dir.answers)
            with pytest.raises(JudgeError, match=r"status 401: .*Bearer \*\*\*") as error:
                scorer.score([task], ScoreCache(run_dir.score_cache), lambda done, total: None)
            message = PreflightMessage.of(run_dir.path, Recipe(None, mapping, {}), conversational=False)
            run_child("stage", message, round_dir.logs / "stage.log", lambda done, total: None)
            run_dir.log_event(event="note", note=str(error.value))
            write_manifest(run_dir, config, 0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert SECRET not in str(error.value)
    files = [path for path in run_dir.path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "resolved.json", "manifest.json", "stage.log", "stage.job.json"} <= {
        path.name for path in files
    }
    assert "You sent Bearer ***" in run_dir.score_cache.read_text()
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


# Verifiers


def test_a_verifier_is_imported_from_its_file_only(tmp_path, monkeypatch):
    """
    Modules of the same name on the path and in the working directory are not imported, and the search path is as it was.
    """
    marker = tmp_path / "imported"
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    for directory in (elsewhere, here):
        directory.mkdir()
    (elsewhere / "verifier.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    (here / "verifier.py").write_text("def score(prompts, completions):\n    return [7.0]\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.chdir(elsewhere)
    path, modules = list(sys.path), set(sys.modules)
    assert load_verifier(f"{here}/verifier.py:score")([], []) == [7.0]
    assert not marker.exists() and sys.path == path and "verifier" not in set(sys.modules) - modules


def test_nothing_is_imported_where_the_recipe_names_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "imported"
    (tmp_path / "module.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef f(): pass\n")
    for reference in ("module:f", "module.f", "module", "os:system", ":f"):
        with pytest.raises(RecipeError, match="names no file"):
            load_verifier(reference)
    assert not marker.exists()


# Pickle


def test_weights_are_loaded_from_safetensors_everywhere():
    """Oracle: every call of `from_pretrained` on a model class in the ARIES modules says so."""
    package = Path(trl_ext.__file__).parent / "aries"
    loads = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("AutoModel"):
                if node.func.attr == "from_pretrained":
                    loads.append((path.name, any(keyword.arg == "use_safetensors" for keyword in node.keywords)))
    assert len(loads) >= 4
    assert [path for path, safe in loads if not safe] == []
