"""
Draw what the tokens of a pair see: in two sequences, and in the one of `share_prompt=True`.

    python docs/figures/shared_prompt.py

The mask and the positions are those that `trl_ext.trainers.packed_pairs` makes of a prompt of five tokens and answers of four and three.
Out: `shared_prompt.svg`, beside this script.
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl-ext", "font.size": 10})

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from transformers import LlamaConfig, LlamaModel  # noqa: E402

from trl_ext.trainers.packed_pairs import PackedPairs  # noqa: E402


GRAY = "#7a7f87"  # 4:1 on white and on GitHub's dark background
COLORS = ("#2a9d6f", "#2f7fd8", "#d1642a")  # what is shared, chosen, rejected
NAMES = ("prompt", "chosen", "rejected")
PROMPT, CHOSEN, REJECTED = 5, 4, 3


def packed_pair() -> tuple[torch.Tensor, PackedPairs]:
    """Who sees whom, `(S, S)`, and the sequence."""
    length = PROMPT + max(CHOSEN, REJECTED)
    ids = torch.arange(2 * length).view(2, length)
    ids[1, :PROMPT] = ids[0, :PROMPT]
    mask = (torch.arange(length) < torch.tensor([[PROMPT + CHOSEN], [PROMPT + REJECTED]])).long()
    packed = PackedPairs.from_batch(ids, mask)
    sizes = {"vocab_size": 2 * length, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaModel(LlamaConfig(**sizes, attn_implementation="sdpa"))
    return packed.model_inputs(model)["attention_mask"][0, 0], packed


def draw_mask(axes, visible: torch.Tensor, parts: list[int], positions: list[int], left: int, top: int) -> None:
    """Rows look at columns, whose part is their colour; a row's position in its sequence stands beside it."""
    for row, seen in enumerate(visible.tolist()):
        for column, sees in enumerate(seen):
            style = {"facecolor": COLORS[parts[column]]} if sees else {"facecolor": "none", "edgecolor": GRAY}
            style |= {"linewidth": 0 if sees else 0.4, "alpha": 1 if sees else 0.5}
            axes.add_patch(Rectangle((left + column + 0.06, top + row + 0.06), 0.88, 0.88, **style))
        axes.text(left - 0.3, top + row + 0.55, str(positions[row]), color=GRAY, ha="right", va="center", fontsize=8)
    for part, name in enumerate(NAMES):
        columns = [column for column, of in enumerate(parts) if of == part]
        if columns:
            x = left + (columns[0] + columns[-1] + 1) / 2
            axes.text(x, top - 0.35, name, color=COLORS[part], ha="center", va="bottom", fontsize=9)


def draw(output: Path) -> None:
    visible, packed = packed_pair()
    parts, positions = packed.parts[0].tolist(), packed.position_ids[0].tolist()
    figure, axes = plt.subplots(figsize=(7.6, 3.5), layout="constrained")
    left = 0
    for part, length in ((1, PROMPT + CHOSEN), (2, PROMPT + REJECTED)):
        causal = torch.ones(length, length).tril().bool()
        draw_mask(axes, causal, [0] * PROMPT + [part] * (length - PROMPT), list(range(length)), left, 0)
        left += length + 2
    left += 1
    draw_mask(axes, visible, parts, positions, left, 0)
    tokens = 2 * PROMPT + CHOSEN + REJECTED
    for x, text in (
        ((PROMPT + CHOSEN) + 1, f"two sequences: {tokens} tokens"),
        (left + len(parts) / 2, f"share_prompt: {len(parts)} tokens"),
    ):
        axes.text(x, len(parts) + 0.9, text, color=GRAY, ha="center", va="center")
    axes.set_xlim(-1.2, left + len(parts) + 0.2)
    axes.set_ylim(len(parts) + 1.5, -1.5)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(
        output, transparent=True, metadata={"Date": None, "Creator": None} if output.suffix == ".svg" else {}
    )
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what the tokens of a pair see.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".svg"))
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
