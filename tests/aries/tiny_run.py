"""A run of the loop at a tiny size, on the sorting task: its recipe, how it is run, and what it made."""

import json
import re
import subprocess
import sys
from pathlib import Path


SLOTS, MAX_TOKENS, PROMPTS, EVALUATION_PROMPTS, TURNS = 4, 8, 24, 10, 3
# The smallest recipe that parses; none of the files it names is there
MINIMAL = {
    "output_dir": "run",
    "model": {"model_name_or_path": "model"},
    "prompts": {"dataset": "prompts.jsonl"},
    "evaluation": {"dataset": "eval.jsonl"},
    "scores": {"verifier": "verifier.py:score"},
    "training": {},
}
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "report_to": "none"}


def recipe(sorting: Path, output_dir: Path, **changes) -> dict:
    return {
        "output_dir": str(output_dir),
        "rounds": 2,
        "model": {
            "model_name_or_path": str(sorting / "model"),
            "dtype": "float32",
            "use_peft": True,
            "lora_r": 8,
            "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
        },
        "prompts": {"dataset": str(sorting / "train.jsonl"), "per_round": PROMPTS},
        "sft": {
            "dataset": str(sorting / "sft.jsonl"),
            **ON_CPU,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "save_steps": 4,
        },
        "generation": {"max_model_len": 64, "max_num_seqs": SLOTS, "dtype": "float32", "cpu_kv_cache_gib": 1},
        "drafts": {"temperature": 1.0, "max_tokens": MAX_TOKENS},
        "refinements": {"turns": TURNS, "template": "{{ question }} Draft : {{ draft }} . Write a better answer ."},
        "scores": {"verifier": "recipes/quickstart/verifier.py:partial_match"},
        "pairs": {"direct_weight": 2},
        "training": {"trainer": "tdpo", **ON_CPU, "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 8},
        "evaluation": {"dataset": str(sorting / "eval.jsonl"), "samples": EVALUATION_PROMPTS},
        **changes,
    }


def command(file: Path, action: str = "run") -> list[str]:
    return [sys.executable, "-m", "trl_ext.cli", "aries", action, "--config", str(file)]


def run(file: Path, action: str = "run") -> str:
    """Run the command line to its end; what it printed."""
    done = subprocess.run(command(file, action), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(path: Path) -> dict[str, bytes | dict]:
    """Contents of everything a run made, but for clocks (logs, events, the trainers' own histories)."""
    found: dict[str, bytes | dict] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and not re.search(
            r"/?logs/|/training/|tensorboard/|events.jsonl|run.lock|resolved.json|recipe.yaml|cost.json|report.html|tracking.json|progress.json",
            name,
        ):
            # Paths differ between two run directories, and with them what is hashed over them
            content = file.read_bytes().replace(str(path).encode(), b"RUN")
            if file.name == "manifest.json":
                content = json.loads(content)
                for key in ("recipe_sha256", "parent", "commit"):
                    del content[key]
            found[name] = content
    return found
