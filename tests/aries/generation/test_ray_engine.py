"""Generation on Ray. Oracle: the embedded engine's answers to the same prompts, with the same seeds."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.aries.engine_process import Asked, run_engine
from tests.aries.tiny_run import MINIMAL

from trl_ext.aries.config import AriesConfig, DraftsConfig, GenerationConfig, RefinementsConfig
from trl_ext.aries.data.records import read_jsonl, to_line
from trl_ext.aries.generation.chains import EngineSettings
from trl_ext.recipe import Recipe, RecipeError, parse_section


PROMPTS, TURNS = 40, 2
# Importing it here would set variables, and the embedded engine would not be forked
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [
        {"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i % 10} {i // 10} 3"}]}
        for i in range(PROMPTS)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(map(to_line, rows)))
    return path


def embedded(model: str, prompts: Path, answers: Path) -> list[dict]:
    refinements = RefinementsConfig(turns=TURNS, template="{{ question }} Draft : {{ draft }} .")
    task = Asked(prompts, answers, refinements, [DraftsConfig(temperature=1.0, max_tokens=8)] * TURNS)
    config = GenerationConfig(max_model_len=64, max_num_seqs=4, dtype="float32", cpu_kv_cache_gib=1)
    run_engine(EngineSettings(model, config), [task])
    return read_jsonl(answers)


@needs_ray
@pytest.mark.vllm
def test_a_node_that_is_killed_loses_nothing(tiny_model_path, prompts, tmp_path):
    """Two nodes, one killed by SIGKILL after a fourth of the chains: every chain once, as if there had been one engine."""
    job = {"prompts": str(prompts), "answers": str(tmp_path / "ray.jsonl"), "model": tiny_model_path}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job | {"kill_after": PROMPTS // 4, "turns": TURNS}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-m", "tests.aries.ray_run", str(file)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ray.jsonl.notes").read_text())
    assert result["used"] == [1, 2] and result["ready"] == 2
    [note] = result["notes"]
    assert note.startswith("worker ") and note.endswith("1 of 2 are in use") and " of Ray is lost" in note
    assert read_jsonl(tmp_path / "ray.jsonl") == embedded(tiny_model_path, prompts, tmp_path / "embedded.jsonl")


@needs_ray
@pytest.mark.slow
def test_a_request_that_kills_its_workers_is_set_aside(tiny_model_path, prompts, tmp_path):
    """Its chain alone has no answer; those that were lost beside it are answered all the same."""
    ids = [row["prompt_id"] for row in read_jsonl(prompts)]
    job = {"prompts": str(prompts), "answers": str(tmp_path / "ray.jsonl"), "model": tiny_model_path, "turns": 2}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job | {"poison": f"{ids[3]}/1", "max_retries": 2}))
    script = [sys.executable, "-m", "tests.aries.ray_poison", str(file)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "ray.jsonl")
    assert [row["prompt_id"] for row in rows] == ids
    assert [row["stopped"] for row in rows] == ["request_failed" if i == 3 else None for i in range(len(ids))]
    assert [len(row["answers"]) for row in rows] == [0 if i == 3 else 2 for i in range(len(ids))]
    lost, set_aside = (
        [note for note in json.loads((tmp_path / "ray.jsonl.notes").read_text()) if word in note]
        for word in ("is lost", "set aside")
    )
    assert len(lost) == 3 and len(set_aside) == 1
    assert f"a request of {ids[3]} was lost with 3 workers of Ray" in set_aside[0]


def test_what_was_lost_is_sent_last_and_in_ever_smaller_batches():
    """With 2 retries and 16 sequences: 4 beside each other after one loss, one alone after two."""
    ray_engine = pytest.importorskip("trl_ext.aries.generation.ray_engine")
    engine = ray_engine.RayEngine.__new__(ray_engine.RayEngine)
    engine._config, engine._losses = GenerationConfig(engine="ray", max_num_seqs=16, max_retries=2), Counter()
    place = ray_engine.Place(1)
    place.waiting = [f"{i}/1" for i in range(8)]
    assert engine._next(place) == place.waiting
    engine._losses.update({f"{i}/1": 1 for i in range(7)})
    assert engine._next(place) == ["7/1"]
    place.sent, place.waiting = {"7/1"}, place.waiting[:7]
    assert engine._next(place) == []
    place.sent = set()
    assert engine._next(place) == place.waiting[:4]
    place.sent, place.waiting = {"0/1"}, ["9/1"]
    assert engine._next(place) == [], "nothing new goes to a worker that may die"
    engine._losses.update({"1/1": 1, "2/1": 1})
    place.sent, place.waiting = set(), ["0/1", "1/1", "2/1"]
    assert engine._next(place) == ["1/1"]


def test_requests_wait_for_whichever_worker_comes_first():
    """Where all are lost, none of them may keep requests to itself: it need not come back."""
    ray_engine = pytest.importorskip("trl_ext.aries.generation.ray_engine")
    engine = ray_engine.RayEngine.__new__(ray_engine.RayEngine)
    engine._config, engine._home = GenerationConfig(engine="ray", ray_workers=2), {}
    engine._places = first, second = ray_engine.Place(1), ray_engine.Place(2)
    for i in range(6):
        engine._assign(f"{i}/1")
    assert len(first.waiting) == len(second.waiting) == 3
    engine._reassign()
    assert len(first.waiting) == 3, "nobody is there yet"
    second.dtype = "float32"
    engine._reassign()
    assert first.waiting == [] and sorted(second.waiting) == [f"{i}/1" for i in range(6)]


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"ray_workers": 2}, "are for `generation.engine: ray`"),
        ({"engine": "ray", "ray_workers": 0}, "`generation.ray_workers` must be positive"),
        ({"engine": "ray", "base_urls": ["http://a:1/v1"]}, "are both given"),
        ({"engine": "rya"}, "must be one of"),
    ],
)
def test_settings_that_do_not_go_together(generation, message):
    with pytest.raises(RecipeError, match=message):
        parse_section(Recipe(None, {**MINIMAL, "generation": generation}, {}), AriesConfig)
