"""
The runs under a directory: what ran, when, how far it is, and its best score; as a table, and as an `index.html` that links to the
reports.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ...recipe import RecipeError
from ..run_dir import RunDir
from .pages import write_page
from .progress import RunProgress
from .report_data import RunRecord, read_run


DEPTH = 3  # Directories between the one that is named and a run


def list_runs(directory: Path) -> int:
    """
    `trl-ext aries list`: print the runs, newest last, and write `index.html`.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`RecipeError`]: no such directory, no run in it, or an `index.html` that trl-ext did not write.
    """
    if not directory.is_dir():
        raise RecipeError(f"{directory}: no such directory. Name the one that holds your runs: trl-ext aries list DIR")
    rows = [row(directory, path) for path in run_directories(directory)]
    if not rows:
        raise RecipeError(f"{directory} holds no run. Name the directory that holds your runs: trl-ext aries list DIR")
    rows.sort(key=lambda row: (row["started"] or "", row["name"]))
    table = Table(title=f"{len(rows)} run{'s' if len(rows) > 1 else ''} in {directory}", title_justify="left")
    for column, options in (
        ("run", {"overflow": "fold"}),
        ("state", {"overflow": "fold"}),
        ("best score", {"overflow": "fold"}),
        ("rounds", {}),
        ("what", {"overflow": "fold"}),
        ("started", {}),
    ):
        table.add_column(column, **options)
    for each in rows:
        best = each["best"]
        score = f"{best['score']:.3f} ({best['where']})" if best else "-"
        cells = (each["name"], each["state"], score, each["rounds"], each["what"], minute(each["started"]))
        table.add_row(*map(Text, cells))
    progress = RunProgress(0)
    progress.show(table)
    for each in rows:
        if each["error"] is not None:
            progress.say(f"{each['name']} cannot be read: {each['error']}")
    page = write_page(directory / "index.html", "index.html.jinja", directory=directory.resolve(), rows=rows)
    progress.say(f"As a page, with links to the reports: {page}")
    return 0


def run_directories(directory: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run directories at or below a directory, in the order of their names. Those inside a run are not looked for."""
    if RunDir(directory).resolved.exists():
        yield directory
    elif depth:
        for path in sorted(directory.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from run_directories(path, depth - 1)


def row(directory: Path, path: Path) -> dict[str, Any]:
    """What the list says about a run; the `error` if one of its files is broken."""
    name = str(path.relative_to(directory)) if path != directory else path.resolve().name
    found = {"name": name, "started": None, "what": "-", "rounds": "-", "best": None, "report": None, "error": None}
    try:
        run = read_run(path)
    except (RecipeError, KeyError, TypeError, OSError) as error:
        return found | {"kind": "broken", "state": "broken", "error": f"{error}"}
    resolved, report = run.resolved, RunDir(path).report
    return found | {
        "started": run.events[0]["time"] if run.events else None,
        "what": f"{resolved['model']['model_name_or_path']}, {resolved['training'].get('trainer', 'dpo')}",
        "rounds": f"{sum(r.manifest is not None for r in run.rounds if r.number)} of {resolved['rounds']}",
        "kind": run.state.kind,
        "state": short_state(run),
        "best": best_score(run),
        "report": report.relative_to(directory).as_posix() if report.exists() else None,
    }


def short_state(run: RunRecord) -> str:
    """The state in a few words; `trl-ext aries status` has the rest."""
    state = run.state
    if state.kind == "finished" or state.stage is None:
        return state.kind
    return f"{state.kind}: round {state.round}, {state.stage}"


def best_score(run: RunRecord) -> dict[str, Any] | None:
    """The highest mean score of an answer on the evaluation prompts, and whose it is. A judge's scores do not compare policies."""
    if run.judged:
        return None
    scores = [
        {"score": turn["score"], "where": f"{round_.name}, y{turn['turn']}"}
        for round_ in run.evaluated
        for turn in round_.metrics["turns"]
        if turn["score"] is not None
    ]
    return max(scores, key=lambda found: found["score"], default=None)


def minute(time: str | None) -> str:
    """A time of the event log without seconds and time zone."""
    return "-" if time is None else f"{time[:10]} {time[11:16]}"
