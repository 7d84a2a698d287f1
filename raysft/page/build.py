"""The page itself: facts as JSON, a script that draws them, and the library it draws with, in one
file. Nothing is asked of any host."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.page import facts
from raysft.run.stages import STATE, StagesFolder
from raysft.run.storage import write_whole

NAME = "report.html"
_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';
 img-src data: blob:; media-src data:">
<title>{title}</title><style>{style}</style></head>
<body><main id="page"></main>
<script type="application/json" id="facts">{facts}</script>
<script>{library}</script>
<script>{script}</script></body></html>
"""


def write(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write the page of a run, of a sweep, or of several runs beside each other; returns its path.

    target: by default report.html in the folder, or of several in the one above the first. Raises
    UserError where a folder is no run's or sweep's, or there is nothing to show yet.
    """
    shown = shown_of(folders)
    if target is None:
        target = (folders[0] if len(folders) == 1 else folders[0].parent) / NAME
    try:
        write_whole(target, render(shown).encode())
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def shown_of(folders: Sequence[Path]) -> JsonObject:
    """{"title", "at", "runs": of each `facts.of_run`, "sweep": its table or null, "stages": rows of
    `StagesFolder.table`}. A preparation's page has "prepared" (`raysft.prepare.summary`), and no
    runs."""
    sweep, stages = None, []
    title = ", ".join(folder.name for folder in folders)
    if len(folders) == 1 and (folders[0] / "results.csv").is_file():
        sweep = table_of(folders[0])
        trials = [folders[0] / row["folder"] for row in sweep["rows"]]
        folders = [trial for trial in trials if _begun(trial)]
    elif len(folders) == 1 and (folders[0] / STATE).is_file():
        stages = StagesFolder(folders[0]).table()
        runs = [folders[0] / row["stage"] for row in stages]
        folders = [run for run in runs if _begun(run)]
    return {
        "title": title,
        "at": time.strftime("%Y-%m-%d %H:%M"),
        "runs": [facts.of_run(folder, examples=sweep is None) for folder in folders],
        "sweep": sweep,
        "stages": stages,
    }


def _begun(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def table_of(folder: Path) -> JsonObject:
    """results.csv of a sweep: {"metric", "keys", "rows": a mapping a trial}."""
    with open(folder / "results.csv", newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        rows = list(reader)
        names = list(reader.fieldnames or [])
    # Columns: rank, trial, status, step, METRIC, mean_over_seeds, figures, KEYS, seed, ...
    keys = names[names.index("mean_over_seeds") + 1 : names.index("seed")]
    return {
        "metric": names[4],
        "columns": names,
        "keys": [name for name in keys if "/" not in name],
        "rows": rows,
    }


def render(shown: JsonObject) -> str:
    """The page as text."""

    def part(name: str) -> str:
        return (_HERE / name).read_text(encoding="utf-8")

    # In a script `</` would end it, wherever it stands in a text of the data.
    data = json.dumps(shown, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    title = shown["title"].replace("&", "&amp;").replace("<", "&lt;")
    values = {
        "title": title,
        "style": part("page.css"),
        "facts": data,
        "library": part("vendor/echarts.min.js"),
        "script": part("page.js"),
    }
    text = _PAGE
    for name, value in values.items():
        text = text.replace("{" + name + "}", value, 1)
    return text
