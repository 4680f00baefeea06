"""Computes what servers must agree with before they are used."""

from ..checks.probe import write_probe
from ..children import Reporter, child_main
from ..policies import comparison
from ..run_dir import RunDir
from .messages import AnsweringMessage


def main(message: AnsweringMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    config, output = run.read_config(), run.round(message.answering).probe
    generation = config.generation
    policies = comparison(run, config, message.answering)
    write_probe(policies, run.evaluation_prompts, output, generation.dtype, generation.max_model_len)


if __name__ == "__main__":
    child_main(main, AnsweringMessage)
