"""Real child processes, each running a small module written by the test: as fresh processes, and forked from a server."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from trl_ext import fork_server
from trl_ext.aries import children
from trl_ext.aries.children import ChildError, run_child
from trl_ext.launch import Launch
from trl_ext.recipe import RecipeError


@dataclass
class Job:
    n: int = 0
    file: str = ""
    log: str = ""
    inner: bool = False


HEAD = """
from dataclasses import dataclass
from trl_ext.aries.children import child_main, run_child
from trl_ext.recipe import RecipeError
import json, os, signal, subprocess, sys, time


@dataclass
class Job:
    n: int = 0
    file: str = ""
    log: str = ""
    inner: bool = False
"""


@pytest.fixture(params=["fresh", "forked"])
def way(request) -> str:
    """How the children of a test start."""
    return request.param


class Stage:
    """Runs `main(job, progress)` with a body as a child."""

    def __init__(self, directory: Path):
        self.directory, self.log, self.notes = directory, directory / "logs" / "stage.log", []
        self.on_progress = None

    def __call__(self, body: str, env: dict[str, str] | None = None, **job) -> list[tuple[int, int]]:
        """Its progress reports."""
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        source = (
            f"{HEAD}\ndef main(job, progress):\n{lines}\n\nif __name__ == '__main__':\n    child_main(main, Job)\n"
        )
        (self.directory / "stage.py").write_text(source)
        reports = []
        on_progress = self.on_progress or (lambda *report: reports.append(report))
        run_child("stage", Job(**job), self.log, on_progress, env, self.notes.append)
        return reports

    def tell(self, expression: str, env: dict[str, str] | None = None) -> object:
        """The value of an expression in a child."""
        self(f"progress.note(json.dumps({expression}))", env)
        return json.loads(self.notes.pop())


@pytest.fixture
def stage(way, tmp_path, monkeypatch) -> Stage:
    return make_stage(way, [], tmp_path, monkeypatch)


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """A function of modules to import: a stage whose children are forked from a server that has imported them."""
    return lambda *modules: make_stage("forked", modules, tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def servers(monkeypatch):
    """No test sees another one's servers."""
    monkeypatch.setattr(children, "_servers", {})
    yield children._servers
    for server in reversed(children._servers.values()):
        server.close()


def make_stage(way: str, modules, tmp_path, monkeypatch) -> Stage:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    if way == "forked":
        monkeypatch.setitem(children.SERVER_OF, "stage", "test")
        monkeypatch.setitem(children.IMPORTS, "test", (modules, []))
    return Stage(tmp_path)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


# However it starts


def test_progress_comes_back_and_prints_go_to_the_log(stage):
    body = "print('from Python')\nos.system('echo from the shell')\nprogress(job.n, 2)\nprogress(2, 2)"
    assert stage(body, n=1) == [(1, 2), (2, 2)]
    log = stage.log.read_text()
    assert "from Python" in log and "from the shell" in log
    assert "fresh process" not in log


def test_the_two_ways_are_two(stage, way):
    assert (stage.tell("os.getppid()") == os.getpid()) == (way == "fresh")


def test_notes_come_back(stage):
    assert stage("progress(0, 1)\nprogress.note('a server is lost')\nprogress(1, 1)") == [(0, 1), (1, 1)]
    assert stage.notes == ["a server is lost"]


def test_prints_at_import_time_go_to_the_log_too(stage, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HEAD", HEAD + "print('a banner')\n")
    assert stage("progress(1, 1)") == [(1, 1)]
    assert "a banner" in stage.log.read_text()


def test_a_failure_shows_the_end_of_the_log_and_where_it_is(stage):
    with pytest.raises(ChildError, match="exit code 1(.|\n)*stage.log(.|\n)*the reason"):
        stage("raise RuntimeError('the reason')")


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("sys.exit(3)", "ended with exit code 3"),
        ("os._exit(4)", "ended with exit code 4"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL, as the kernel does when memory runs out"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "was ended by SIGTERM"),
    ],
)
def test_how_it_ended(stage, body, how):
    with pytest.raises(ChildError, match=f"stage {how}"):
        stage(body)
    assert stage("progress(1, 1)") == [(1, 1)]


def test_what_is_left_to_do_at_its_end_is_done(stage):
    """Threads are waited for, `atexit` is run, and what was printed is flushed."""
    stage(
        "import atexit, threading\natexit.register(print, 'the last word')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('a thread', end=' '))).start()"
    )
    assert stage.log.read_text() == "a thread the last word\n"


def test_bad_input_comes_back_as_itself(stage):
    with pytest.raises(RecipeError, match="^recipe.yaml:3: wrong$"):
        stage("raise RecipeError('recipe.yaml:3: wrong')")


def test_ends_that_meet(forked):
    """Bad input ends a child and the wait for it at the same moment. The server outlives that."""
    stage = forked()
    server = stage.tell("os.getppid()")
    for _ in range(20):
        with pytest.raises(RecipeError):
            stage("raise RecipeError('wrong')")
    assert stage.tell("os.getppid()") == server


@pytest.mark.parametrize("end", ["pass", "raise RecipeError('wrong')", "progress(1, 1)\ntime.sleep(600)"])
def test_what_the_child_started_ends_with_it(stage, tmp_path, end):
    """When it ends, when it finds bad input, and when the one who waits for it is interrupted."""

    def interrupt(*report):
        raise KeyboardInterrupt

    stage.on_progress = interrupt
    start = "p = subprocess.Popen(['sleep', '600'])\nopen(job.file, 'w').write(f'{os.getpid()} {p.pid}')\n"
    with suppress(RecipeError, KeyboardInterrupt):
        stage(start + end, file=str(tmp_path / "pid"))
    for pid in map(int, (tmp_path / "pid").read_text().split()):
        assert wait_until_dead(pid)


@pytest.mark.parametrize("place", ["at work", "while it imports"])
def test_the_child_dies_with_its_parent(tmp_path, way, place):
    """The parent is killed with SIGKILL, so nothing of it can clean up; a stage spends its first seconds on imports."""
    pid_file, asked = tmp_path / "pids", tmp_path / "asked"
    # By then it has asked the kernel to end with its parent
    grandchild = f"import time; open({str(asked)!r}, 'w'); time.sleep(600)"
    lines = [
        "from trl_ext.processes import launcher_command",
        f"p = subprocess.Popen(launcher_command('-c', {grandchild!r}))",  # as the loop starts what it starts
        f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}} {{os.getppid()}}.')",
        "time.sleep(600)",
    ]
    work, imports = (lines, []) if place == "at work" else (["pass"], lines)
    body = "\n".join(
        [*imports, "def main(job, progress):", *(f"    {line}" for line in work), "child_main(main, Job)"]
    )
    (tmp_path / "stage.py").write_text(f"{HEAD}\n{body}\n")
    fork = "children.SERVER_OF['stage'], children.IMPORTS['test'] = 'test', ([], [])" if way == "forked" else ""
    code = (
        "from pathlib import Path; from trl_ext.aries import children\n"
        f"{fork}\nfrom dataclasses import make_dataclass; children.run_child('stage', make_dataclass('Job', [])(), Path({str(tmp_path / 'stage.log')!r}), print)"
    )
    paths = os.pathsep.join([str(tmp_path), os.getcwd()])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    while not (asked.exists() and pid_file.exists() and pid_file.read_text().endswith(".")):
        assert parent.poll() is None
        time.sleep(0.05)
    child, grandchild, starter = map(int, pid_file.read_text()[:-1].split())
    assert (starter == parent.pid) == (way == "fresh")
    assert all(map(is_alive, (child, grandchild, starter)))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all(map(wait_until_dead, (child, grandchild, starter)))


# Forked


def test_the_environment_is_that_of_a_fresh_process(forked, monkeypatch):
    stage = forked()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    stage.tell("1")  # the server is there, and has these
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for changes in ({}, {"CUDA_VISIBLE_DEVICES": "4", "TORCHINDUCTOR_CACHE_DIR": "/a"}):
        found = stage.tell("[dict(os.environ), os.getpid()]", changes)
        own = {fork_server.LAUNCHER: str(found[1])}
        assert found[0] == {**os.environ, **children.ENVIRONMENT, **changes, **own}
    assert "fresh process" not in stage.log.read_text()
    there = "os.getcwd(), __spec__.name, sys.argv[1:], os.getsid(0) == os.getpid(), __name__"
    job = str(stage.log.with_suffix(".job.json"))
    assert stage.tell(f"[{there}]") == [os.getcwd(), "stage", [job], True, "__main__"]
    open_files = stage.tell("sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1])")
    kinds = [file.partition(":")[0] for file in open_files]
    assert kinds == ["/dev/null", str(stage.log), str(stage.log), "pipe"], (
        "nothing of the server's or of another child's"
    )


def test_what_an_import_reads_makes_a_fresh_process(forked, tmp_path, monkeypatch):
    stage = forked()
    assert stage.tell("os.getppid()") != os.getpid()
    for change in (lambda: monkeypatch.setenv("HF_HOME", "elsewhere"), lambda: monkeypatch.chdir(tmp_path)):
        with monkeypatch.context() as monkeypatch:
            change()
            assert stage.tell("[os.getppid(), os.environ.get('HF_HOME')]") == [os.getpid(), os.environ.get("HF_HOME")]
    log = stage.log.read_text()
    assert "fresh process" in log and "HF_HOME" in log and os.getcwd() in log
    assert stage.tell("os.getppid()") != os.getpid()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), name='busy', daemon=True).start()", "busy"),
        (
            "import sys, types\nsys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))",
            "GPU",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the server has ended"),
        ("import os, sys\nprint('out of luck', flush=True)\nos._exit(1)", "the server has ended: out of luck"),
    ],
)  # fmt: skip
def test_a_server_that_must_not_fork(forked, tmp_path, module, reason):
    stage = forked("trouble")
    (tmp_path / "trouble.py").write_text(module)
    for _ in range(2):
        assert stage.tell("os.getppid()") == os.getpid()
    assert reason in stage.log.read_text()


@pytest.mark.parametrize(("code", "started"), [(fork_server.NOT_INITIALIZED, False), (0, True), (201, True)])
def test_a_driver_that_an_import_has_started_is_found(code, started, monkeypatch):
    """Loaded, as NVML and bitsandbytes leave it, is not started. The stand-in for CUDA's library answers as `cuCtxGetCurrent` does."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(fork_server.threading, "active_count", lambda: 1)
    assert fork_server.why_not_forked() is None  # not loaded here
    library = types.SimpleNamespace(cuCtxGetCurrent=lambda context: code)
    monkeypatch.setattr(fork_server.ctypes, "CDLL", lambda name, mode: library)
    assert ("GPU" in (fork_server.why_not_forked() or "")) == started


def test_a_module_that_the_server_has_is_run_anew(forked):
    """As in a fresh process: its own code, as `__main__`, and as it is now."""
    stage = forked("stage")
    assert stage("progress(1, 1)") == [(1, 1)]
    assert stage("progress(2, 2)") == [(2, 2)]
    assert stage.tell("os.getppid()") != os.getpid()
    assert "RuntimeWarning" not in stage.log.read_text()


def test_a_module_that_cannot_be_imported_is_left_to_the_child(forked):
    assert forked("trl_ext.nowhere").tell("os.getppid()") != os.getpid()


def test_random_states_are_each_child_s_own(forked):
    """As in fresh processes, which seed themselves."""
    stage = forked("numpy", "torch")
    state = "[__import__('random').random(), __import__('numpy').random.rand(), __import__('torch').rand(1, dtype=float).item()]"
    first, second = stage.tell(state), stage.tell(state)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert stage.tell("hash('trl')") == stage.tell("hash('trl')"), "PYTHONHASHSEED is the same"


def test_memory_is_returned(forked):
    stage = forked("numpy")
    body = (
        "data = __import__('numpy').ones(50_000_000)\nprogress(os.getpid(), os.getppid())\n"
        "while not os.path.exists(job.file): time.sleep(0.01)"
    )
    held, measured = [], stage.directory / "measured"

    def measure(*pids: int) -> None:
        held.append([(pid, resident_kib(pid)) for pid in pids])
        measured.touch()

    stage.on_progress = measure
    for _ in range(3):
        measured.unlink(missing_ok=True)
        stage(body, file=str(measured))
    first, _, last = ([kib for _, kib in both] for both in held)
    assert first[0] > 390_000, "a child has 400 MB"
    assert last[1] < first[1] + 4096, "its server does not grow"
    assert not any(Path(f"/proc/{both[0][0]}").exists() for both in held)


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def test_a_server_that_is_killed(forked):
    """Its children end with it, as when memory runs out, and later ones are fresh processes."""
    stage = forked()
    stage.on_progress = lambda *report: os.kill(children._servers["test"]._process.pid, signal.SIGKILL)
    with pytest.raises(ChildError, match="SIGKILL"):
        stage("progress(1, 1)\ntime.sleep(600)")
    assert stage.tell("os.getppid()") == os.getpid()


def test_a_child_s_children_are_fresh_processes(forked, monkeypatch):
    stage = forked()
    inner = "if job.inner:\n    return progress.note(str(os.getppid()))\n"
    settings = "from trl_ext.aries import children; children.SERVER_OF['stage'] = 'test'\nfrom pathlib import Path\n"
    stage(
        f"{inner}{settings}run_child('stage', Job(inner=True), Path(job.log), print, on_note=progress.note)\nprogress.note(str(os.getpid()))",
        log=str(stage.directory / "inner.log"),
    )
    assert stage.notes[0] == stage.notes[1]


def test_a_server_on_another_one(forked, servers, monkeypatch):
    """As vLLM's is on TRL's: it has what that one has imported and what it imports itself, and ends with it."""
    stage = forked("colorsys")
    monkeypatch.setitem(children.SERVER_OF, "stage", "upper")
    environment = {**os.environ, **children.ENVIRONMENT}
    servers["test"] = fork_server.ForkServer(["colorsys"], environment=environment)
    servers["upper"] = fork_server.ForkServer(
        ["sndhdr"], environment=environment, defaults={"VLLM_LOGGING_LEVEL": "WARNING"}, base=servers["test"]
    )
    found = stage.tell(
        "[m in sys.modules for m in ('colorsys', 'sndhdr')] + [os.environ.get('VLLM_LOGGING_LEVEL'), os.getppid()]"
    )
    assert found[:3] == [True, True, os.environ.get("VLLM_LOGGING_LEVEL")]
    monkeypatch.setitem(children.SERVER_OF, "stage", "test")
    links = "[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1]]"
    assert not any(link.startswith("socket") for link in stage.tell(links)), "the other server is not a child's affair"
    with open(f"/proc/{found[3]}/stat") as file:
        below = int(file.read().rpartition(")")[2].split()[1])
    servers["test"].close()
    assert wait_until_dead(below) and wait_until_dead(found[3])


def test_a_launched_training_is_not_forked():
    assert Launch("ddp.yaml").command("trl_ext.aries.stages.train", "job")[0] not in children.SERVER_OF


def test_the_names_of_modules():
    named = [
        *children.SERVER_OF,
        *(module for lists in children.IMPORTS.values() for modules in lists for module in modules),
    ]
    assert [module for module in named if module.startswith("trl_ext") and find_spec(module) is None] == []
    assert set(children.SERVER_OF.values()) == set(children.IMPORTS)


def test_the_libraries_work_in_a_child(forked, monkeypatch):
    """OpenMP's threads, autograd's, those of Arrow and worker processes start anew in it; what the server has are none of them."""
    stage = forked(*children.IMPORTS["trl"][0])
    found = stage.tell("""[
        m in sys.modules for m in ("torch", "trl", "peft", "datasets", "accelerate")
    ] + [sorted({open(f"/proc/{os.getppid()}/task/{t}/comm").read().strip() for t in os.listdir(f"/proc/{os.getppid()}/task")})]""")
    assert found[:-1] == [True] * 5
    assert set(found[-1]) <= {"fork_server", "jemalloc_bg_thd"}
    stage(
        "import torch\nfrom datasets import Dataset\ntorch.set_num_threads(2)\n"
        "x = torch.eye(600, requires_grad=True)\n((x @ x).sum() * 2).backward()\n"
        "rows = Dataset.from_list([{'a': i} for i in range(20)]).map(lambda row: {'b': row['a'] + 1}, num_proc=2)\n"
        "loader = torch.utils.data.DataLoader(rows.with_format('torch'), batch_size=5, num_workers=2)\n"
        "progress(int(x.grad.sum()), int(sum(batch['b'].sum() for batch in loader)))"
    )
