"""
A full disk, by the kernel itself: `/dev/full`, which takes no byte, a file system of 64 KiB where this user may mount one, and a limit
on the size of files. Every error names the place, nothing partial has a final name, and with space again the work goes on.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trl_ext.aries.children import ChildError
from trl_ext.aries.config import AriesConfig, EvaluationConfig, PromptsConfig, ScoresConfig
from trl_ext.aries.data.disk import DiskError, writing
from trl_ext.aries.data.records import append_lines, read_jsonl, recover_jsonl, to_line, write_json, write_jsonl
from trl_ext.aries.policies import Policy
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.scoring.scores import ScoreCache, content_key
from trl_ext.aries.training.settings import TrainerSettings, Training
from trl_ext.recipe import RecipeError


FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


def rows(count):
    return [{"row": i, "text": "x" * 100} for i in range(count)]


def test_a_file_that_is_written_whole(tmp_path):
    """The temporary file is `/dev/full`; the file that was there before stays as it was."""
    file = tmp_path / "pairs.jsonl"
    write_jsonl(file, rows(1))
    (tmp_path / "pairs.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=f"{file}: {FULL}"):
        write_jsonl(file, rows(1000))
    assert read_jsonl(file) == rows(1)
    assert list(tmp_path.iterdir()) == [file], "and the space that was taken is given back"


def test_appending_goes_on_behind_the_last_whole_line(small_disk):
    """The disk takes a part of a line. Later lines must not be glued to it."""
    filler, file = small_disk / "filler", small_disk / "events.jsonl"
    filler.write_bytes(b"x" * 40_000)
    with pytest.raises(DiskError, match=f"{file}: {FULL}"):
        append_lines(file, map(to_line, rows(300)))
    assert not file.read_bytes().endswith(b"\n"), "a torn line"
    filler.unlink()
    append_lines(file, [to_line({"row": "last"})])
    *whole, last = read_jsonl(file)
    assert last == {"row": "last"} and 0 < len(whole) < 300 and whole == rows(len(whole))


def test_scores_that_were_found_out_are_kept(small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    cache = ScoreCache(small_disk / "score_cache.jsonl")
    with pytest.raises(DiskError, match=f"score_cache.jsonl: {FULL}"):
        for i in range(10_000):
            cache.add([{"key": content_key(i), "score": 0.5}])
    known = len(cache)
    filler.unlink()
    again = ScoreCache(small_disk / "score_cache.jsonl")
    assert 0 < len(again) <= known
    again.add([{"key": content_key("next"), "score": 1.0}])
    assert len(list(recover_jsonl(again.path))) == len(again)


def test_a_run_on_a_full_disk(small_disk):
    """Everything that the loop writes itself is named, in whatever stage; what is there can be continued."""
    config = AriesConfig(
        output_dir=str(small_disk / "run"),
        model={"model_name_or_path": "m"},
        prompts=PromptsConfig("p.jsonl"),
        evaluation=EvaluationConfig("e.jsonl"),
        training={},
        scores=ScoresConfig(verifier="v.py:f"),
    )
    run_dir = RunDir(small_disk / "run")
    with pytest.raises(DiskError, match=f"{small_disk}/run.*: {FULL}"):
        with run_dir.opened(config, "recipe: text\n", {}):
            (small_disk / "filler").write_bytes(b"x" * 40_000)
            while True:
                run_dir.log_event(event="note", note="x" * 1000)
    (small_disk / "filler").unlink()
    with run_dir.opened(config, "recipe: text\n", {}):
        run_dir.log_event(event="start")
        assert run_dir.read_events()[-1]["event"] == "start"


@pytest.mark.parametrize("target", ["output", "config"])
def test_a_policy_that_does_not_fit(small_disk, sorting, tmp_path, target):
    """The adapter, by safetensors' own writer, and a checkpoint, by torch's: no policy under its final name."""
    from trl_ext.aries.training.train import train

    rows = tmp_path / "sft.jsonl"
    write_jsonl(rows, [{"prompt": "Sort : 2 1", "completion": "1 2"}] * 8)
    places = {"output": tmp_path / "adapter", "config": tmp_path / "training"}
    places[target] = small_disk / places[target].name
    model = {"use_peft": True, "lora_r": 32, "lora_target_modules": ["q_proj", "v_proj"], "dtype": "float32"}
    config = {"output_dir": str(places["config"]), "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    policy = Policy(str(sorting / "model"), None)
    training = Training(TrainerSettings("sft", config), model, policy, policy, rows, places["output"], max_dropped=0.5)
    with pytest.raises(DiskError, match=f"{small_disk}/(.|\n)*(No space left|file write failed)"):
        train(training, lambda done, total: None)
    assert not places["output"].exists()


def test_a_limit_on_file_sizes_reads_the_same(tmp_path):
    """As a quota does; in a process of its own, since a limit cannot be taken back."""
    code = (
        "import sys; from pathlib import Path; from trl_ext.aries.data.records import write_jsonl\n"
        "write_jsonl(Path(sys.argv[1]), [{'text': 'x' * 100}] * 1000)"
    )
    file = tmp_path / "pairs.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert f"DiskError: cannot write {file}: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_to(tmp_path, monkeypatch):
    """A read-only file system, which stops root too."""
    if os.geteuid() == 0:
        place = tmp_path / "read_only"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True).returncode:
            pytest.skip("this user may not mount a file system")
    else:
        place = tmp_path
        place.chmod(0o500)
    try:
        with pytest.raises(DiskError, match=f"{place}/a.json"):
            write_json(place / "a.json", {})
    finally:
        if place != tmp_path:
            subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    "error",
    [
        RecipeError("No space left on device"),
        ChildError("No space left on device"),
        ValueError("no"),
        FileNotFoundError(2, "no"),
    ],
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as raised:
        with writing(Path("x")):
            raise error
    assert raised.value is error


def test_what_libraries_say_is_understood():
    with pytest.raises(DiskError, match="adapter: Error while serializing"):
        with writing(Path("adapter")):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
