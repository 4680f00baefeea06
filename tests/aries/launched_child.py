"""A stage that fails as its job says: `faults` by rank. The others report their progress and wait."""

import os
import signal
import time
from dataclasses import dataclass

from trl_ext.aries.children import child_main
from trl_ext.recipe import RecipeError


@dataclass
class Job:
    faults: dict[str, str]
    seconds: float


def main(job, progress):
    rank = os.environ["RANK"]
    progress(int(rank), 2)  # as every process does; the first one's is heard
    fault = job.faults.get(rank)
    if fault == "bad input":
        raise RecipeError(f"process {rank} found bad input")
    if fault == "failure":
        raise RuntimeError(f"process {rank} failed")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(job.seconds)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    child_main(record(main), Job)
