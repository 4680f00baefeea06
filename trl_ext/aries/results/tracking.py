"""
Tracking: send a round's metrics to the trackers in the recipe's `training.report_to`, through accelerate's classes.

A run is one run in the tracker, which every round and every restart continues. Each training is another run in the same group. A child
process keeps the trackers' imports and threads out of the loop.
"""

import os
import re
import secrets
from typing import Any

from ..config import AriesConfig
from ..data.records import read_json, write_json
from ..run_dir import RunDir
from ..training.settings import trainer_settings


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


def training_name(run: RunDir, config: AriesConfig, number: int) -> str | None:
    """The name of a training in a tracker, `None` if nothing is tracked: the recipe's `run_name`, or the run's with the round's number."""
    if not is_tracked(config):
        return None
    own = trainer_settings(config, number, "").config.get("run_name")
    return own or f"{run_name(run)}-round_{number:02d}"


def training_environment(run: RunDir, config: AriesConfig, number: int) -> dict[str, str]:
    """What transformers' callbacks read: a training that was killed continues its run in the tracker too."""
    name = training_name(run, config, number)
    if name is None:
        return {}
    return {
        "WANDB_RUN_GROUP": run_name(run),
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
    values |= {f"selecting_score/turn_{turn['turn']}": turn["score"] for turn in metrics.get("selecting", ())}
    if metrics["kl_to_initial"] is not None:
        values["kl_to_initial"] = metrics["kl_to_initial"]["per_token"]
    if drops is not None:
        values |= {"pairs": drops["pairs"], "dropped": sum(drops["dropped"].values())}
    values |= {f"generated_tokens/{key}": value for key, value in cost["generated_tokens"].items()}
    values |= {f"seconds/{stage['stage']}": stage["seconds"] for stage in cost["stages"]}
    return {f"aries/{key}": value for key, value in values.items() if value is not None}


def log_round(run: RunDir, config: AriesConfig, number: int) -> None:
    """Log a round's values with its number as the step."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState(cpu=True)  # accelerate's logger asks for it
    values, own_name, report_to = round_values(run, number), run_name(run), config.training["report_to"]
    names = [report_to] if isinstance(report_to, str) else report_to
    for name in map(str, get_available_trackers()) if names == ["all"] else names:
        if name not in TRACKERS:  # these have the trainer's metrics alone
            continue
        project, options = config.training.get("project") or PROJECT, {"name": own_name, "resume": "allow"}
        space = config.training.get("trackio_space_id")
        if name == "tensorboard":
            project, options = "rounds", {"logging_dir": str(run.path / "tensorboard")}
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            options |= {"id": own_name, "group": own_name}
        elif space:
            options["space_id"] = space
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        tracker.start()
        tracker.log(values, step=number)
        tracker.finish()
