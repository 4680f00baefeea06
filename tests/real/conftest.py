"""Real tokenizers and a real model, where `tests/real/fetch.py` has put them."""

import os
from pathlib import Path

import pytest

from tests.real.fetch import FOLDER, MODEL, TOKENIZERS


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session", params=TOKENIZERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(name):
    from transformers import AutoTokenizer

    path = FOLDER / "tokenizers" / name
    assert path.exists(), f"{path} is not there: `python -m tests.real.fetch`, which `make test-real` runs"
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def gemma() -> str:
    assert MODEL.exists(), f"{MODEL} is not there: `python -m tests.real.fetch --model`, which `make test-real` runs"
    return str(MODEL)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
