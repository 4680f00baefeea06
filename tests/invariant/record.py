"""
Recorded trajectories: a short seeded training on the tiny Llama, in fp32 on one thread, whose numbers at each step must
stay what they were. `tests/trainers/test_drop_in.py` compares; to record again, after a change that is meant to move
them (say in the commit why):

    python -m tests.invariant.record

writes `tests/invariant/tdpo.json`: per variant the settings and each step's metrics, and the versions that made them.
"""

import json
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.conftest import make_conversational_pairs, save_tiny_llama
from trl_ext import TDPOConfig, TDPOTrainer


FILE = Path(__file__).parent / "tdpo.json"
SETTINGS = {variant: {"variant": variant, "alpha": 0.5, "beta": 0.1} for variant in ("tdpo1", "tdpo2")}
METRICS = ("loss", "grad_norm", "position_kl/chosen", "position_kl/rejected", "rewards/chosen", "rewards/rejected")


def trajectory(model_dir, **settings) -> list[dict[str, float]]:
    """The metrics of eight steps with AdamW, two shuffled epochs of eight pairs in batches of two."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output_dir:
        args = TDPOConfig(
            output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            max_steps=8,
            seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = TDPOTrainer(
            str(model_dir),
            args=args,
            train_dataset=make_conversational_pairs(),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
        )
        trainer.train()
    return [{name: log[name] for name in METRICS} for log in trainer.state.log_history if "loss" in log]


def main() -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as model_dir:
        save_tiny_llama(Path(model_dir))
        runs = {
            name: {"settings": settings, "steps": trajectory(model_dir, **settings)}
            for name, settings in SETTINGS.items()
        }
    packages = ("torch", "transformers", "trl", "accelerate", "trl-ext")
    record = {"versions": {name: version(name) for name in packages}, **runs}
    FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
