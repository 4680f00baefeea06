"""Scores a policy's answers with a reward model, in a process that gives its memory back."""

from ..children import Reporter, child_main
from ..policies import unscored
from ..run_dir import RunDir
from ..scoring.reward_model import RewardModel
from ..scoring.scores import ScoreCache
from ..scoring.scoring import score_task, with_absolute_paths
from .messages import RewardModelMessage


def main(message: RewardModelMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    config = run.read_config()
    [scorer] = [scorer for scorer in config.scorers[message.section] if scorer.name == message.name]
    model = RewardModel(with_absolute_paths(scorer), config.generation)
    tasks = [score_task(file) for file in unscored(run, config, message.answering) if file.by == message.section]
    for note in model.score(tasks, ScoreCache(run.score_cache), report):
        report.note(note)


if __name__ == "__main__":
    child_main(main, RewardModelMessage)
