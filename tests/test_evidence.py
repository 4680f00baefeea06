"""
The experiments in docs/evidence/small: their pages have the tables that their figures' scripts make of their raw results, the correlations are the
textbook's, and the gaps of the sorting task are what they are said to be.
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
SMALL = EVIDENCE / "small"


@pytest.mark.parametrize("script", sorted(SMALL.glob("*_figure.py")), ids=lambda path: path.stem)
def test_tables_are_those_of_the_raw_results(script, tmp_path):
    shutil.copytree(EVIDENCE, tmp_path / "docs" / "evidence")
    command = [sys.executable, "-m", f"docs.evidence.small.{script.stem}"]
    printed = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout
    page = (SMALL / f"{script.stem.removesuffix('_figure')}.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) > 10
    assert [line for line in tables if line not in page] == []


def test_correlations():
    """
    Of (1, 2, 3, 4) and (1, 3, 2, 2), by hand. Pearson: deviations (-3, -1, 1, 3) / 2 and (-1, 1, 0, 0), 1 / √(5 · 2). Spearman: the ranks of the second
    are (1, 4, 2.5, 2.5), deviations (-1.5, 1.5, 0, 0), 1.5 / √(5 · 4.5). Kendall: of six pairs three have the same order, two the
    opposite, one is tied in the second: 1 / √(6 · 5).
    """
    from docs.evidence.small.correlations import kendall, pearson, spearman

    x, y = [1, 2, 3, 4], [1, 3, 2, 2]
    assert pearson(x, y) == pytest.approx(1 / math.sqrt(10))
    assert spearman(x, y) == pytest.approx(1.5 / math.sqrt(22.5))
    assert kendall(x, y) == pytest.approx(1 / math.sqrt(30))
    assert all(math.isnan(correlation(x, [1, 1, 1, 1])) for correlation in (pearson, spearman, kendall))


def test_gaps_of_the_sorting_task_are_known():
    """The gap is the difference in wrong digits; a wrong label turns the pair round and changes nothing else."""
    from docs.evidence.small.sorting import make_pairs

    pairs, noisy = make_pairs(200, seed=1), make_pairs(400, seed=1, flipped=0.2)
    for pair, other in zip(pairs, noisy, strict=False):
        solution = sorted(pair.prompt.split()[2:-1])
        wrong = [
            sum(a != b for a, b in zip(text.split(), solution, strict=True)) for text in (pair.rejected, pair.chosen)
        ]
        assert wrong[0] - wrong[1] == pair.gap > 0
        assert not pair.flipped
        texts = (other.rejected, other.chosen) if other.flipped else (other.chosen, other.rejected)
        assert (other.prompt, other.gap, *texts) == (pair.prompt, pair.gap, pair.chosen, pair.rejected)
    assert sum(pair.flipped for pair in noisy) == pytest.approx(80, abs=25)


@pytest.mark.slow
def test_a_disabled_or_flipped_preference_term_shows(tmp_path):
    """
    docs/evidence/small/preference_term.md: alone, the term of each trainer adds to the direct answers what a disabled one would not, and flipped it takes
    away much more. With the quickstart's NLL term beside it neither shows.
    """
    from docs.evidence.small import preference_term

    alone = [setting for setting in preference_term.SETTINGS if setting.endswith("alone")]
    gains = {
        (row["setting"], row["term"]): row["y1"] - row["start_y1"] for row in preference_term.run(0, tmp_path, alone)
    }
    assert len(gains) == 2 * len(alone) == 6
    assert all(gain >= 0.04 if term == "on" else gain <= -0.20 for (_, term), gain in gains.items()), gains
