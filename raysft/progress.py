"""What a user sees while a job runs: the phase it is in, steps, evaluations, and what happened.

On a terminal by rich: lines that stay, and below them one that says what is being done, since when,
and how far it is. Elsewhere (a file, the log of a Ray job) plain lines.
"""

from __future__ import annotations

import atexit
import sys
import time
from typing import TYPE_CHECKING, Self, TextIO

import psutil

from raysft.json_types import JsonObject
from raysft.run.evaluations import table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 80
SHORTEST_S = 0.1  # a phase that is worth a line of its own


class ProgressLine:
    """Shows what driver and workers report; called with each report.

    The first step of a start is followed by what the time until then went to, phase by phase.
    """

    def __init__(self, out: TextIO | None = None, every_s: float = 5.0) -> None:
        """out: None: standard output. every_s: seconds between lines of steps, off a terminal."""
        self._out = out or sys.stdout
        self._view = View.of(self._out)
        self._every = every_s
        self._time_left = TimeLeft()
        self._phases: Phases | None = Phases()
        self._printed = 0.0

    def __call__(self, line: JsonObject) -> None:
        """Show one report: of the driver before there are workers, then of a worker."""
        if "doing" in line:
            self._phase(line["doing"], line.get("share"))
        elif "summary" in line:
            self.say("\n".join(line["summary"]))
        elif "event" in line:
            self._event(line)
        elif "workers" in line:
            self.say(f"{line['workers']} worker(s) started on node(s) {', '.join(line['nodes'])}")
        elif "began" in line:
            self._began()
        elif "eval" in line:
            self.say(f"evaluation at step {line['step']}\n{table(line['eval'])}")
        else:
            self._step(line)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._view is not None:
            self._view.print(text)
            return
        self._out.write(text + "\n")
        self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was: before anything else is printed there. A process that ends
        does so by itself."""
        if self._view is not None:
            self._view.close()

    def _phase(self, text: str, share: float | None = None) -> None:
        """share: that is done of the phase, under this text; None: it begins."""
        if self._phases is not None and share is None:
            self._phases.begin(text)
        if self._view is not None:
            self._view.phase(text, share)
        elif share is None:
            self.say(text)
        elif time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            self.say(f"{text}: {share:.0%}")

    def _step(self, line: JsonObject) -> None:
        now = time.monotonic()
        self._time_left.add(line["step"], line["steps"], line.get("at", time.time()))
        last = line["step"] >= line["total_steps"]
        left = 0.0 if last else self._time_left.seconds(line["total_steps"])
        if self._view is not None:
            self._view.step(line, left, last)
        elif last or now - self._printed >= self._every:
            self._printed = now
            self.say(step_line(line, left))

    def _began(self) -> None:
        """The first step is done: what the time until then went to, once."""
        if self._view is not None:
            self._view.phase("")
        if self._phases is not None:
            self.say(self._phases.told(total_only=self._view is not None))
            self._phases = None

    def _event(self, line: JsonObject) -> None:
        """What a user wants to know of starts and saves; the rest is in events.jsonl."""
        kind = line["event"]
        if kind == "continued" and line["step"]:
            text = f"continued after step {line['step']} with {line['workers']} worker(s)"
            lost = f", {line['lost_s']:.0f} s lost" if line["lost_s"] is not None else ""
            text += f" ({line['reason']}; {line['steps_again']} steps again{lost})"
        elif kind == "continued":
            text = f"begun again with {line['workers']} worker(s) ({line['reason']})"
        elif kind == "skipped":
            text = f"checkpoint skipped: {line['reason']}"
        elif kind == "warning":
            text = f"warning: {line['reason']}"
        elif kind == "length":
            text = line["reason"]
        elif kind == "stopped":
            text = f"saved and stopped after step {line['step']}"
        else:
            return
        self.say(text)


class Phases:
    """What the time of a start goes to, from the command to the first step."""

    def __init__(self) -> None:
        self._begun = psutil.Process().create_time()
        self._all = [("starting Python", self._begun)]

    def begin(self, text: str) -> None:
        """The phase before ends here."""
        self._all.append((text, time.time()))

    def told(self, total_only: bool = False) -> str:
        """The times, in the order of the phases; those of a moment are left out."""
        ends = [at for _, at in self._all[1:]] + [time.time()]
        took = [(text, end - at) for (text, at), end in zip(self._all, ends, strict=True)]
        lines = [] if total_only else [took_line(*one) for one in took if one[1] >= SHORTEST_S]
        return "\n".join([f"first step after {ends[-1] - self._begun:.1f} s", *lines])


def took_line(text: str, seconds: float) -> str:
    """A phase that is over, in at most 79 columns."""
    return f"{seconds:6.1f} s  {text}"[: WIDTH - 1]


class View:
    """The lines that renew themselves at the foot of a terminal, and what stays above them: phases
    that are over, with their time."""

    @classmethod
    def of(cls, out: TextIO) -> View | None:
        """None where `out` is no terminal, or one that cannot renew a line."""
        if not out.isatty():
            return None
        from rich.console import Console

        console = Console(file=out, highlight=False, emoji=False, markup=False)
        return None if console.is_dumb_terminal else cls(console)

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._text, self._since = "", time.monotonic()
        self._told = ""  # what of it is done just now, and how much of that
        self._share: float | None = None
        self._steps: JsonObject | None = None
        self._left: float | None = None
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._open = False

    def print(self, text: str) -> None:
        """A line that stays, above."""
        self._console.print(text, soft_wrap=True)

    def phase(self, text: str, share: float | None = None) -> None:
        """What is being done from here on; or how far it is, under this text."""
        if share is None:
            self._over()
            self._text, self._since = text, time.monotonic()
        else:
            self._told = text
        self._share = share
        self._show()

    def step(self, line: JsonObject, left: float | None, last: bool) -> None:
        """A report of training. left: seconds to the last step. last: it stays as a line."""
        self._over()
        self._steps, self._left = line, left
        if last:
            self._steps = None
            self.print(step_line(line, left))
        self._show()

    def close(self) -> None:
        """Nothing is renewed any more."""
        self._over()
        if self._open:
            self._open = False
            self._live.stop()

    def _over(self) -> None:
        """The phase is."""
        text, self._text = self._text, ""
        self._share = None
        took = time.monotonic() - self._since
        if text:
            self.print(took_line(text, took) if took >= SHORTEST_S else text)

    def _show(self) -> None:
        if not self._open:
            self._open = True
            atexit.register(self.close)
            self._live.start()
        self._live.refresh()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        rows: list[RenderableType] = []
        if self._steps is not None:
            done, total = self._steps["step"], self._steps["total_steps"]
            bar = Table.grid(padding=(0, 1))
            share = Text(f"{done / total:.0%}", style="bold")
            bar.add_row(ProgressBar(total=total, completed=done, width=40), share)
            rows += [bar, Text(step_line(self._steps, self._left), overflow="crop", no_wrap=True)]
        if self._text:
            took = _clock(time.monotonic() - self._since)
            text = self._text if self._share is None else self._told
            rows.append(Spinner("dots", Text(f"{text}  {took}", overflow="ellipsis")))
            if self._share is not None:
                bar = Table.grid(padding=(0, 1))
                share = Text(f"{self._share:.0%}", style="bold")
                bar.add_row(ProgressBar(total=1, completed=self._share, width=40), share)
                rows.append(bar)
        return Group(*rows)


class TimeLeft:
    """When the last step will be done, by the pace since the first report of a start.

    What came before that report (start-up, compilation, the first batches) says nothing about the
    rest; saves and evaluations in between belong to the pace.
    """

    STEPS, SECONDS = 5, 5.0  # of training, before an estimate is worth showing

    def __init__(self) -> None:
        self._first = self._last = (0, 0.0)

    def add(self, step: int, steps: int, at: float) -> None:
        """`steps` more are done, up to `step`, at a time (time.time())."""
        if step - steps != self._last[0] or not self._last[1]:  # a start, or a restart
            self._first = (step, at)
        self._last = (step, at)

    def seconds(self, total: int) -> float | None:
        """To step `total`; None: not known yet."""
        steps, took = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if steps < self.STEPS or took < self.SECONDS:
            return None
        return took / steps * (total - self._last[0])


def step_line(line: JsonObject, left: float | None) -> str:
    """A report of training in at most 80 columns; what matters least is left out first.

    left: seconds to the last step; None: not known yet.
    """
    head = f"step {line['step']}/{line['total_steps']}  loss {line['loss']:.4f}"
    parts = {
        "epoch": f"epoch {line['epoch']}",
        "lr": f"lr {line['lr']:.3g}",
        "speed": f"{_count(line['tokens_per_s'])} tok/s",
        "mfu": f"mfu {line['mfu']:.0%}" if "mfu" in line else "",
        "wait": f"wait {line['data_wait']:.0%}",
        "left": "eta --:--" if left is None else f"eta {_clock(left)}",
    }
    for least in ("", "mfu", "wait", "speed", "lr"):
        parts.pop(least, None)
        text = "  ".join([head, *filter(None, parts.values())])
        if len(text) < WIDTH:  # a full row would wrap on some terminals
            break
    return text


def _count(number: float) -> str:
    """Three digits or so: 987, 12,340, 1.23M."""
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number:,.0f}"


def _clock(seconds: float) -> str:
    """2:05 of minutes, 3:02:05 of hours, 2d 03:02 of days."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"
