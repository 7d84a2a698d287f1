"""The command line: `raysft sft CONFIG`, `raysft evaluate RUN`, ..., and what the jobs do.

Each sub-command is a job of `jobs/`, or a module that can be run (`python -m raysft.audit`), with
the same words, messages and exit codes. A usage text says {command} where it names what was typed.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

from raysft import paths
from raysft.cli import Arguments, ProgressLine, guarded, parse
from raysft.errors import UserError

SFT = """Train, or continue the run if its folder exists.

{command} CONFIG.yaml [key=value ...] [--dry-run [--show N]] [--debug]

--dry-run: say what it would do, and train nothing. With --show N also the first N examples as the
model reads them, supervised tokens in green (or, not on a terminal, between white brackets).
"""

EVALUATE = """\
Evaluate a checkpoint of a run: answers by what their task is measured by (WER, BLEU, ...), losses.

{command} RUN [--data SOURCE] [--step N|best|last] [key=value ...] [--debug]

RUN is a run's folder. SOURCE replaces its data.eval. Without --step it is the newest checkpoint;
best: by checkpoint.best. Figures, every reference and hypothesis, and the config they were made
with go to a new folder below RUN/evaluations; nothing of the run is changed, be it under way.
"""

EXPORT = """Write a checkpoint of a run as a folder that transformers loads by from_pretrained.

{command} RUN OUT [--step N|best|last] [--merge] [--debug]

Without --step it is the newest; best: by the run's checkpoint.best.

Of a run with adapters (peft.method) the folder is the adapter, for PeftModel.from_pretrained; with
--merge it is the whole model, adapter included. Where the run has added tokens to the tokenizer,
give the base their rows first: base.resize_token_embeddings(len(tokenizer)).
"""

USAGE = """usage: raysft COMMAND ... (raysft COMMAND --help says more)

  raysft sft CONFIG.yaml [key=value ...]   train, or continue a run
  raysft evaluate RUN                      WER, CER and losses of a checkpoint
  raysft export RUN OUT                    a folder for from_pretrained
  raysft report RUN                        a picture of a run
  raysft audit RUN                         was every example trained on as planned?
"""


def sft(argv: Sequence[str], command: str = "raysft sft") -> None:
    """Train, or say what a run would do. Everything that can be found wrong is, before Ray
    starts."""
    arguments = parse(argv, SFT.format(command=command), positional=1, flags=["dry-run", "show="])
    shown = _count(arguments)

    from raysft import library

    config = library.load_config(arguments.positional[0], arguments.overrides)
    show = ProgressLine()
    show.say(f"{arguments.positional[0]}: checking config, sources and model")
    if "dry-run" in arguments.flags:
        print(library.dry_run(config, show, show=shown, colours=sys.stdout.isatty()))
    else:
        print(library.train(config, show).describe())


def _count(arguments: Arguments) -> int:
    """What --show says; 0 where it is not given. Raises UserError."""
    given = arguments.flags.get("show")
    if given is None:
        return 0
    if "dry-run" not in arguments.flags:
        raise UserError("--show: goes with --dry-run: add it, or leave --show out")
    if not str(given).isdecimal() or not int(given):
        raise UserError(f"--show: expected how many examples, found {given!r}")
    return int(given)


def evaluate(argv: Sequence[str], command: str = "raysft evaluate") -> None:
    """Load the run's config, replace what the command line says, evaluate."""
    usage = EVALUATE.format(command=command)
    arguments = parse(argv, usage, positional=1, flags=["data=", "step="])

    from raysft import library

    outcome = library.evaluate(
        arguments.positional[0],
        arguments.overrides,
        data=str(arguments.flags["data"]) if "data" in arguments.flags else None,
        step=str(arguments.flags.get("step", "last")),
        progress=ProgressLine(),
    )
    print(outcome.describe())


def export(argv: Sequence[str], command: str = "raysft export") -> None:
    """Export, and say what examples without an instruction were asked."""
    usage = EXPORT.format(command=command)
    arguments = parse(argv, usage, positional=2, flags=["merge", "step="], keys=False)
    run, out = map(paths.argument, arguments.positional, ("RUN", "OUT"))

    from raysft import library

    wanted = str(arguments.flags.get("step", "last"))
    step = library.export(run, out, step=wanted, merge="merge" in arguments.flags)

    from raysft.export import prompts  # imports torch, as exporting did

    print(f"exported step {step} to {out}")
    for task, text in prompts(run).items():
        print(
            f"{task} examples without an instruction of their own were asked: {text or 'nothing'}"
        )


def _module(name: str) -> Callable[[Sequence[str]], None]:
    """The sub-command that is `python -m raysft.NAME`."""

    def command(argv: Sequence[str]) -> None:
        importlib.import_module(f"raysft.{name}").main(argv, f"raysft {name}")

    return command


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sft": sft,
    "evaluate": evaluate,
    "export": export,
    "report": _module("report"),
    "audit": _module("audit"),
}


def main(argv: Sequence[str]) -> None:
    """Run the sub-command that the first word names. Raises UserError, naming the nearest, for a
    word that names none; prints help and leaves on -h, or, with exit code 2, where nothing is
    given."""
    name, *rest = argv or [""]
    if name in COMMANDS:
        COMMANDS[name](rest)
        return
    if name.startswith("-") or not name:
        parse(argv, USAGE, positional=1, keys=False)
    near = difflib.get_close_matches(name, COMMANDS, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{name}: unknown command{meant} (there are {', '.join(COMMANDS)})")


def run() -> None:
    """The console command."""
    guarded(main)
