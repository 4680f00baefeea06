"""
Tracking: send a round's metrics to the trackers in the recipe's `training.report_to`, through accelerate's classes.

A run is one run in the tracker, which every round and every restart continues. Each training is another run in the same group. A child
process keeps the trackers' imports and threads out of the loop.
"""

import os
import re
import secrets
from collections.abc import Callable
from typing import Any

from ...recipe import RecipeError
from ..children import ChildError, child_main, run_child
from ..config import AriesConfig
from ..data.records import read_json, write_json
from ..run_dir import RunDir
from .progress import WARNING, RunProgress


TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "huggingface"  # transformers' default


def is_tracked(config: AriesConfig) -> bool:
    return config.training.get("report_to", "none") not in (None, "none", [], ["none"])


def run_name(run: RunDir) -> str:
    """
    The run's name in a tracker: its directory's name and an id, since other runs may be in a directory of this name.
    """
    if not run.tracking.exists():
        name = re.sub(r"[^\w.-]", "-", run.path.resolve().name)
        write_json(run.tracking, {"name": f"{name}-{secrets.token_hex(4)}"})
    return read_json(run.tracking)["name"]


def tracked_training(job: dict[str, Any], run: RunDir, config: AriesConfig, number: int) -> dict[str, str]:
    """
    Name a training in its job, and return the environment for transformers' callbacks, so that a training that was killed continues its
    run in the tracker too.
    """
    if not is_tracked(config):
        return {}
    group = run_name(run)
    name = job["config"].setdefault("run_name", f"{group}-round_{number:02d}")
    return {
        "WANDB_RUN_GROUP": group,
        "WANDB_RUN_ID": re.sub(r"[^\w.-]", "-", name),
        "WANDB_RESUME": "allow",
        "TENSORBOARD_LOGGING_DIR": str(run.path / "tensorboard" / f"round_{number:02d}"),
    }


def round_values(run: RunDir, number: int) -> dict[str, float]:
    """
    Numbers of an evaluated round with flat keys: metrics by turn, KL, pairs, generated tokens, and seconds by stage.
    """
    round_dir = run.round(number)
    metrics, cost, drops = map(read_json, (round_dir.metrics, round_dir.cost, round_dir.drops))
    values: dict[str, Any] = {"round": number}
    for turn in metrics["turns"]:
        found = {key: turn[key] for key in ("score", "tokens", "distinct_2", "truncated_share", "similarity")}
        found |= {key: (turn[key] or {}).get("win_rate") for key in ("win_rate_round_0", "win_rate_previous")}
        found["accuracy"] = turn["correct"]  # a share already
        values |= {f"{key}/turn_{turn['turn']}": value for key, value in found.items()}
        values |= {f"flips/{key}/turn_{turn['turn']}": value for key, value in (turn["flips"] or {}).items()}
    if metrics["kl_to_initial"] is not None:
        values["kl_to_initial"] = metrics["kl_to_initial"]["per_token"]
    if drops is not None:
        values |= {"pairs": drops["pairs"], "dropped": sum(drops["dropped"].values())}
    values |= {f"generated_tokens/{key}": value for key, value in cost["generated_tokens"].items()}
    values |= {f"seconds/{stage['stage']}": stage["seconds"] for stage in cost["stages"]}
    return {f"aries/{key}": value for key, value in values.items() if value is not None}


def track(run: RunDir, config: AriesConfig, number: int, progress: RunProgress) -> None:
    """
    Send a round's metrics to the trackers; the trainings report themselves. A failure is a warning and does not stop the run.
    """
    if not is_tracked(config):
        return
    log = run.round(number).logs / "tracking.log"
    try:
        run_child("trl_ext.aries.results.tracking", tracking_job(run, config, number), log, lambda done, total: None)
    except (RecipeError, ChildError, OSError) as error:
        last = str(error).splitlines()[-1]
        progress.say(f"{'':<11}metrics of round {number} were not tracked, see {log}: {last}", style=WARNING)


def tracking_job(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    report_to = config.training["report_to"]
    return {
        "report_to": [report_to] if isinstance(report_to, str) else report_to,
        "name": run_name(run),
        "project": config.training.get("project"),
        "space": config.training.get("trackio_space_id"),
        "directory": str(run.path / "tensorboard"),
        "round": number,
        "values": round_values(run, number),
    }


def main(job: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    """The child process: log one round's values, under its number as the step."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState(cpu=True)  # accelerate's logger asks for it
    names = map(str, get_available_trackers()) if job["report_to"] == ["all"] else job["report_to"]
    for name in names:
        if name not in TRACKERS:  # others get the trainings only
            continue
        project, options = job["project"] or PROJECT, {"name": job["name"], "resume": "allow"}
        if name == "tensorboard":
            project, options = "rounds", {"logging_dir": job["directory"]}
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            options |= {"id": job["name"], "group": job["name"]}
        elif job["space"]:
            options["space_id"] = job["space"]
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        tracker.start()
        tracker.log(job["values"], step=job["round"])
        tracker.finish()


if __name__ == "__main__":
    child_main(main)
