"""Which checkpoint a training continues from, where a kill tore the last ones."""

import json

import pytest
import torch

from trl_ext.aries.training.checkpoints import last_whole_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint of two processes, as far as it matters here."""

    def make(step: int):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for rank in (0, 1):
            torch.save({"cpu": torch.random.get_rng_state()}, path / f"rng_state_{rank}.pth")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return path

    return make


def without_random_states(path):
    (path / "rng_state_1.pth").unlink()


def half_of_the_random_states(path):
    content = (path / "rng_state_1.pth").read_bytes()
    (path / "rng_state_1.pth").write_bytes(content[: len(content) // 2])


def half_of_the_trainers_state(path):
    (path / "trainer_state.json").write_text('{"global')


@pytest.mark.parametrize(
    "tear",
    [without_random_states, half_of_the_random_states, half_of_the_trainers_state],
    ids=lambda tear: tear.__name__,
)
def test_of_two_processes(checkpoint, tmp_path, monkeypatch, tear):
    monkeypatch.setenv("WORLD_SIZE", "2")
    whole, torn = checkpoint(9), checkpoint(10)
    assert last_whole_checkpoint(tmp_path) == torn  # before it is
    tear(torn)
    assert last_whole_checkpoint(tmp_path) == whole
    assert not torn.exists()


def test_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
