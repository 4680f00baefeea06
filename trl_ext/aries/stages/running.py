"""
What the stages of a run share: a process of their own, a line on the screen, their start and end in the event log.

Also here is what happens beside them, the report and the trackers: the run goes on without these if they fail.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..children import ChildError, Peak, run_child
from ..config import AriesConfig
from ..provenance import note_made
from ..results.progress import WARNING, RunProgress
from ..results.report import NEEDS_MATPLOTLIB
from ..results.state import INTERRUPTED, recorded
from ..results.tracking import is_tracked
from ..run_dir import RunDir
from .messages import AnsweringMessage, ReportMessage, RoundMessage


Update = Callable[[int, int], None]  # called with (done, total)


class Stages:
    """
    Args:
        config ([`~aries.config.AriesConfig`]):
            What the recipe says.
        progress ([`~aries.results.progress.RunProgress`]):
            What is printed.
    """

    def __init__(self, config: AriesConfig, progress: RunProgress):
        self.config, self.progress = config, progress
        self.dir = RunDir(Path(config.output_dir))
        self.at = (0, "check")  # round and stage, for the error that stops the run
        self._told = False  # whether the user knows that reports need matplotlib
        self._peaks: list[Peak] = []  # of the stage's processes

    def start(self, stage: str, message: Any, log: Path, update: Update, **options: Any) -> None:
        """Run a process of `stages/` to its end."""
        peak = run_child(f"trl_ext.aries.stages.{stage}", message, log, update, on_note=self.note, **options)
        self._peaks += filter(None, [peak])

    def start_answering(self, stage: str, answering: int, name: str, log: str, **options: Any) -> None:
        """[`start`] a stage for a policy that answers."""
        with self.answering_stage(answering, name) as (logs, update):
            self.start(stage, AnsweringMessage(self.dir.path, answering), logs / log, update, **options)

    @contextmanager
    def answering_stage(self, answering: int, name: str) -> Iterator[tuple[Path, Update]]:
        """
        A [`stage`] of the round that is made from the answers, with its log directory. When the last round's policy is evaluated, that is
        the last round.
        """
        number = min(answering + 1, self.config.rounds)
        with self.stage(number, name) as update:
            yield self.dir.round(number).logs, update

    def note(self, note: str, style: str | None = None) -> None:
        """Tell the user something, and log it."""
        number, stage = self.at
        self.progress.say(f"{'':<11}{note}", style)
        self.dir.log_event(event="note", round=number, stage=stage, note=note)

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Update]:
        """Show a stage while it runs, and log its start and end."""
        start, self._peaks = time.monotonic(), []
        self.dir.progress.unlink(missing_ok=True)  # of a process that was killed
        self.at = (number, name)
        self.dir.log_event(event="start", round=number, stage=name)
        with self.progress.stage(number, name) as update:
            yield recorded(update, self.dir, number, name)
        self.dir.progress.unlink(missing_ok=True)
        note_made(self.dir, self.config.rounds)
        seconds = round(time.monotonic() - start, 3)
        self.dir.log_event(event="end", round=number, stage=name, seconds=seconds, **self.peaks())

    def peaks(self) -> dict[str, int]:
        """The most memory that one process of the stage held, in bytes, if known."""
        found = {
            "peak_memory": [peak.memory for peak in self._peaks],
            "peak_gpu_memory": [peak.gpu for peak in self._peaks if peak.gpu],
        }
        return {key: max(values) for key, values in found.items() if values}

    @contextmanager
    def stops_reported(self) -> Iterator[None]:
        """Have the event log and the report say where and why a run stopped."""
        try:
            yield
        except BaseException as error:
            number, stage = self.at
            text = INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"{error}" or type(error).__name__
            self.dir.log_event(event="stopped", round=number, stage=stage, error=text)
            self.progress.stopped(number, stage, text)
            made = any(self.dir.path.glob("round_*/*")) and not isinstance(error, KeyboardInterrupt)
            if made or self.dir.report.exists():  # a report that is there says that the run goes on
                self.write_report(running=False)
            raise

    def write_report(self, running: bool) -> None:
        """Bring `report.html` up to date."""
        if find_spec("matplotlib") is None:
            if not self._told:
                self.progress.say(f"{'':<11}no {self.dir.report.name}: {NEEDS_MATPLOTLIB}", style=WARNING)
            self._told = True
            return
        message = ReportMessage(self.dir.path, running)
        self.start_aside("report", message, self.dir.logs / "report.log", f"{self.dir.report} was not written")

    def track(self, number: int) -> None:
        """Send a round's metrics to the trackers that got those of its training."""
        if is_tracked(self.config):
            log = self.dir.round(number).logs / "tracking.log"
            failed = f"metrics of round {number} were not tracked, see {log}"
            self.start_aside("track", RoundMessage(self.dir.path, number), log, failed)

    def start_aside(self, stage: str, message: Any, log: Path, failed: str) -> None:
        """Run a process that the run can do without; if it fails, say so."""
        try:
            self.start(stage, message, log, lambda done, total: None)
        except (RecipeError, ChildError, OSError) as error:
            lines = str(error).splitlines()
            why = " ".join(dict.fromkeys([lines[0], lines[-1]]))
            self.progress.say(f"{'':<11}{failed}: {why}", style=WARNING)
