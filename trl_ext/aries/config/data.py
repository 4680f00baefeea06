"""
The data of a run: the prompts to learn from, and those of the evaluation.
"""

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ...recipe_checks import Section, Texts, section
from .scores import ScoresConfig


@section
class DatasetConfig(Section):
    """One dataset of a mixture, with the keys of TRL's `DatasetConfig`."""

    path: str
    """A `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a directory of them, or a dataset id on the Hub."""
    name: str | None = None
    """Passed to `datasets.load_dataset`."""
    data_dir: str | None = None
    """Passed to `datasets.load_dataset`."""
    data_files: str | list[str] | dict[str, str] | None = None
    """Passed to `datasets.load_dataset`."""
    split: str = "train"
    """Split of a directory or a Hub dataset."""
    columns: Texts | None = None
    """The columns to keep. Default: all."""
    fraction: PositiveFloat | None = None
    """Share of the mixture. The first rows of each dataset are taken, in these proportions, as many as possible. Give it
    to all datasets or to none. Default: all rows."""


@section
class Source(Section):
    """The keys that `prompts` and `evaluation` share: one dataset, or a mixture."""

    dataset: str | None = None
    """A `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a directory of them, or a dataset id on the Hub."""
    datasets: list[DatasetConfig] | None = None
    """Instead of `dataset`, a mixture of several, as in TRL's `DatasetMixtureConfig`."""
    split: str | None = None
    """Split of a directory or a Hub dataset; a file has one."""

    def entries(self) -> list[DatasetConfig]:
        """The datasets, one or several."""
        return self.datasets or [DatasetConfig(self.dataset, split=self.split)]

    @model_validator(mode="after")
    def check_source(self):
        if self.dataset is None and not self.datasets:
            raise ValueError(
                "`dataset` is missing: a file, or a dataset id on the Hub. Or list several as `datasets`."
            )
        if self.dataset is not None and self.datasets:
            raise ValueError("`dataset` and `datasets` are both given. Remove one.")
        if len({entry.fraction is None for entry in self.datasets or []}) > 1:
            raise ValueError("give a `fraction` to every dataset of `datasets`, or to none.")
        return self


@section
class PromptsConfig(Source):
    """
    Prompts to learn from. A row has `prompt` (text, or messages that end with the user's) and any columns that the scorer
    asks for.
    """

    split: str = "train"
    """Split of a directory or a Hub dataset; a file has one."""
    per_round: PositiveInt | None = None
    """Prompts of a round; no row is used in two rounds. The paper uses 5,000 to 10,000. Default: the dataset divided by the rounds."""


@section
class EvaluationConfig(Source):
    """
    Prompts that nothing is learned from. Every round's policy answers them, greedily, with the same chain of refinements.
    """

    split: str = "test"
    """Split of a directory or a Hub dataset; a file has one."""
    samples: PositiveInt | None = None
    """Use only the first ones."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; `0` is greedy."""
    scores: ScoresConfig | None = None
    """Scorers that judge and do not select, with the keys of [`scores`](#scores). The metrics, the comparisons of rounds and
    the guard then go by them, and the scores of `scores` are kept beside theirs. Default: what selects also judges."""
    correct_score: float | None = None
    """Score from which an answer counts as right, for the flips between turns. Default: 1 if all scores are 0 or 1,
    otherwise no answer is right or wrong."""
    best_turn: PositiveInt = 1
    """Turn by whose mean score the best round is chosen: 1 is the direct answer (our choice)."""
    bootstrap_samples: PositiveInt = 10_000
    """Resamples of the 95 % bootstrap intervals over prompts. Mean scores have such intervals; shares need none."""
