"""
The loop: prompts -> drafts -> refinements -> scores -> pairs -> training -> next round.

Each stage writes one file of the round's directory and is skipped if that file exists, so a run that was killed continues with the
first missing file. In one start of the engine a round's policy answers the evaluation prompts and the prompts of the next round. So
there are two numbers: `answering` is the round whose policy answers and is evaluated, `number` a round that is made or closed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import yaml

from ..launch import Launch, recipe_launch
from ..recipe import COMMAND_LINE, Recipe, RecipeError
from .checks.gates import decide, measure_policy, pair_lines, pairs_stop_message, policy_findings
from .checks.overlap import count_overlap, overlap_lines
from .checks.set_aside import degenerate, set_aside, take_back
from .checks.setback import decide_setback, discard_answers, discarded_tokens, rolled_back, stopped
from .checks.training_rows import write_pairs
from .children import one_gpu, warm_up
from .config import AriesConfig
from .data.prompts import select_prompts
from .data.records import read_json, read_jsonl, write_json, write_jsonl
from .data.sft import sft_row
from .generation.refinements import Strategy
from .inputs import Inputs, input_hashes, local_inputs, read_inputs
from .manifest import write_manifest
from .policies import answers_of, is_decided, is_skipped, needs_samples, product, unscored
from .provenance import check_made, note_made
from .results.cost import round_cost
from .results.progress import WARNING, JsonProgress, RunProgress, duration
from .results.status import print_next, print_results
from .results.tracking import training_environment
from .run_dir import ChangedSettings, RoundDir, RunDir
from .scoring.round_metrics import round_metrics, round_setbacks, round_warnings
from .scoring.scores import each_form, load_chains, read_chains
from .scoring.watch import ends_explained
from .stages.messages import (
    AnsweringMessage,
    CheckScorersMessage,
    PreflightMessage,
    RewardModelMessage,
    RoundMessage,
)
from .stages.running import Stages, Update
from .training.settings import trainer_settings


def run(config: AriesConfig, recipe: Recipe, log_format: str = "text", quiet: bool = False) -> int:
    """
    Run a recipe, or continue it.

    Args:
        config ([`AriesConfig`]):
            What the recipe says.
        recipe ([`~recipe.Recipe`]):
            The recipe itself: its file is copied into the run directory, and errors name its lines.
        log_format (`str`, *optional*, defaults to `"text"`), quiet (`bool`, *optional*, defaults to `False`):
            What is printed: text or JSON lines (`"json"`); warnings only.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`RecipeError`]: bad input, before any model is loaded.
        [`~aries.children.ChildError`]: a stage failed; running again continues from it.
    """
    start = time.monotonic()
    warm_up("trl")
    progress = {"text": RunProgress, "json": JsonProgress}[log_format](config.rounds, quiet=quiet)
    launch = recipe_launch(recipe)
    files = local_inputs(config, launch)
    RunDir(Path(config.output_dir)).check_free(files)
    loop = Rounds(config, read_inputs(config), progress, launch)
    with (
        unknown_keys_first(config, recipe),
        loop.dir.opened(config, recipe_text(recipe), input_hashes(files)),
        loop.stops_reported(),
    ):
        if not loop.dir.round(config.rounds).manifest.exists():
            check_made(loop.dir, config)
            note_made(loop.dir, config.rounds)  # a file that is gone is made again, and may differ
            loop.check(recipe)
            if config.generation.base_urls is None and config.generation.engine != "ray":
                warm_up("vllm")
            loop.look_for_overlap()
            if loop.dir.report.exists():  # it says that the run has stopped
                loop.write_report(running=True)
        loop.sft()
        for number in range(1, config.rounds + 1):
            loop.round(number)
        loop.evaluate_last()
    print_results(loop.dir, config, progress)
    print_next(loop.dir, config, progress, duration(time.monotonic() - start))
    return 0


@contextmanager
def unknown_keys_first(config: AriesConfig, recipe: Recipe) -> Iterator[None]:
    """Have a misspelt key of one of TRL's sections be an unknown key, as in a new run, and not a changed setting."""
    try:
        yield
    except ChangedSettings:
        from .checks.preflight import check_trl_keys  # imports TRL, which takes seconds

        check_trl_keys(config, recipe)
        raise


def recipe_text(recipe: Recipe) -> str:
    """The text of the recipe file or, with overrides from the command line, of the merged recipe."""
    if COMMAND_LINE in recipe.locations.values():
        mapping = {"env": recipe.env, **recipe.mapping} if recipe.env else recipe.mapping
        return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    return recipe.path.read_text(encoding="utf-8")


class Rounds(Stages):
    """The stages of a run, in the order of the data."""

    def __init__(
        self, config: AriesConfig, inputs: Inputs, progress: RunProgress | None = None, launch: Launch | None = None
    ):
        super().__init__(config, progress or RunProgress(config.rounds))
        self.inputs = inputs
        self.launch = launch  # of trainings; `None` for one process
        self.template = Strategy(config.refinements).templates[0]  # of training rows

    def check(self, recipe: Recipe) -> None:
        """Construct every setting in a child process, so that a wrong one shows before any work is done."""
        if self.config.generation.base_urls is not None:
            self.check_servers()
        if self.config.generation.engine == "ray" and find_spec("ray") is None:
            where = recipe.where("generation", "engine")
            raise RecipeError(f"{where}: `generation.engine: ray` needs the extra `ray`: `pip install 'ray>=2.40'`.")
        with self.stage(0, "check") as update:
            if self.config.all_scorers:
                files = [each_form(rows.placed()) for rows in (self.inputs.prompts, self.inputs.evaluation_prompts)]
                log = self.dir.logs / "check_scores.log"
                with ends_explained(self.dir, log, made=[]):
                    self.start("check_scorers", CheckScorersMessage(self.dir.path, files), log, update)
            preflight = PreflightMessage.of(self.dir.path, recipe, self.inputs.conversational)
            self.start("preflight", preflight, self.dir.logs / "check.log", update)

    def check_servers(self) -> None:
        from .generation.servers import Wanted, check_servers  # needs the package `openai`

        wanted = Wanted(self.config.model["model_name_or_path"], self.config.generation.max_model_len)
        for note in check_servers(self.config.generation, wanted):
            self.note(note, WARNING)

    def look_for_overlap(self) -> None:
        """Count evaluation prompts that are trained on, and repeats, once a run."""
        if not self.dir.overlap.exists():
            found = count_overlap(self.inputs.prompts, self.inputs.evaluation_prompts, self.inputs.sft_rows)
            write_json(self.dir.overlap, found)
            for line in overlap_lines(found):
                self.note(f"{line}.", WARNING if "also among" in line else None)

    # The stages

    def sft(self) -> None:
        """SFT on direct and refinement targets: `−[log π(y_w|x) + log π(y_w|x, y_l, z)]` in rows."""
        round_dir = self.dir.round(0)
        round_dir.path.mkdir(exist_ok=True)
        if self.config.sft is None or product(round_dir, self.config).exists():
            return
        if not round_dir.sft.exists():
            self.write_sft_rows(round_dir)
        with self.stage(0, "sft") as update:
            self.run_training(0, round_dir.logs / "sft.log", update)

    def write_sft_rows(self, round_dir: RoundDir) -> None:
        rows = len(self.inputs.sft_rows) + sum(self.inputs.sft_dropped.values())
        write_json(round_dir.sft_drops, {"sft_rows": rows, "dropped": self.inputs.sft_dropped})
        write_jsonl(round_dir.sft, (sft_row(row, self.template) for row in self.inputs.sft_rows))

    def round(self, number: int) -> None:
        """Have the previous round's policy answer and be evaluated, and train a new one on its answers."""
        start = time.monotonic()
        round_dir = self.dir.round(number)
        decided = is_decided(round_dir, self.config) and self.dir.round(number - 1).manifest.exists()
        if decided or round_dir.manifest.exists():  # the policy of a closed round may have been deleted
            return
        round_dir.path.mkdir(exist_ok=True)
        if not round_dir.prompts.exists():
            rows = select_prompts(self.inputs.prompts, number, self.inputs.round_size, self.config.seed)
            write_jsonl(round_dir.prompts, rows)
        self.answer(number - 1)
        self.pair(number)
        self.guard(number)
        self.train(number)
        self.progress.end_round(number, time.monotonic() - start)

    def evaluate_last(self) -> None:
        """Answer the evaluation prompts with the last round's policy."""
        if not self.dir.round(self.config.rounds).manifest.exists():
            self.answer(self.config.rounds)

    def answer(self, answering: int) -> None:
        """Have a round's policy answer its prompts, evaluate it, and close its round."""
        self.generate(answering)
        self.check_parity(answering)
        self.check_health(answering)
        self.score(answering)
        self.close(answering)
        if discard_answers(self.dir, answering):  # it was rolled back: another policy goes on
            self.generate(answering)
            self.score(answering)

    def generate(self, answering: int) -> None:
        """Generate drafts and refinements for the evaluation prompts and the next round's."""
        if not self.dir.evaluation_prompts.exists():
            write_jsonl(self.dir.evaluation_prompts, self.inputs.evaluation_prompts)
        files = [answers.answers for answers in answers_of(self.dir, self.config, answering)]
        made = [file for file in files if file.exists()]
        for file in made:  # a kill between the last two moves of the engine leaves both
            file.with_name(file.name + ".part").unlink(missing_ok=True)
        if made == files and not needs_samples(self.dir, self.config, answering):
            return
        if self.config.generation.base_urls is not None:
            self.probe(answering)
        self.start_answering("generate", answering, "drafts and refinements", "engine.log")

    def probe(self, answering: int) -> None:
        """Compute what servers are compared with: the policy's log-probabilities on a few prompts, by the trainer's libraries."""
        if not self.dir.round(answering).probe.exists():
            self.start_answering("probe", answering, "probe", "probe.log", env=one_gpu())

    def check_parity(self, answering: int) -> None:
        """Check that the answers are from the policy, and estimate its KL to the initial one."""
        if self.config.parity.samples and not self.dir.round(answering).parity.exists():
            self.start_answering("parity", answering, "parity", "parity.log", env=one_gpu())

    def check_health(self, number: int) -> None:
        """
        Compare a round's policy with the one before round 1. If it has degenerated, it is set aside, and the run ends. The finding
        stands unless the recipe's bounds change.
        """
        round_dir = self.dir.round(number)
        if number == 0 or is_skipped(round_dir) or round_dir.manifest.exists():
            return
        prompts = read_jsonl(self.dir.evaluation_prompts)
        chains, initial = (load_chains(prompts, self.dir.round(n).evaluation) for n in (number, 0))
        kl_to_initial = (read_json(round_dir.parity) or {}).get("kl_to_initial") or {}
        measured = measure_policy(chains, initial, kl_to_initial.get("per_token"))
        found = policy_findings(measured, self.config.health)
        write_json(round_dir.health, {"decision": "set_aside" if found else "kept", "findings": found, **measured})
        if found:
            set_aside(round_dir, self.config)
            raise degenerate(self.dir, self.config, number, found)

    def score(self, answering: int) -> None:
        """Score the evaluation answers, and those to the next round's prompts."""
        files = unscored(self.dir, self.config, answering)
        if not files:
            return
        with self.answering_stage(answering, "scores") as (logs, update):
            for section in dict.fromkeys(file.by for file in files):
                for scorer in self.config.scorers[section]:
                    if scorer.reward_model is not None:
                        message = RewardModelMessage(self.dir.path, answering, section, scorer.name)
                        log = logs / f"{section.removesuffix('scores')}{scorer.name}.log"
                        self.start("reward_model", message, log, update)
            log = logs / "scores.log"
            with ends_explained(self.dir, log, made=[file.scores for file in files]):
                self.start("score", AnsweringMessage(self.dir.path, answering), log, update)

    def close(self, number: int) -> None:
        """Write the metrics and the manifest of a round whose policy has been evaluated."""
        round_dir = self.dir.round(number)
        if round_dir.manifest.exists():
            return
        metrics = round_metrics(self.dir, self.config, number)
        write_json(round_dir.metrics, metrics)
        for line in round_warnings(self.dir, self.config, number, metrics):
            self.note(f"round {number}: {line}.", WARNING)
        lost = round_setbacks(self.config, metrics)
        decision = decide_setback(self.dir, self.config, number, lost)
        if decision == "stopped":
            self.at = (number, "setback")
            raise stopped(self.dir, self.config, number, lost)
        if decision == "rolled_back":
            lost = [*lost, rolled_back(self.dir, self.config, number)]
        for line in lost:
            self.note(f"round {number}: {line}.", WARNING)
        chains = load_chains(read_jsonl(self.dir.evaluation_prompts), round_dir.evaluation)
        answers = read_chains(round_dir.prompts, round_dir.answers) if number > 0 else []
        of_round, discarded = (chain for _, chain in answers), discarded_tokens(self.dir, number)
        cost = round_cost(self.dir.read_events(), number, of_round, evaluation=chains, discarded=discarded)
        write_json(round_dir.cost, cost)
        self.track(number)
        write_manifest(self.dir, self.config, number)
        self.write_report(running=number < self.config.rounds)

    def pair(self, number: int) -> None:
        """Write the round's preference dataset: direct and refinement rows."""
        round_dir = self.dir.round(number)
        self.at = (number, "pairs")
        if round_dir.pairs.exists():
            return
        rows, selection = write_pairs(round_dir, self.config, number, self.template)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in selection.dropped.items())
        self.progress.say(
            f"round {number}/{self.config.rounds}  {selection.pairs:,} pairs ({rows:,} rows) from {selection.chains:,} chains; "
            + (f"dropped: {dropped}" if dropped else "none dropped")
        )

    def guard(self, number: int) -> None:
        """
        Act on what the guard found in the round's pairs. The decision stands, except that a stopped run may go on with
        another `pairs.guard`.
        """
        round_dir = self.dir.round(number)
        self.at = (number, "guard")
        found = read_json(round_dir.guard)
        if found["decision"] == "stopped" and self.config.pairs.guard != "stop":
            found["decision"] = decide(found, self.config.pairs.guard)
            write_json(round_dir.guard, found)
        for line in pair_lines(found, found["decision"]):
            self.progress.say(f"round {number}/{self.config.rounds}  {line}", style=WARNING)
        if found["decision"] == "stopped":
            raise RecipeError(pairs_stop_message(number, found, self.config.pairs.selection))

    def train(self, number: int) -> None:
        """Train the round's policy, unless the guard skipped the round."""
        round_dir = self.dir.round(number)
        if is_decided(round_dir, self.config) or take_back(self.dir, self.config, number):
            return
        trainer = trainer_settings(self.config, number, "").trainer
        with self.stage(number, f"training ({trainer})") as update:
            self.run_training(number, round_dir.logs / "training.log", update)

    def run_training(self, number: int, log: Path, update: Update) -> None:
        """Run the SFT (number 0) or a round's training, in one process or as the recipe launches it."""
        env = {} if self.launch else one_gpu()
        env |= training_environment(self.dir, self.config, number)
        self.start("train", RoundMessage(self.dir.path, number), log, update, env=env, launch=self.launch)
