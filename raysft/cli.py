"""What the jobs share: arguments, one-line errors, the progress line."""

from __future__ import annotations

import difflib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from raysft import environment
from raysft.config.aliases import our_key, our_value
from raysft.config.load import all_keys, describe
from raysft.errors import UserError
from raysft.failures import told
from raysft.json_types import JsonObject
from raysft.run.evaluations import table


@dataclass
class Arguments:
    """Positional arguments, `key=value` overrides and `--flags` of a job's command line."""

    positional: list[str]
    overrides: list[str]
    flags: dict[str, str | bool]


def parse(
    argv: Sequence[str],
    usage: str,
    positional: int,
    flags: Sequence[str] = (),
    keys: bool = True,
    more: bool = False,
) -> Arguments:
    """Split a command line; prints help and leaves on -h (and, with exit code 2, where nothing is
    given), raises UserError on anything unknown.

    flags: allowed names; one that ends in `=` takes a value (`--data SOURCE` or `--data=SOURCE`).
    more: there may be more positional words than that.
    """
    found = Arguments([], [], {})
    rest = list(argv)
    if not rest and positional:
        print(usage.strip(), file=sys.stderr)
        raise SystemExit(2)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(
                usage
                + ("\n\nConfig keys (key=value overrides them)\n" + describe() if keys else "")
            )
            raise SystemExit(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name + "=" in flags:
                if not equals and not rest:
                    raise UserError(f"--{name}: needs a value\n{usage}")
                found.flags[name] = value if equals else rest.pop(0)
            elif name in (*flags, "debug") and not equals:
                found.flags[name] = True
            else:
                raise UserError(f"--{name}: {_meant(name, value, rest, flags, keys)}")
        elif word.startswith("-") and word != "-" and "=" not in word:
            raise UserError(f"{word}: {_meant(word[1:], '', rest, flags, keys)}")
        elif len(found.positional) < positional or more:
            found.positional.append(word)
        elif keys:
            found.overrides.append(word)
        else:
            raise UserError(f"{word!r}: one argument too many\n{usage}")
    if len(found.positional) < positional:
        raise UserError(
            f"{len(found.positional)} of {positional} arguments are given\n{usage.strip()}"
        )
    return found


def _meant(name: str, value: str, rest: list[str], flags: Sequence[str], keys: bool) -> str:
    """What to say of an option there is not: what it is called here, or which there are."""
    known = all_keys()
    ours = (name, "") if name in known else our_key(name, known)
    if keys and ours is not None and "[]" not in ours[0]:
        key, note = ours
        if not value and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            value = rest[0]
        value = (our_value(key, value) or value).partition(",")[0]
        return f"keys are given as key=value here: {key}={value or '...'}" + (
            f" ({note})" if note else ""
        )
    names = [flag.rstrip("=") for flag in (*flags, "debug", "help")]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean --{near[0]}? T" if near else "t"
    return f"unknown option; {hint}here are {', '.join(f'--{name}' for name in names)}"


def guarded(main: Callable[[Sequence[str]], None]) -> None:
    """Run a job's main: exit code 0 on success only, errors in one readable line."""
    argv = sys.argv[1:]
    if environment.REMARK is not None:
        print(environment.REMARK, file=sys.stderr, flush=True)
    try:
        main(argv)
    except UserError as error:
        _leave(error, f"error: {error}", argv)
    except KeyboardInterrupt as error:
        # Whoever knows what there is to say about it has said it: see `launch.Start.left`.
        print(f"\n{str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # noqa: BLE001 - the last resort: one line, traceback on request
        _leave(error, f"error: {told(error)}; --debug shows all of it", argv)


def _leave(error: Exception, text: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exception(error)
    print(text, file=sys.stderr)
    raise SystemExit(1) from None


WIDTH = 80


class ProgressLine:
    """Prints what workers report: one line that renews itself on a terminal, else some lines."""

    def __init__(self, out: TextIO | None = None, every_s: float = 5.0) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._every = every_s
        self._time_left = TimeLeft()
        self._printed = 0.0

    def __call__(self, line: JsonObject) -> None:
        """Show one report: of the driver before there are workers, then of a worker."""
        if "doing" in line:
            self.say(line["doing"])
        elif "summary" in line:
            self.say("\n".join(line["summary"]))
        elif "event" in line:
            self._event(line)
        elif "workers" in line:
            self.say(f"{line['workers']} worker(s) started on node(s) {', '.join(line['nodes'])}")
        elif "eval" in line:
            self.say(f"evaluation at step {line['step']}\n{table(line['eval'])}")
        else:
            self._step(line)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._end_line()
        self._out.write(text + "\n")
        self._out.flush()

    def _step(self, line: JsonObject) -> None:
        now = time.monotonic()
        self._time_left.add(line["step"], line["steps"], line.get("at", time.time()))
        last = line["step"] >= line["total_steps"]
        if not self._live and not last and now - self._printed < self._every:
            return
        self._printed = now
        left = 0.0 if last else self._time_left.seconds(line["total_steps"])
        text = step_line(line, left)
        if self._live:
            self._out.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self._out.write(text + "\n")
        self._out.flush()

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

    def _end_line(self) -> None:
        if self._live and self._printed:
            self._out.write("\r\x1b[2K")


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
