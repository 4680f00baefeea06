"""A long run: what the loop's own process holds must not grow with the rounds."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.aries.tiny_run import ON_CPU, command, recipe


ROUNDS = 30
VERIFIER = """
def spread(prompts, completions, **kwargs):
    return [sum(map(ord, c[-1]["content"])) % 97 for c in completions]
"""


def held_by(pid: int) -> dict[str, int]:
    """Resident KiB, open files and threads of a process, and how many processes it has."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "KiB": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
    }


@pytest.mark.slow
@pytest.mark.vllm
def test_thirty_rounds(sorting, tmp_path, capsys):
    """
    The parent is looked at as each round's training starts. Between the first rounds and the last, its memory grows by less
    than 5 %, and nothing else grows at all.
    """
    output, file = tmp_path / "run", tmp_path / "r.yaml"
    (tmp_path / "verifier.py").write_text(VERIFIER)
    changes = {
        "rounds": ROUNDS,
        "prompts": {"dataset": str(tmp_path / "prompts.jsonl"), "per_round": 6},
        "evaluation": {"dataset": str(sorting / "eval.jsonl"), "samples": 4},
        "scores": {"verifier": f"{tmp_path}/verifier.py:spread"},
        "parity": {"samples": 4},
        "health": {"max_dropped": None},
        "training": {"trainer": "dpo", **ON_CPU, "max_steps": 1, "save_strategy": "no", "learning_rate": 1e-6},
    }
    (tmp_path / "prompts.jsonl").write_text((sorting / "train.jsonl").read_text() * 3)
    settings = recipe(sorting, output, **changes)
    settings["sft"]["max_steps"] = 40  # until answers end
    file.write_text(yaml.safe_dump(settings))
    held = []
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(file), stdout=log, stderr=log)
        for number in range(1, ROUNDS + 1):
            training = output / f"round_{number:02d}" / "logs" / "training.log"
            while not training.exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            held.append(held_by(process.pid))
        assert process.wait() == 0, (tmp_path / "log").read_text()

    with capsys.disabled():
        for number in (0, 9, 19, 29):
            sys.stdout.write(f"\nround {number + 1}: {held[number]}")
    early, late = (statistics.median(one["KiB"] for one in part) for part in (held[2:8], held[-6:]))
    assert late < 1.05 * early
    for what in ("files", "threads", "children"):
        assert max(one[what] for one in held[-6:]) <= max(one[what] for one in held[:6])
