"""
A process that has imported the slow libraries, and forks the children that need them: a stage starts in milliseconds instead of seconds.

In: modules to import, then requests over a socket, each to run a module as `python -m` would. Out: the exit code of each child. A child has a
session, an environment, random states and output of its own, and its memory is returned when it ends. The server dies with
the process that asked for it, and each child with the server (`processes.py`).

A process that has started a GPU's driver or Python threads cannot be forked safely, and libraries read many variables once, as they are imported. So
the server refuses if it finds either in itself, and its client refuses if a child needs another environment or directory than the server has
([`CannotFork`]). The caller then starts a fresh process. Importing torch, TRL and vLLM starts native threads of OpenBLAS and jemalloc only, which
both libraries stop and restart around a fork.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import IO, Any, NamedTuple, NoReturn

from .processes import LAUNCHER, die_with_parent, launcher_command, name_process


# What may differ between a child and its server, since it is read when it is used. Any other variable may be one that an import reads
RUN_TIME_VARIABLES = {
    *("CUDA_VISIBLE_DEVICES", "PYTEST_CURRENT_TEST", "TENSORBOARD_LOGGING_DIR"),
    "TORCHINDUCTOR_CACHE_DIR",  # which torch sets in any process that looks it up
    *("WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_RUN_ID"),
}
NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED
HEADER = 8  # bytes: the length of a request


class CannotFork(Exception):
    """A child must be started as a fresh process. The message says why."""


# The client


class ForkedChild:
    """
    A child of the server, as far as its starter is concerned: `stdout`, and `wait()` as `subprocess.Popen` has it. When it is left as a context,
    the child is ended with all that it started.
    """

    def __init__(self, stdout: IO[str], control: socket.socket):
        self.stdout = stdout
        self._control, self._replies = control, control.makefile()
        self._code: int | None = None

    def __enter__(self) -> "ForkedChild":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)  # asks for its end
        self.wait()
        self.close()

    def close(self) -> None:
        for file in (self.stdout, self._replies, self._control):
            file.close()

    def reply(self) -> dict[str, Any] | None:
        """What the server says next, `None` if it has ended."""
        line = self._replies.readline()
        return json.loads(line) if line else None

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        if self._code is None:
            reply = self.reply()
            self._code = reply["code"] if reply else -signal.SIGKILL  # the server was killed, and the child with it
        return self._code


class ForkServer:
    """
    Start a server. It imports in the background; the first child waits for it.

    Args:
        ready (`Sequence[str]`):
            Modules to import before the first child is forked. One that cannot be imported is left to the child that needs it.
        later (`Sequence[str]`, *optional*):
            Modules to import when there is nothing else to do.
        environment (`Mapping[str, str]`):
            The variables under which they are imported.
        defaults (`Mapping[str, str]`, *optional*):
            Variables that are set in the server only, if `environment` does not have them.
        base ([`ForkServer`], *optional*):
            Fork this server from another one, and have what that one has imported.
    """

    def __init__(
        self,
        ready: Sequence[str],
        later: Sequence[str] = (),
        *,
        environment: Mapping[str, str],
        defaults: Mapping[str, str] | None = None,
        base: "ForkServer | None" = None,
    ):
        if sys.platform != "linux":
            raise CannotFork("forked processes end with their parent on Linux only")
        self._owner, self._directory = os.getpid(), os.getcwd()
        self._environment = {**(defaults or {}), **environment}
        self._own_variables = {*(defaults or {})}
        self._base = base
        changes = {} if base is None else base._changes(self._environment, self._own_variables)
        self._output = tempfile.TemporaryFile()
        self._channel, theirs = socket.socketpair()
        module, modules = "trl_ext.fork_server", [str(len(ready)), *ready, *later]
        with theirs:
            if base is None:
                self._process = subprocess.Popen(
                    launcher_command(module, *modules),
                    stdin=theirs,
                    stdout=self._output,
                    stderr=self._output,
                    env=self._environment,
                    start_new_session=True,
                )
            else:
                output = self._output.fileno()
                self._control = base._request([module, *modules], changes, [theirs.fileno(), output, output])
        atexit.register(self.close)

    def fork(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], stderr: IO[str]
    ) -> ForkedChild:
        """
        Run `python -m module` in a session of its own.

        Raises:
            [`CannotFork`]: it must be a fresh process.
        """
        changes = self._changes(environment)
        read, write = os.pipe()
        with open(write, "wb") as stdout, open(os.devnull, "rb") as stdin:
            streams = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            child = ForkedChild(open(read, encoding="utf-8"), self._request([module, *arguments], changes, streams))
        reply = child.reply() or {"refused": f"the server has ended{self._last_words()}"}
        if "refused" in reply:
            child.close()
            raise CannotFork(reply["refused"])
        return child

    def close(self) -> None:
        """End the server, its children and the servers that are based on it."""
        atexit.unregister(self.close)
        self._channel.close()
        self._output.close()
        if self._base is not None:
            self._control.close()
        elif os.getpid() == self._owner:
            self._process.kill()
            self._process.wait()

    def _changes(self, environment: Mapping[str, str], also: set[str] = frozenset()) -> dict[str, str | None]:
        """What a child has to set, or to remove (`None`), to be in this environment."""
        if os.getcwd() != self._directory:
            raise CannotFork(f"the working directory is no longer {self._directory}")
        names = self._environment.keys() | environment.keys()
        changes = {
            name: environment.get(name) for name in names if environment.get(name) != self._environment.get(name)
        }
        others = changes.keys() - RUN_TIME_VARIABLES - self._own_variables - also
        if others:
            raise CannotFork(f"the server has imported its libraries with another {', '.join(sorted(others))}")
        return changes

    def _request(self, arguments: list[str], changes: dict[str, str | None], streams: list[int]) -> socket.socket:
        """Ask for a child with these standard streams. The socket that is returned answers, and ends the child when it is closed."""
        if os.getpid() != self._owner:
            raise CannotFork("the server belongs to another process")
        request = json.dumps({"arguments": arguments, "environment": changes}).encode()
        control, theirs = socket.socketpair()
        with theirs:
            try:
                header = len(request).to_bytes(HEADER, "big")
                socket.send_fds(self._channel, [header], [theirs.fileno(), *streams])
                self._channel.sendall(request)
            except OSError:  # nobody listens; nobody will answer either
                pass
        return control

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return ": " + " ".join(lines[-3:]).strip() if any(lines) else ""


# The server


class Request(NamedTuple):
    arguments: list[str]
    environment: dict[str, str | None]


class Child(NamedTuple):
    pid: int
    control: socket.socket


class Server:
    """Answers requests, and looks after the children."""

    def __init__(self, channel: socket.socket):
        self._channel = channel
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}  # by the file descriptor that becomes readable when it has ended

    def serve(self, wait: bool) -> Request | None:
        """
        Handle what has arrived or, with `wait`, whatever arrives.

        Returns:
            `Request`: in a child, what it is to run. `None`: in the server.
        """
        while True:
            for key, _ in self._selector.select(None if wait else 0):
                if key.fileobj is self._channel:
                    request = self._answer()
                    if request is not None:
                        return request
                elif key.fileobj in self._children:
                    self._reap(key.fileobj)
                elif key.fileobj in [
                    child.control for child in self._children.values()
                ]:  # nobody waits for it any longer
                    self._selector.unregister(key.fileobj)
                    end_session(key.data)
            if not wait:
                return None

    def _answer(self) -> Request | None:
        header, files, _, _ = socket.recv_fds(self._channel, HEADER, maxfds=4)
        if not header:
            sys.exit()  # and the children with it
        text = self._channel.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
        request = Request(**json.loads(text))
        control = socket.socket(fileno=files[0])
        reason = why_not_forked()
        if reason is None:
            sys.stdout.flush()
            sys.stderr.flush()
            with warnings.catch_warnings(action="ignore"):  # of native threads: see above
                pid = os.fork()
            if pid == 0:
                control.close()
                self._become_child(request, files[1:])
                return request
            ended = os.pidfd_open(pid)
            self._children[ended] = Child(pid, control)
            self._selector.register(ended, selectors.EVENT_READ)
            self._selector.register(control, selectors.EVENT_READ, data=pid)
        tell(control, {"pid": pid} if reason is None else {"refused": reason})
        if reason is not None:
            control.close()
        for file in files[1:]:
            os.close(file)
        return None

    def _become_child(self, request: Request, streams: list[int]) -> None:
        """Drop what a fresh process would not have of the server's."""
        die_with_parent(self._pid)
        os.setsid()
        self._selector.close()
        for ended, child in self._children.items():
            os.close(ended)
            child.control.close()
        self._channel.detach()  # it is the server's stdin
        for number, file in enumerate(streams):
            os.dup2(file, number)
            os.close(file)
        for name, value in request.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ[LAUNCHER] = str(os.getpid())
        # `random` seeds itself again after a fork
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if "torch" in sys.modules:
            sys.modules["torch"].default_generator.seed()

    def _reap(self, ended: int) -> None:
        """Report how a child has ended, once what it started is killed too. Its process id is not reused before `waitpid`."""
        pid, control = self._children.pop(ended)
        end_session(pid)
        _, status = os.waitpid(pid, 0)
        tell(control, {"code": os.waitstatus_to_exitcode(status)})
        self._selector.unregister(ended)
        os.close(ended)
        with suppress(KeyError):
            self._selector.unregister(control)
        control.close()


def tell(control: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # who asked may be gone
        control.sendall(json.dumps(message).encode() + b"\n")


def end_session(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may not have made its session yet
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def why_not_forked() -> str | None:
    """What makes a fork of this process unsafe, or `None`."""
    if threading.active_count() > 1:
        names = sorted(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"an import has started threads: {', '.join(names)}"
    if driver_is_started():
        return "an import has started the driver of the GPU"
    return None


def driver_is_started() -> bool:
    """Whether this process has initialized CUDA or ROCm. Asking NVML about the devices does not, although it opens the same device files."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1", os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # it is not loaded
        return False
    return driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != NOT_INITIALIZED


def main() -> None:
    """`python -m trl_ext.fork_server N MODULE...`, with the socket as its stdin: N modules before the first child, the others after it."""
    count, *modules = sys.argv[1:]
    name_process("fork_server")
    os.close(os.pidfd_open(os.getpid()))  # a kernel without it ends the server here
    server = Server(socket.socket(fileno=0))
    request = None
    for number, module in enumerate(modules, start=1):
        with suppress(Exception):  # a child that needs it says what is wrong
            import_module(module)
        if request is None and number >= int(count):
            request = server.serve(wait=False)
        if request is not None:
            break
    if request is None:
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it looks at
        request = server.serve(wait=True)
    module, *sys.argv[1:] = request.arguments
    name_process(module.rpartition(".")[2])
    sys.modules.pop(module, None)  # as in a fresh process, even if another module has imported it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    end()


def end() -> NoReturn:
    """End a child as the interpreter does, except that it does not take every object apart, which takes a second. Errors end it the usual way."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
