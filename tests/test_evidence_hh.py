"""
docs/evidence/real/hh.py, end to end on a tiny random model: its own measurements against what the trainers log, λ = 0 against DPO, and the tables.
"""

import sys
from dataclasses import replace
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from docs.evidence.real import hh


QUESTIONS = [
    f"why is the {colour} {thing} ?" for colour in ("blue", "green", "red") for thing in ("sky", "sea", "fox")
]
GOOD, BAD = ["because light scatters", "it is the light"], ["no", "yes no yes", "you are brief no"]


@pytest.fixture
def data(tiny_model_dir, tmp_path, monkeypatch):
    """The files that the runs read: 36 dialogues in HH-RLHF's columns, prepared with a score that dislikes "no", and a start."""
    from transformers import AutoTokenizer

    dialogues = [
        f"\n\nHuman: {q}\n\nAssistant: yes .\n\nHuman: {o}\n\nAssistant:"
        for q in QUESTIONS
        for o in ("what ?", "how ?")
    ]
    rows = [{"chosen": f"{d} {GOOD[i]}", "rejected": f"{d} {BAD[i]}"} for i in range(2) for d in dialogues]
    rows.append({"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"] + "\n\nHuman: no"})  # two dialogues
    datasets.Dataset.from_list(rows).to_json(tmp_path / "hh.jsonl")
    score = ModuleType("profanity_check")
    score.predict_prob = lambda texts: torch.tensor([text.split().count("no") / 4 for text in texts]).numpy()
    monkeypatch.setitem(sys.modules, "profanity_check", score)
    monkeypatch.setattr(hh, "BATCH", 4)
    hh.prepare(str(tmp_path / "hh.jsonl"), AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "pairs.json")
    return {"data": tmp_path / "pairs.json", "size": replace(hh.FULL, held_out=8), "models": tmp_path / "models"}


def test_hh(data, tiny_model_dir, tmp_path, capsys, single_thread):
    held_out, training = hh.split(data["data"], data["size"], seed=0)
    assert len(held_out) + len(training) <= 36
    assert all(pair["gap"] == 0.25 * pair["rejected"].split().count("no") for pair in training)
    openings = [{pair["prompt"].split("\n\nAssistant:")[0] for pair in pairs} for pairs in (held_out, training)]
    assert not openings[0] & openings[1]

    rows = [
        {"arm": "SFT", "seed": 0, **row} for row in hh.start(0, model=tiny_model_dir, tokenizer=tiny_model_dir, **data)
    ]
    of_arm = {}
    for arm in hh.ARMS:
        trainer, evaluate = hh.make_trainer(arm, 0, 1e-3, epochs=2, **data)
        trainer.train()
        of_arm[arm] = [{"arm": arm, "seed": 0, **row} for row in evaluate.rows]
        rows += of_arm[arm]
        # The trainers' numbers, from their own batches and kernels
        last, logged = evaluate.rows[-1], trainer.evaluate()
        assert logged["eval_rewards/margins"] == pytest.approx(trainer.beta * last["margin"], abs=1e-4)
        assert logged["eval_rewards/accuracies"] == last["accuracy"]
        for side in ("chosen", "rejected"):
            if "TDPO" in arm:
                assert logged[f"eval_position_kl/{side}"] == pytest.approx(last[f"kl_{side}"], abs=1e-4)
        if "Sr-DPO" in arm and arm != hh.LAMBDA_0:
            assert logged["eval_refinement/margin"] == pytest.approx(last["delta"], abs=1e-5)
            assert logged["eval_refinement/accuracies"] == last["accuracy_under_p"]

    of_both = ([[row[key] for key in row if key != "arm"] for row in of_arm[arm]] for arm in (hh.LAMBDA_0, "DPO"))
    np.testing.assert_array_equal(*of_both)  # a correlation with a constant is NaN in both
    assert of_arm["DPO"][-1]["train_margin"] > of_arm["DPO"][0]["train_margin"] > 0

    hh.write(rows, tmp_path / "hh.csv")
    rows = hh.read(tmp_path / "hh.csv", texts=("arm",))
    text = hh.tables(rows)
    assert f"| DPO | {of_arm['DPO'][-1]['margin']:.2f} |" in text
    hh.draw(rows, tmp_path)
    assert "Sr-DPO, λ = 1" in (tmp_path / "self_refine_hh.svg").read_text(encoding="utf-8")
