"""What the jobs share: arguments, one-line errors, the progress line."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from raysft.config.load import describe
from raysft.errors import UserError


@dataclass
class Arguments:
    """Positional arguments, `key=value` overrides and `--flags` of a job's command line."""

    positional: list[str]
    overrides: list[str]
    flags: dict[str, str | bool]


def parse(
    argv: Sequence[str], usage: str, positional: int, flags: Sequence[str] = (), keys: bool = True
) -> Arguments:
    """Split a command line; prints help and leaves on -h, raises UserError on anything unknown.

    flags: allowed names; one that ends in `=` takes a value (`--data SOURCE` or `--data=SOURCE`).
    """
    found = Arguments([], [], {})
    rest = list(argv)
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
                allowed = ", ".join(f"--{flag}" for flag in (*flags, "debug", "help"))
                raise UserError(f"{word}: unknown option; there are {allowed}")
        elif len(found.positional) < positional:
            found.positional.append(word)
        elif keys:
            found.overrides.append(word)
        else:
            raise UserError(f"{word!r}: one argument too many\n{usage}")
    if len(found.positional) < positional:
        raise UserError(usage)
    return found


def guarded(main: Callable[[Sequence[str]], None]) -> None:
    """Run a job's main: exit code 0 on success only, errors in one readable line."""
    argv = sys.argv[1:]
    try:
        main(argv)
    except UserError as error:
        _leave(error, f"error: {error}", argv)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # noqa: BLE001 - the last resort: one line, traceback on request
        lines = str(error).strip().splitlines() or [""]
        text = f"error: {type(error).__name__}: {lines[-1]} (--debug shows where)"
        _leave(error, text, argv)


def _leave(error: Exception, text: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exception(error)
    print(text, file=sys.stderr)
    raise SystemExit(1) from None


class ProgressLine:
    """Prints what workers report: one line that renews itself on a terminal, else some lines."""

    def __init__(self, out: TextIO | None = None, every_s: float = 5.0) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._every = every_s
        self._begun: tuple[float, int] | None = None
        self._printed = 0.0

    def __call__(self, line: dict[str, Any]) -> None:
        """Show one report of a worker."""
        if "event" in line:
            self._event(line)
            return
        if "workers" in line:
            nodes = ", ".join(line["nodes"])
            self._out.write(f"{line['workers']} worker(s) started on node(s) {nodes}\n")
            self._out.flush()
            return
        if "eval" in line:
            self._end_line()
            values = "  ".join(f"{k} {_short(k, v)}" for k, v in line["eval"].items())
            self._out.write(f"evaluation at step {line['step']}: {values}\n")
            self._out.flush()
            return
        now = time.monotonic()
        step, total = line["step"], line["total_steps"]
        if self._begun is None or step <= self._begun[1]:  # a start, or a restart
            self._begun = (now - line["seconds"], step - line["steps"])
        last = step >= total
        if not self._live and not last and now - self._printed < self._every:
            return
        self._printed = now
        done = step - self._begun[1]
        left = (now - self._begun[0]) / done * (total - step)
        text = (
            f"step {step}/{total}  loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tok/s  "
            f"{_share_of_peak(line)}data wait {line['data_wait']:.0%}  "
            f"eta {int(left // 60)}:{int(left % 60):02d}"
        )
        if self._live:
            self._out.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def _event(self, line: dict[str, Any]) -> None:
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
        elif kind == "stopped":
            text = f"saved and stopped after step {line['step']}"
        else:
            return
        self._end_line()
        self._out.write(text + "\n")
        self._out.flush()

    def _end_line(self) -> None:
        if self._live and self._printed:
            self._out.write("\r\x1b[2K")


def _share_of_peak(line: dict[str, Any]) -> str:
    """Where the device's peak is known."""
    return f"mfu {line['mfu']:.0%}  " if "mfu" in line else ""


def _short(key: str, value: float) -> str:
    if key.startswith(("wer/", "cer/")):
        return f"{value:.2%}"
    return f"{value:.4g}"
