from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.results.cost import round_cost


def test_by_hand():
    """
    Round 1 generated once, was killed in its training and trained again: 2.5 s, then 4 s and one run of unknown length. The SFT
    belongs to round 0. The memory of the training is known. Drafts of 3 and 5 tokens; refinements of 4 and 6 after the first only; an evaluation answer of 7.
    """
    events = [
        {"event": "start", "round": 0, "stage": "sft"},
        {"event": "end", "round": 0, "stage": "sft", "seconds": 9.0},
        {"event": "start", "round": 1, "stage": "scores"},
        {"event": "end", "round": 1, "stage": "scores", "seconds": 1.5},
        {"event": "note", "round": 1, "stage": "scores", "note": "2 replies without a verdict"},
        {"event": "start", "round": 1, "stage": "training (dpo)"},
        {"event": "start", "round": 1, "stage": "training (dpo)"},
        {
            "event": "end",
            "round": 1,
            "stage": "training (dpo)",
            "seconds": 4.0,
            "peak_memory": 7,
            "peak_gpu_memory": 3,
        },
        {"event": "start", "round": 1, "stage": "scores"},
        {"event": "note", "round": 1, "stage": "scores", "note": "3 replies without a verdict"},
        {"event": "end", "round": 1, "stage": "scores", "seconds": 1.0},
    ]
    chains = [
        Chain("a", "x", [Answer(1, "t", 3, "stop"), Answer(2, "t", 4, "stop"), Answer(3, "t", 6, "stop")]),
        Chain("b", "x", [Answer(1, "t", 5, "stop")]),
    ]
    assert round_cost(events, 1, chains, [Chain("e", "x", [Answer(1, "t", 7, "stop")])]) == {
        "generated_tokens": {"drafts": 8, "refinements": 10, "evaluation": 7},
        "stages": [
            {"stage": "scores", "seconds": 2.5, "interrupted": 0},
            {"stage": "training (dpo)", "seconds": 4.0, "interrupted": 1, "peak_memory": 7, "peak_gpu_memory": 3},
        ],
    }
