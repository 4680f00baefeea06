"""
Processes that end with whoever started them, together with all that they started.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence


PR_SET_PDEATHSIG = 1
LAUNCHER = "TRL_EXT_LAUNCHER"  # in the environment of what a launcher starts: its process id


def end_group(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own, and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_launcher(module: str, arguments: Sequence[str]) -> int:
    """
    Run a module that starts processes itself, such as accelerate's launcher, and wait for it. However this ends, and be it by
    SIGKILL, none of them is left, provided that they call [`die_with_launcher`].

    Returns:
        `int`: its exit code.
    """
    command = [sys.executable, "-m", "trl_ext.processes", str(os.getpid()), module, *arguments]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    finally:
        end_group(process)


def die_with_launcher() -> None:
    """In a process that [`run_launcher`]'s module has started: end with it."""
    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[LAUNCHER] = str(os.getpid())
    module = sys.argv[2]
    sys.argv[1:3] = []
    runpy.run_module(module, run_name="__main__", alter_sys=True)
