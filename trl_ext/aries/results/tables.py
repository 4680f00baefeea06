"""
The tables of scores that a run prints at its end, and `trl-ext aries status` at any time.
"""

from typing import Any

from rich.table import Table


def score_table(
    metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str, scores: str = "score"
) -> Table:
    """
    Mean scores on the evaluation prompts with 95 % intervals: rounds down, answers y1, y2, ... across. Four turns fit on 100 columns.

    Args:
        metrics (`dict[int, dict]`):
            Metrics of each evaluated round, from [`~aries.scoring.evaluation.evaluation_metrics`].
        turns (`int`):
            Answers per chain.
        has_sft (`bool`):
            Whether round 0 is the policy after SFT or the recipe's model.
        kind (`str`):
            What to call the prompts, from [`~aries.checks.overlap.prompts_kind`].
        scores (`str`, *optional*, defaults to `"score"`):
            What to call the scores.
    """
    prompts = max((m["prompts"] for m in metrics.values()), default=0)
    interval = (
        ", with 95 % interval" if any("interval" in turn for m in metrics.values() for turn in m["turns"]) else ""
    )
    table = Table(title=f"Mean {scores} of each answer on {prompts} {kind} prompts{interval}", title_justify="left")
    table.add_column("policy")
    for turn in range(1, turns + 1):
        table.add_column(f"y{turn}" + (" (direct)" if turn == 1 else ""), justify="right")
    for number, round_metrics in sorted(metrics.items()):
        cells = (score_cell(turn, round_metrics["prompts"]) for turn in round_metrics["turns"])
        table.add_row(policy_name(number, has_sft), *cells)
    return table


def selecting_table(metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> Table | None:
    """[`score_table`] of the scorers that select, `None` unless others judge."""
    found = {
        n: of_round | {"turns": of_round["selecting"]} for n, of_round in metrics.items() if "selecting" in of_round
    }
    return score_table(found, turns, has_sft, kind, "selecting score (`scores`)") if found else None


def score_cell(turn: dict[str, Any], prompts: int) -> str:
    """
    The mean, its number of answers if some prompts have none, and on a second line the interval; ± standard error for version 0.1.0.
    """
    if turn["score"] is None:
        return "-"
    count = "" if turn["scored"] == prompts else f" (n={turn['scored']})"
    if "interval" not in turn:
        error = "" if turn["standard_error"] is None else f" ± {turn['standard_error']:.3f}"
        return f"{turn['score']:.3f}{error}{count}"
    return f"{turn['score']:.3f}{count}{interval_line(turn['interval'])}"


def answers_table(metrics: dict[int, dict[str, Any]], has_sft: bool) -> Table:
    """
    What a mean score does not say about the last evaluated round, answers down: win rate over round 0, changes by refining, lengths
    compared with round 0's. Arguments as in [`score_table`].
    """
    last = max(metrics)
    table = Table(title=f"Answer by answer: {policy_name(last, has_sft)}", title_justify="left")
    table.add_column("answer")
    right_defined = any(turn["flips"] is not None for turn in metrics[last]["turns"])
    flipped = ["wrong→right,\nright→wrong"] if right_defined else []
    for name in ("win rate\nover round 0", "refining\nbetter, worse", *flipped, "left\nas it was"):
        table.add_column(name, justify="right")
    table.add_column("tokens" if last == 0 else "tokens\n(round 0)", justify="right")
    table.add_column("cut off", justify="right")
    initial = metrics[0]["turns"] if last > 0 and 0 in metrics else [{"tokens": None}] * len(metrics[last]["turns"])
    for turn, first in zip(metrics[last]["turns"], initial, strict=True):
        wins, changed, flips = turn["win_rate_round_0"], turn["changes"], turn["flips"]
        counts = "-" if flips is None else f"{flips['wrong_to_right']}, {flips['right_to_wrong']}"
        table.add_row(
            f"y{turn['turn']}",
            "-" if wins is None else f"{wins['win_rate']:.3f}{interval_line(wins['interval'])}",
            "-" if changed is None else f"{changed['improved']}, {changed['worsened']}",
            *([counts] if right_defined else []),
            "-" if turn["identical"] is None else f"{turn['identical']:.0%}",
            ("-" if turn["tokens"] is None else f"{turn['tokens']:.0f}")
            + ("" if first["tokens"] is None else f" ({first['tokens']:.0f})"),
            "-" if turn["truncated_share"] is None else f"{turn['truncated_share']:.0%}",
        )
    return table


def policy_name(number: int, has_sft: bool) -> str:
    return ("after SFT" if has_sft else "initial model") if number == 0 else f"round {number}"


def interval_line(interval: list[float] | None) -> str:
    """The interval on a line of its own, with three decimals, or two from 10 so that a reward model's scores fit."""
    if interval is None:
        return ""
    low, high = (f"{bound:.{3 if abs(bound) < 10 else 2}f}" for bound in interval)
    return f"\n[{low}, {high}]"
