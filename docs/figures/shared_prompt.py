"""
Draw what is computed of a batch of two pairs: padded, with `padding_free=True`, and with `share_prompt=True` too.

    python docs/figures/shared_prompt.py

The masks and the positions are those that `trl_ext.trainers.packed_pairs` makes of prompts of three and two tokens and answers of two and
four, three and one. Out: `shared_prompt.svg`, beside this script.
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
COLORS = ("#2a9d6f", "#2f7fd8", "#d1642a")  # prompts, chosen, rejected
NAMES = ("prompt", "chosen", "rejected")
PROMPTS, CHOSEN, REJECTED = (3, 2), (2, 3), (4, 1)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ids, the attention mask and each token's part, `(4, W)`."""
    lengths = [p + a for answers in (CHOSEN, REJECTED) for p, a in zip(PROMPTS, answers, strict=True)]
    width = max(lengths)
    prompts = torch.tensor(PROMPTS * 2).unsqueeze(1)
    columns = torch.arange(width).expand(4, width)
    ids = torch.where(
        columns < prompts,
        torch.tensor([0, 100] * 2).unsqueeze(1) + columns,
        torch.arange(4 * width).view(4, width) + 200,
    )
    parts = torch.where(columns < prompts, 0, torch.tensor([1, 1, 2, 2]).unsqueeze(1))
    return ids, (columns < torch.tensor(lengths).unsqueeze(1)).long(), parts


def packed_batch(share_prompt: bool) -> tuple[torch.Tensor, list[int], list[int]]:
    """Who sees whom, `(S, S)`, and the part and the position of each token."""
    ids, mask, parts = batch()
    packed = PackedPairs.from_batch(ids, mask, share_prompt=share_prompt)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaModel(LlamaConfig(**sizes, attn_implementation="eager"))
    of_tokens = torch.empty(packed.input_ids.size(1), dtype=torch.long)
    of_tokens[packed.places[mask.bool()]] = parts[mask.bool()]
    visible = packed.model_inputs(model)["attention_mask"][0, 0] == 0
    return visible, of_tokens.tolist(), packed.position_ids[0].tolist()


def draw_cell(axes, x: float, y: float, color: str | None) -> None:
    style = (
        {"facecolor": color, "linewidth": 0}
        if color
        else {"facecolor": "none", "edgecolor": GRAY, "linewidth": 0.4, "alpha": 0.5}
    )
    axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, **style))


def draw_mask(axes, visible: torch.Tensor, parts: list[int], positions: list[int], left: float) -> None:
    """Rows look at columns, whose part is their colour; a row's position in its sequence stands beside it."""
    for row, seen in enumerate(visible.tolist()):
        for column, sees in enumerate(seen):
            draw_cell(axes, left + column, row, COLORS[parts[column]] if sees else None)
        axes.text(left - 0.3, row + 0.55, str(positions[row]), color=GRAY, ha="right", va="center", fontsize=7)


def draw(output: Path) -> None:
    ids, mask, parts = batch()
    figure, axes = plt.subplots(figsize=(9.6, 4.6), layout="constrained")
    height, width = int(mask.sum()), ids.size(1)
    for row, (exists, of) in enumerate(zip(mask.tolist(), parts.tolist(), strict=True)):
        for column in range(width):
            draw_cell(axes, column, 1.3 * row, COLORS[of[column]] if exists[column] else None)
    for part, name in enumerate(NAMES):
        draw_cell(axes, 0, 8 + 1.3 * part, COLORS[part])
        axes.text(1.4, 8.5 + 1.3 * part, name, color=COLORS[part], va="center")
    draw_cell(axes, 0, 8 + 1.3 * 3, None)
    axes.text(1.4, 8.5 + 1.3 * 3, "padding; not seen", color=GRAY, va="center")
    captions, left = [(width / 2, 4 * 1.3 + 0.7, f"padded: {ids.numel()} tokens")], width + 3
    for name, share_prompt in (("padding_free", False), ("padding_free and share_prompt", True)):
        visible, of, positions = packed_batch(share_prompt)
        draw_mask(axes, visible, of, positions, left)
        captions.append((left + len(of) / 2, len(of) + 1, f"{name}: {len(of)} tokens"))
        left += len(of) + 3
    for x, y, text in captions:
        axes.text(x, y, text, color=GRAY, ha="center", va="center")
    axes.set_xlim(-0.5, left - 2)
    axes.set_ylim(height + 1.7, -0.5)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(
        output, transparent=True, metadata={"Date": None, "Creator": None} if output.suffix == ".svg" else {}
    )
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what is computed of a batch of two pairs.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".svg"))
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
