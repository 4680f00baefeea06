"""
Checkpoints inside a round's training: which one a killed training continues from, and what the Trainer does not restore from it.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

from transformers import TrainerCallback

from ...trainers.upstream import load_adapter_weights


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a kill, are removed."""
    checkpoints = sorted(
        output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True
    )
    for checkpoint in checkpoints:
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether it is complete: the main process has written its last file, and each of several processes its random states."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else []
    return all(zipfile.is_zipfile(checkpoint / name) for name in names)


class RestoreAdapter(TrainerCallback):
    """Load the trained adapter of a checkpoint, for TRL's own trainers too. If models are sharded, the Trainer does it."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        load_adapter_weights(model, self._checkpoint, "default")
