"""
Train Sr-DPO and DPO on the same pairs and draw their marginals: what λ does, on a task whose quality gaps are known.

    python docs/figures/self_refine_dpo.py

The task is sorting eight digits, with answers of five qualities: 5 is right, each point less has one digit wrong. A Llama of 0.1M
parameters learns to answer "Sort : ..." with any quality and "Quality q : Sort : ..." with quality q, so that "Quality 5 :"
asks for the best answer, as the paper's prompt p does. Pairs are answers of two qualities to new problems. Out:
`self_refine_dpo.json`, the numbers, and `self_refine_dpo.svg`, both beside this script; `--draw` draws the numbers anew.
About four minutes on one core.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import matplotlib


matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl-ext", "font.size": 11})

from matplotlib import pyplot as plt  # noqa: E402


GRAY = "#7a7f87"  # 4:1 on white and on GitHub's dark background
COLORS = ("#7a7f87", "#2a9d6f", "#2f7fd8", "#9a63d8", "#d1642a")
WEIGHTS, SEEDS = (0.0, 0.1, 0.3, 0.5, 1.0), (0, 1, 2)  # λ, of which 0 is DPO
DIGITS, BEST = 8, 5
SFT_ROWS, PAIRS, EVALUATION_PAIRS = 24000, 1600, 256


def build_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", *"0123456789", "Sort", ":", "Quality", "="]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64
    )


def problem(rng: random.Random) -> tuple[str, list[int]]:
    digits = [rng.randrange(10) for _ in range(DIGITS)]
    return f"Sort : {' '.join(map(str, digits))} =", sorted(digits)


def answer(rng: random.Random, solution: list[int], quality: int) -> str:
    """The solution with `BEST − quality` digits replaced by others."""
    digits = list(solution)
    for i in rng.sample(range(DIGITS), BEST - quality):
        digits[i] = rng.choice([d for d in range(10) if d != solution[i]])
    return " " + " ".join(map(str, digits))


def sft_rows(rng: random.Random) -> list[dict]:
    rows = []
    for _ in range(SFT_ROWS):
        question, solution = problem(rng)
        quality = rng.randint(1, BEST)
        asked = f"Quality {quality} : {question}" if rng.random() < 0.7 else question
        rows.append({"prompt": asked, "completion": answer(rng, solution, quality)})
    return rows


def pair_rows(rng: random.Random, count: int) -> list[dict]:
    rows = []
    for _ in range(count):
        question, solution = problem(rng)
        rejected, chosen = sorted(rng.sample(range(1, BEST + 1), 2))
        rows.append(
            {
                "prompt": question,
                "chosen": answer(rng, solution, chosen),
                "rejected": answer(rng, solution, rejected),
                "gap": chosen - rejected,
            }
        )
    return rows


def common_arguments(output: str, seed: int) -> dict:
    return {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "cosine",
        "seed": seed,
        "max_length": 64,
    }


def warm_start(directory: str, seed: int) -> str:
    """SFT of a random model on answers of all qualities; returns where it is saved."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    args = SFTConfig(
        **common_arguments(directory, seed),
        per_device_train_batch_size=64,
        num_train_epochs=1,
        learning_rate=3e-3,
        logging_steps=50,
    )
    rows = Dataset.from_list(sft_rows(random.Random(seed)))
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{directory}/sft")
    return f"{directory}/sft"


def spearman(x: list[float], y: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        # Ties share the mean of their ranks
        places: dict[float, list[int]] = {}
        for place, value in enumerate(order):
            places.setdefault(value, []).append(place)
        return [statistics.fmean(places[value]) for value in values]

    return statistics.correlation(ranks(x), ranks(y))


def train(model: str, weight: float, seed: int, directory: str) -> dict:
    """One run: the marginal and the accuracies on held-out pairs during training, and at its end the marginals' correlation."""
    from datasets import Dataset

    from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer

    class Trainer(SelfRefineDPOTrainer):
        """Keeps the marginal of each pair of the last evaluation."""

        def _record_metrics(self, batch, policy, logps):
            super()._record_metrics(batch, policy, logps)
            if not self.model.training:
                self.marginals += (logps.chosen_logratios - logps.rejected_logratios).tolist()

        def evaluate(self, *args, **kwargs):
            self.marginals = []
            return super().evaluate(*args, **kwargs)

    rng = random.Random(1000 + seed)
    pairs, held_out = pair_rows(rng, PAIRS), pair_rows(rng, EVALUATION_PAIRS)
    args = SelfRefineDPOConfig(
        **common_arguments(directory, seed),
        refinement_weight=weight,
        refinement_prompt=f"Quality {BEST} :",
        beta=0.1,
        learning_rate=2e-4,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=10,
    )
    trainer = Trainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=build_tokenizer(),
    )
    trainer.evaluate()
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_refinement/marginal" in log]
    return {
        "refinement_weight": weight,
        "seed": seed,
        "steps": [log.get("step", 0) for log in evaluations],
        "marginal": [log["eval_refinement/marginal"] for log in evaluations],
        "accuracy": [log["eval_rewards/accuracies"] for log in evaluations],
        "augmented_accuracy": [log["eval_refinement/accuracies"] for log in evaluations],
        "share": [log["eval_refinement/share"] for log in evaluations],
        "gap_correlation": spearman(trainer.marginals, [row["gap"] for row in held_out]),
    }


def draw(runs: list[dict], output: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for weight, color in zip(WEIGHTS, COLORS, strict=True):
        of_weight = [run for run in runs if run["refinement_weight"] == weight]
        steps = of_weight[0]["steps"]
        values = list(zip(*(run["marginal"] for run in of_weight), strict=True))
        accuracy = statistics.fmean(run["accuracy"][-1] for run in of_weight)
        label = ("DPO" if weight == 0 else f"λ = {weight}") + f", {100 * accuracy:.0f} %"
        axes.plot(steps, [statistics.fmean(v) for v in values], label=label, color=color, linewidth=1.8)
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, linewidth=0
        )
    axes.set_xlabel("training step", color=GRAY)
    axes.set_ylabel("marginal on held-out pairs, nats", color=GRAY)
    axes.tick_params(colors=GRAY, length=0)
    axes.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.8)
    axes.spines[:].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(WEIGHTS), frameon=False, labelcolor=GRAY, fontsize=9
    )
    figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def table(runs: list[dict]) -> str:
    """Means over the seeds at the end of training, as a Markdown table."""
    lines = [
        "| λ | marginal, nats | accuracy | accuracy under p | share of the margin | correlation with the gap |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for weight in WEIGHTS:
        of_weight = [run for run in runs if run["refinement_weight"] == weight]

        def mean(key: str, of_weight: list[dict] = of_weight) -> float:
            return statistics.fmean(run[key][-1] if isinstance(run[key], list) else run[key] for run in of_weight)

        spread = statistics.stdev(run["marginal"][-1] for run in of_weight) if len(of_weight) > 1 else 0.0
        lines.append(
            f"| {weight:g}{' (DPO)' if weight == 0 else ''} | {mean('marginal'):.2f} ± {spread:.2f} | {100 * mean('accuracy'):.1f} % | "
            f"{100 * mean('augmented_accuracy'):.1f} % | {mean('share'):.2f} | {mean('gap_correlation'):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Sr-DPO and DPO on the same pairs and draw their marginals.")
    parser.add_argument("--draw", action="store_true", help="draw the numbers that are there, without training")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    numbers = args.output / "self_refine_dpo.json"
    if not args.draw:
        import torch

        torch.set_num_threads(1)  # matrices this small are slower on several
        runs = []
        for seed in SEEDS[: args.seeds]:
            with tempfile.TemporaryDirectory() as directory:
                model = warm_start(directory, seed)
                runs += [train(model, weight, seed, directory) for weight in WEIGHTS]
        numbers.write_text(json.dumps(runs, indent=1) + "\n")
    runs = json.loads(numbers.read_text())
    draw(runs, args.output / "self_refine_dpo.svg")
    print(table(runs))


if __name__ == "__main__":
    main()
