"""
The pairs of a run as a dataset for `datasets.load_dataset`, another trainer, or the Hub.
"""

from pathlib import Path

from ...outputs import check_new, new_directory
from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.disk import writing
from ..data.records import read_jsonl, write_jsonl
from ..policies import product
from ..provenance import check_file
from ..run_dir import RunDir
from .hub import make_repo, upload
from .progress import RunProgress


def export_pairs(config: AriesConfig, output: Path, repo: str | None = None, private: bool = False) -> int:
    """
    Write the pairs of the trained rounds into a new directory, one file each, with a card; optionally upload them. Returns the exit code, 0.

    Raises:
        [`RecipeError`]: there are no pairs, they are not what the run made, `output` is not empty, or the repository cannot be made.
        [`~aries.children.ChildError`]: the upload failed; `output` stays.
    """
    run, say = RunDir(Path(config.output_dir)), RunProgress(config.rounds).say
    rounds = [n for n in range(1, config.rounds + 1) if run.round(n).pairs.exists()]
    rounds = [n for n in rounds if product(run.round(n), config).exists()]
    if not rounds:
        raise RecipeError(f"{run.path} has no trained round, and so no pairs.")
    check_new(output)
    for number in rounds:
        check_file(run, number, run.round(number).pairs)

    from .cards import pairs_card  # imports torch and transformers, which takes seconds

    if repo is not None:
        make_repo(repo, "dataset", private)
    with writing(output), new_directory(output) as directory:
        rows = 0
        for number in rounds:
            pairs = [{**row, "round": number} for row in read_jsonl(run.round(number).pairs)]
            write_jsonl(directory / f"round_{number:02d}.jsonl", pairs)
            rows += len(pairs)
        card = pairs_card(run, config, output.name, repo or str(output), rounds, rows)
        (directory / "README.md").write_text(card, encoding="utf-8")
    say(f"{output}: {rows:,} rows of {len(rounds)} rounds.")
    if repo is not None:
        say(upload(output, repo, "dataset"))
    return 0
