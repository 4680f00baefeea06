"""What an ARIES recipe may say about the objective, and what of it reaches the trainer."""

from dataclasses import replace

import pytest

from trl_ext.aries.config import (
    AriesConfig,
    EvaluationConfig,
    PairsConfig,
    PromptsConfig,
    ScoresConfig,
)
from trl_ext.aries.training.settings import trainer_settings


CONFIG = AriesConfig(
    output_dir="run",
    model={"model_name_or_path": "m"},
    prompts=PromptsConfig("p.jsonl"),
    evaluation=EvaluationConfig("e.jsonl"),
    training={"trainer": "tdpo", "alpha": 0.3},
    scores=ScoresConfig(verifier="v.py:f"),
)


@pytest.mark.parametrize(
    ("training", "alpha"),
    [
        ({}, None),
        ({"objective": "logistic"}, None),
        ({"objective": "squared"}, 0.8),
        ({"objective": "squared", "objective_alpha": 0.5}, 0.5),
    ],
)
def test_the_objective_is_the_loops_and_alpha_the_trainers(training, alpha):
    """TDPO has an α of its own, under the same section."""
    settings = trainer_settings(replace(CONFIG, training=CONFIG.training | training), 1, "out")
    assert settings.objective_alpha == alpha
    assert settings.config["alpha"] == 0.3
    assert not settings.config.keys() & {"objective", "objective_alpha", "trainer", "reference"}


@pytest.mark.parametrize(
    ("training", "pairs", "message"),
    [
        ({"objective": "square"}, {}, "`training.objective` must be one of logistic, squared; got 'square'"),
        ({"objective_alpha": 0.5}, {}, "belongs to `training.objective: squared`"),
        ({"objective": "squared", "objective_alpha": 0.0}, {}, r"must be a number in \(0, 1\], got 0.0"),
        ({"objective": "squared", "objective_alpha": "0.8"}, {}, r"must be a number in \(0, 1\], got '0.8'"),
        ({"objective": "squared"}, {"refinement_weight": 0}, "`pairs.refinement_weight: 0` leaves them out"),
        ({"objective": "squared"}, {"direct_weight": 0}, "`pairs.direct_weight: 0` leaves out the rows of L_direct"),
    ],
)
def test_an_objective_without_its_rows_is_refused(training, pairs, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, training=CONFIG.training | training, pairs=PairsConfig(**pairs))


def test_without_direct_rows_the_objective_is_refining_alone():
    training = CONFIG.training | {"objective": "squared", "objective_alpha": 1.0}
    assert replace(CONFIG, training=training, pairs=PairsConfig(direct_weight=0)).pairs.direct_weight == 0
