"""
Runs of an experiment: each in a process of its own, several at a time, and none twice.

In: a function of one run's settings, and the settings of all runs. Out: their rows, and one JSON file per finished run, which a second call
reads instead of running it again.
"""

import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trl_ext.processes import die_with_parent


Row = dict[str, Any]


def name_of(settings: Row) -> str:
    """A file's name from the values, such as `TDPO2-a-0.5_0.1_0`."""
    return "_".join(re.sub(r"[^\w.+-]+", "-", str(value)).strip("-") for value in settings.values())


def run_all(run: Callable[..., list[Row]], settings: list[Row], folder: Path, *, jobs: int = 1) -> list[Row]:
    """
    The rows of `run(**settings)` for each of the settings, in their order, each row with the settings it belongs to.

    Args:
        run (`Callable`):
            A function of a module (processes are spawned, so no lambda) that returns rows that JSON can hold.
        settings (`list[dict]`):
            Keyword arguments of each run. Delete `folder` after changing anything that is not among them.
        folder (`Path`):
            Where finished runs are kept. A killed experiment loses at most the runs that had not finished.
        jobs (`int`, *optional*, defaults to `1`):
            Processes at a time.

    Raises:
        Exception: what the first run that failed raised, once the runs that had begun are over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name_of(one)}.json" for one in settings]
    if len(set(paths)) < len(paths):
        raise ValueError("two runs have the same settings")
    missing = [(one, path) for one, path in zip(settings, paths, strict=True) if not path.exists()]
    print(f"{len(settings)} runs, {len(settings) - len(missing)} of them are in {folder}", flush=True)
    # A process for each run: the next one starts with all memory free. A killed experiment leaves none behind
    with ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=die_with_parent,
        initargs=(os.getpid(),),
        max_tasks_per_child=1,
    ) as pool:
        started = time.monotonic()
        futures = {pool.submit(run, **one): path for one, path in missing}
        for number, future in enumerate(as_completed(futures), 1):
            try:
                rows = future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            path = futures[future]
            part = path.with_suffix(".part")
            part.write_text(json.dumps(rows), encoding="utf-8")
            os.replace(part, path)
            print(f"{number}/{len(missing)} {path.stem}, {time.monotonic() - started:.0f} s", flush=True)
    return [
        one | row
        for one, path in zip(settings, paths, strict=True)
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
