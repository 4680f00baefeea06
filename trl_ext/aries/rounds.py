"""
The loop: prompts -> drafts -> refinements -> scores -> pairs -> training -> next round.

Each stage writes one file of the round's directory and is skipped where that file exists, so a run that was killed
continues with the first missing file. One engine start per round answers the evaluation prompts, with the policy that
the previous round made, and the round's own prompts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..launch import Launch, recipe_launch
from ..recipe import COMMAND_LINE, Recipe, RecipeError, load_yaml
from .checks.gates import PairsMeasure, decide, measure_policy, pair_lines, pairs_stop_message, policy_findings
from .checks.overlap import count_overlap, overlap_lines
from .children import ChildError, one_gpu, run_child
from .config import AriesConfig
from .data.faults import FAULTS, share_finding
from .data.pairs import Selection, preference_rows
from .data.prompts import select_prompts
from .data.records import read_json, read_jsonl, read_rows, write_json, write_jsonl
from .data.sft import sft_row
from .generation.refinements import Strategy
from .inputs import Inputs, input_hashes, local_inputs, read_inputs
from .jobs import first_row, generation_job, parity_job, preflight_job, probe_job, scoring_job, training_job
from .manifest import write_manifest
from .policies import degenerate, is_decided, is_skipped, product, set_aside, take_back
from .provenance import check_made, note_made
from .results.cost import round_cost
from .results.progress import WARNING, JsonProgress, RunProgress, duration
from .results.report import NEEDS_MATPLOTLIB
from .results.state import recorded
from .results.status import print_next, print_results
from .results.tracking import track, tracked_training
from .run_dir import RoundDir, RunDir
from .scoring.evaluation import evaluation_metrics, setbacks
from .scoring.scores import load_chains, read_chains
from .scoring.scoring import run_scoring


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
    progress = {"text": RunProgress, "json": JsonProgress}[log_format](config.rounds, quiet=quiet)
    launch = recipe_launch(recipe)
    files = local_inputs(config, launch)
    RunDir(Path(config.output_dir)).check_free(files)
    loop = Rounds(config, read_inputs(config), progress, launch)
    with loop.dir.opened(config, recipe_text(recipe), input_hashes(files)), loop.stops_reported():
        if not loop.dir.round(config.rounds).manifest.exists():
            check_made(loop.dir, config)
            note_made(loop.dir, config.rounds)  # what is gone, and will be made again, will be another
            loop.check(recipe)
            loop.look_for_overlap()
        loop.sft()
        for number in range(1, config.rounds + 1):
            loop.round(number)
        loop.evaluate_last()
    print_results(loop.dir, config, progress)
    print_next(loop.dir, config, progress, duration(time.monotonic() - start))
    return 0


def recipe_text(recipe: Recipe) -> str:
    """The recipe as it was written, or, with overrides from the command line, as it was meant."""
    if COMMAND_LINE in recipe.locations.values():
        env = load_yaml(recipe.path).at("env")  # taken out of the mapping when it was exported
        mapping = recipe.mapping if env is None else {"env": env, **recipe.mapping}
        return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    return recipe.path.read_text(encoding="utf-8")


class Rounds:
    """The stages of a run, in the order of the data."""

    def __init__(
        self, config: AriesConfig, inputs: Inputs, progress: RunProgress | None = None, launch: Launch | None = None
    ):
        self.config = config
        self.inputs = inputs
        self.launch = launch  # of the training, `None` for one process
        self.dir = RunDir(Path(config.output_dir))
        self.progress = progress or RunProgress(config.rounds)
        self.at = (0, "check")  # round and stage, for the error that stops the run
        self.told = False  # that reports need matplotlib
        self.template = Strategy(config.refinements).templates[0]  # of training rows

    def check(self, recipe: Recipe) -> None:
        """Construct every setting in a child process, so that a wrong one shows before any work is done."""
        if self.config.generation.base_urls is not None:
            self.check_servers()
        if self.config.generation.engine == "ray" and find_spec("ray") is None:
            where = recipe.where("generation", "engine")
            raise RecipeError(f"{where}: `generation.engine: ray` needs the extra `ray`: `pip install 'ray>=2.40'`.")
        job = preflight_job(self.dir, self.config, recipe, self.launch, self.inputs.conversational)
        with self.stage(0, "check") as update:
            logs = self.dir.path / "logs"
            if self.config.scores.each():
                rows = [first_row(self.inputs.prompts), first_row(self.inputs.evaluation_prompts)]
                scoring = scoring_job(self.dir, self.config) | {"check": rows}
                run_scoring(scoring, logs / "check_scores.log", update, self.note)
            run_child("trl_ext.aries.checks.preflight", job, logs / "check.log", update, on_note=self.note)

    def check_servers(self) -> None:
        from .generation.servers import Wanted, check_servers  # an HTTP client, which other runs do not need

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
        job = training_job(self.dir, self.config, 0)
        with self.stage(0, "sft") as update:
            self.run_training(0, job, round_dir.logs / "sft.log", update)

    def write_sft_rows(self, round_dir: RoundDir) -> None:
        rows = len(self.inputs.sft_rows) + sum(self.inputs.sft_dropped.values())
        write_json(round_dir.sft_drops, {"sft_rows": rows, "dropped": self.inputs.sft_dropped})
        write_jsonl(round_dir.sft, (sft_row(row, self.template) for row in self.inputs.sft_rows))

    def round(self, number: int) -> None:
        """The previous round's policy answers and is evaluated, and a new one is trained on what it answered."""
        start = time.monotonic()
        round_dir = self.dir.round(number)
        decided = is_decided(round_dir, self.config) and self.dir.round(number - 1).manifest.exists()
        if decided or round_dir.manifest.exists():  # of a closed one, the policy may have been deleted
            return
        round_dir.path.mkdir(exist_ok=True)
        if not round_dir.prompts.exists():
            rows = select_prompts(self.inputs.prompts, number, self.inputs.round_size, self.config.seed)
            write_jsonl(round_dir.prompts, rows)
        self.generate(number)
        self.check_parity(number)
        self.check_health(number - 1)
        self.score(number)
        self.close(number - 1)
        self.pair(number)
        self.guard(number)
        self.train(number)
        self.progress.end_round(number, time.monotonic() - start)

    def generate(self, number: int) -> None:
        """Drafts and refinements of the round's prompts, and of the evaluation prompts, by the previous round's policy."""
        if not self.dir.evaluation_prompts.exists():
            write_jsonl(self.dir.evaluation_prompts, self.inputs.evaluation_prompts)
        job = generation_job(self.dir, self.config, number)
        made = [Path(task["answers"]) for task in job["tasks"] if Path(task["answers"]).exists()]
        for answers in made:  # a kill between the last two moves of the engine leaves both
            answers.with_name(answers.name + ".part").unlink(missing_ok=True)
        if job["parity"] is None and len(made) == len(job["tasks"]):
            return
        if self.config.generation.base_urls is not None:
            self.probe(number)
        with self.stage(self.under(number), "drafts and refinements") as update:
            log = self.dir.round(self.under(number)).logs / "engine.log"
            run_child("trl_ext.aries.generation.embedded_engine", job, log, update, on_note=self.note)

    def probe(self, number: int) -> None:
        """What servers are compared with: the previous round's policy on a few prompts, by the trainer's libraries."""
        if self.dir.round(number - 1).probe.exists():
            return
        job = probe_job(self.dir, self.config, number)
        with self.stage(self.under(number), "probe") as update:
            log = self.dir.round(self.under(number)).logs / "probe.log"
            run_child("trl_ext.aries.checks.probe", job, log, update, env=one_gpu())

    def check_parity(self, number: int) -> None:
        """Are the answers of `generate` from the previous round's policy? With its KL to the initial one."""
        if not self.config.parity.samples or self.dir.round(number - 1).parity.exists():
            return
        job = parity_job(self.dir, self.config, number)
        with self.stage(self.under(number), "parity") as update:
            log = self.dir.round(self.under(number)).logs / "parity.log"
            run_child("trl_ext.aries.checks.parity", job, log, update, env=one_gpu())

    def check_health(self, number: int) -> None:
        """
        Has a round's policy degenerated, beside the one before round 1? Then it is set aside, and the run ends. What was found
        stays so, unless the recipe has other bounds.
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

    def score(self, number: int) -> None:
        """Scores of the round's answers and of the evaluation's."""
        job = scoring_job(self.dir, self.config, number)
        if not job["tasks"]:
            return
        with self.stage(self.under(number), "scores") as update:
            run_scoring(job, self.dir.round(self.under(number)).logs / "scores.log", update, self.note)

    def close(self, number: int) -> None:
        """Metrics and manifest of a round whose policy has been evaluated."""
        round_dir = self.dir.round(number)
        if round_dir.manifest.exists():
            return
        chains = load_chains(read_jsonl(self.dir.evaluation_prompts), round_dir.evaluation)
        earlier = [self.evaluation_scores(n) for n in range(number)]
        metrics = evaluation_metrics(
            chains,
            self.evaluation_scores(number),
            self.config.refinements.turns,
            initial=earlier[0] if earlier else None,
            previous=earlier[-1] if earlier else None,
            earlier=earlier,
            correct_score=self.config.evaluation.correct_score,
            bootstrap_samples=self.config.evaluation.bootstrap_samples,
            seed=self.config.seed,
        )
        kl_to_initial = (read_json(round_dir.parity) or {}).get("kl_to_initial")
        write_json(round_dir.metrics, metrics | {"kl_to_initial": kl_to_initial})
        judged = any(scorer.judge is not None for scorer in self.config.scores.each())
        for setback in [] if judged else setbacks(metrics):  # a judge's scores compare turns, not rounds
            self.note(f"round {number}: {setback}.", WARNING)
        answers = read_chains(round_dir.prompts, round_dir.answers) if number > 0 else []
        cost = round_cost(self.dir.read_events(), number, (chain for _, chain in answers), evaluation=chains)
        write_json(round_dir.cost, cost)
        track(self.dir, self.config, number, self.progress)
        write_manifest(self.dir, self.config, number)
        self.write_report(running=number < self.config.rounds)

    def evaluation_scores(self, number: int) -> list[list[float | None]]:
        """Scores of a round's answers to the evaluation prompts, in the order of the prompts."""
        return [row["scores"] for row in read_jsonl(self.dir.round(number).evaluation_scores)]

    def pair(self, number: int) -> None:
        """The round's preference dataset, direct and refinement rows."""
        round_dir = self.dir.round(number)
        self.at = (number, "pairs")
        if round_dir.pairs.exists():
            return
        selection = self.selection(number)
        rows = write_jsonl(round_dir.pairs, self.pair_rows(number, selection))
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in selection.dropped.items())
        self.progress.say(
            f"round {number}/{self.config.rounds}  {selection.pairs:,} pairs ({rows:,} rows) from {selection.chains:,} chains; "
            + (f"dropped: {dropped}" if dropped else "none dropped")
        )

    def selection(self, number: int) -> Selection:
        """The pairs of a round, read from its files as they are asked for."""
        round_dir = self.dir.round(number)
        chains = (chain for _, chain in read_chains(round_dir.prompts, round_dir.answers))
        scores = (row["scores"] for row in read_rows(round_dir.scores))
        return Selection(zip(chains, scores, strict=True), self.config.pairs)

    def pair_rows(self, number: int, selection: Selection) -> Iterator[dict[str, Any]]:
        """
        The rows of the round's pairs; after the last one, what was dropped and what the guard measured, and whether that will do:
        before the file gets its name.

        Raises:
            [`RecipeError`]: there are no pairs, or too many chains had faults.
        """
        round_dir, measure = self.dir.round(number), PairsMeasure()
        for pair in selection:
            measure.add(pair)
            yield from preference_rows(pair, self.template, self.config.pairs)
        chains, dropped = selection.chains, selection.dropped
        write_json(round_dir.drops, {"chains": chains, "pairs": selection.pairs, "dropped": dropped})
        faults = {reason: count for reason, count in dropped.items() if reason in FAULTS}
        possible = chains * self.config.pairs.pairs_per_prompt
        finding = share_finding("possible pairs", faults, possible, self.config.health)
        if finding:
            raise RecipeError(
                f"round {number} would train on what is left: {finding}. Look at {round_dir.answers} and {round_dir.scores}, and "
                "at the reasons in docs/aries.md. Or go on with a larger share, `--health.max_dropped 0.9`."
            )
        if not selection.pairs:
            raise RecipeError(
                f"round {number} has no pairs to train on: all {chains} chains were dropped, {dropped}. Look at "
                f"{round_dir.answers} and {round_dir.scores}; a higher temperature or a finer score gives more pairs "
                "(under another `output_dir`)."
            )
        measured = measure.measured()
        by_construction = self.config.pairs.selection == "best_over_worst"
        decision = decide(measured, self.config.pairs.guard)
        write_json(round_dir.guard, {"decision": decision, "by_construction": by_construction, **measured})

    def guard(self, number: int) -> None:
        """
        Act on what the guard found in the round's pairs. What was decided stays so, but for a run that was stopped: it may go on
        with another `pairs.guard`.
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
        """Preference training of the round's policy, unless the guard left the round out."""
        round_dir = self.dir.round(number)
        if is_decided(round_dir, self.config) or take_back(self.dir, self.config, number):
            return
        job = training_job(self.dir, self.config, number)
        with self.stage(number, f"training ({job['trainer']})") as update:
            self.run_training(number, job, round_dir.logs / "training.log", update)

    def run_training(self, number: int, job: dict[str, Any], log: Path, update: Callable[[int, int], None]) -> None:
        """The SFT, or a round's training, in one process or as the recipe launches it."""
        env = {} if self.launch else one_gpu()
        env |= tracked_training(job, self.dir, self.config, number)
        run_child("trl_ext.aries.training.train", job, log, update, env=env, launch=self.launch)

    def evaluate_last(self) -> None:
        """Answer the evaluation prompts with the last round's policy."""
        if self.dir.round(self.config.rounds).manifest.exists():
            return
        self.generate(self.config.rounds + 1)
        self.check_parity(self.config.rounds + 1)
        self.check_health(self.config.rounds)
        self.score(self.config.rounds + 1)
        self.close(self.config.rounds)

    # What the stages share

    def under(self, number: int) -> int:
        """The round whose stage it is: the evaluation of the last round's policy is the last round's."""
        return min(number, self.config.rounds)

    def note(self, note: str, style: str | None = None) -> None:
        """Say what somebody should know, and log it."""
        number, stage = self.at
        self.progress.say(f"{'':<11}{note}", style)
        self.dir.log_event(event="note", round=number, stage=stage, note=note)

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a stage while it runs, and log its start and end."""
        start = time.monotonic()
        self.at = (number, name)
        self.dir.log_event(event="start", round=number, stage=name)
        with self.progress.stage(number, name) as update:
            yield recorded(update, self.dir, number, name)
        self.dir.progress.unlink(missing_ok=True)
        note_made(self.dir, self.config.rounds)
        self.dir.log_event(event="end", round=number, stage=name, seconds=round(time.monotonic() - start, 3))

    @contextmanager
    def stops_reported(self) -> Iterator[None]:
        """Have the event log and the report say where and why a run stopped."""
        try:
            yield
        except BaseException as error:
            number, stage = self.at
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}" or type(error).__name__
            self.dir.log_event(event="stopped", round=number, stage=stage, error=text)
            self.progress.stopped(number, stage, text)
            if not isinstance(error, KeyboardInterrupt) and any(self.dir.path.glob("round_*/*")):
                self.write_report(running=False)
            raise

    def write_report(self, running: bool) -> None:
        """Bring `report.html` up to date, in a process that gives its memory back. A run does not fail by its report."""
        if find_spec("matplotlib") is None:
            if not self.told:
                self.progress.say(f"{'':<11}no {self.dir.report.name}: {NEEDS_MATPLOTLIB}", style=WARNING)
            self.told = True
            return
        job, log = {"run": str(self.dir.path), "running": running}, self.dir.path / "logs" / "report.log"
        try:
            run_child("trl_ext.aries.results.report", job, log, lambda done, total: None)
        except (RecipeError, ChildError, OSError) as error:
            lines = str(error).splitlines()
            why = " ".join(dict.fromkeys([lines[0], lines[-1]]))
            self.progress.say(f"{'':<11}{self.dir.report} was not written: {why}", style=WARNING)
