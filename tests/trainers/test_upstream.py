"""
The faults below that `trl_ext/trainers/upstream.py` works around, and one that is refused, each reproduced with the libraries alone: a test that
fails says that the fault is mended, and that its work-around can go. FSDP2's are in `tests/distributed`, bitsandbytes' in `tests/aries/training/test_train.py`.
"""

import pytest
import torch
from peft import get_peft_model
from tests.conftest import first_batch, perturb, train_step
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer


def test_resuming_a_trained_adapter_beside_its_reference(make_trainer, tiny_model_dir, lora_config, tmp_path):
    """transformers (5.17) loads the adapters in a checkpoint's subfolders, "ref", and leaves the trained one, at its root, as it was."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    trainer = make_trainer(DPOTrainer, DPOConfig, model=get_peft_model(base, lora_config), max_steps=1)
    perturb(trainer.model, scale=0.2)
    saved = {name: p.clone() for name, p in trainer.model.named_parameters() if ".default." in name}
    trainer.save_model(str(tmp_path / "checkpoint"))
    perturb(trainer.model, scale=0.2, seed=2)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert not any(torch.equal(p, saved[name]) for name, p in trainer.model.named_parameters() if name in saved)


def test_the_hinge_loss_takes_no_weights(make_trainer):
    """TRL (1.16) multiplies the losses of the pairs by WPO's weights in place, and `relu` has kept its result for the backward."""
    trainer = make_trainer(DPOTrainer, DPOConfig, loss_type="hinge", use_weighting=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train_step(trainer, first_batch(trainer))
