"""The experiments in docs/evidence/real: what can be checked of them without a model."""

import pytest
import torch
from docs.evidence.real import aries

from trl_ext.aries.config import AriesConfig
from trl_ext.recipe import load_yaml, parse_section


SIZES = {"rounds": 3, "per_round": 4, "sft": 4, "held_out": 4}
PROMPTS = [{"unseen": False}, {"unseen": True}] * 20


@pytest.mark.parametrize("method", aries.METHODS)
def test_recipes_of_the_methods(method, tmp_path):
    recipe = aries.recipe_of(method, 1, "model", tmp_path, tmp_path / "run", SIZES)
    del recipe["env"]
    (tmp_path / "r.yaml").write_text(aries.yaml.safe_dump(recipe))
    config = parse_section(load_yaml(tmp_path / "r.yaml"), AriesConfig)
    # A pair has three rows under every method, and a prompt has four answers
    rows = config.pairs.direct_weight + 2 * config.pairs.refinement_weight
    assert (rows, config.refinements.turns, config.rounds) == (3, 4, 3)
    assert len(config.training["loss_type"]) == len(config.training["loss_weights"])
    assert config.training["use_cpu"] == config.sft["use_cpu"] == (not torch.cuda.is_available())


def test_rows_of_a_turn():
    """
    By hand, for y2: the seen prompts score 1 and the unseen ones 0.5, so all of the first are right and none of the others. y2 was 1 for all in
    round 0 and 0 for all in round 1, so it loses against the first: it wins none of the comparisons, and ties half.
    """
    answers = [["same", "draft"] * 20, ["same", "better"] * 20]
    scores = [[[0.0] * 40, [1.0] * 40], [[0.0] * 40, [0.0] * 40], [[0.0] * 40, [1.0, 0.5] * 20]]
    row = aries.turn_row(1, answers, scores, PROMPTS)
    assert row == {
        "score_seen": 1.0,
        "right_seen": 1.0,
        "score_unseen": 0.5,
        "right_unseen": 0.0,
        "unchanged": 0.5,
        "lost": "round 0",
    }
    assert aries.turn_row(0, answers, scores[:1], PROMPTS)["unchanged"] == ""


def test_tables_of_runs(tmp_path):
    """Two seeds whose y1 is right for 40 and 60 %; under another method ten points more, and a method that ended after round 1."""

    def rows(method: str, seed: int, rounds: int, right: float) -> list[dict]:
        shared = {
            "pairs": 10,
            "rows": 30,
            "generated_tokens": 1000,
            "kl_per_token": 0.25,
            "lost": "",
            "unchanged": 1.0,
        }
        shared |= {"right_seen": right, "right_unseen": right}
        return [
            {"method": method, "seed": seed, "round": float(n), "turn": turn} | shared
            for n in range(rounds + 1)
            for turn in range(1, 5)
        ]

    made = [row for seed in (0, 1) for row in rows("ARIES, TDPO", seed, 2, 0.4 + 0.2 * seed)]
    made += [row for seed in (0, 1) for row in rows("ARIES, DPO", seed, 2, 0.5 + 0.2 * seed)]
    made += rows("best answers", 0, 1, 0.1)
    lines = aries.tables(made).splitlines()
    end = "| 50.0 ± 127.1 " * 4 + "|"  # 12.706 · 14.142 / √2
    assert f"| ARIES, TDPO {end}" in lines and f"| SFT {end}" in lines
    assert "| ARIES, DPO " + "| +10.0 ± 0.0 " * 4 + "|" in lines
    assert "| best answers " + "| not reached " * 4 + "|" in lines
    assert "| best answers | y1 | 10.0 | 10.0 | not reached |" in lines
    assert "| ARIES, DPO | 20 | 60 | 2,000 | 0.25, 0.25 | 0 of 16 | 100 % |" in lines
    aries.draw(made, figure := tmp_path / "aries.svg")
    assert "iterative" not in figure.read_text() and "best answers" in figure.read_text()
