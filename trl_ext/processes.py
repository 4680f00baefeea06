"""
Processes that end with whoever started them, together with all that they started.

Each is started through this module, which asks the kernel for that before it imports anything: a stage spends seconds on its imports, and its
parent may be killed meanwhile. So nothing but the standard library is imported here.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
LAUNCHER = "TRL_EXT_LAUNCHER"  # in the environment of what a launcher starts: its process id


@contextmanager
def process_group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """
    Start a process in a session of its own. When the context is left, the process is ended with everything it started, and its pipes
    are closed.

    Args:
        command (`Sequence[str]`):
            As `subprocess.Popen` takes it.
        options:
            Likewise.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def run_launcher(module: str, arguments: Sequence[str]) -> int:
    """
    Run a module, which may start processes itself as accelerate's launcher does, and wait for it. However this ends, even by
    SIGKILL, none of them is left, provided that they call [`die_with_launcher`].

    Returns:
        `int`: its exit code.
    """
    with process_group(launcher_command(module, *arguments)) as process:
        return process.wait()


def launcher_command(module: str, *arguments: str) -> list[str]:
    """
    The command of a module, or of code after `-c`, that ends with this process, and that tells what it starts how to end with it.
    """
    return [sys.executable, "-m", "trl_ext.processes", str(os.getpid()), module, *arguments]


def die_with_launcher() -> None:
    """In a process that a [`launcher_command`]'s module has started: end with it. In that module itself there is nothing to do."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and int(launcher) != os.getpid():
        die_with_parent(int(launcher))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def name_process(name: str) -> None:
    """What `top` and `ps -o comm` show of this process, up to 15 letters (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15])


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[LAUNCHER] = str(os.getpid())
    module = sys.argv[2]
    sys.argv[1:3] = []
    if module == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
