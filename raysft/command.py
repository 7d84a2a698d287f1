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
from raysft.cli import Arguments, guarded, parse
from raysft.errors import UserError
from raysft.progress import ProgressLine

SFT = """Train, or continue the run if its folder exists.

{command} CONFIG.yaml [key=value ...] [--dry-run [--show N]] [--debug]

With stages in the config: each of them in order, a run each; only=NAME runs one, and
stages.NAME.key=value changes one.

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

SWEEP = """\
Try values of any keys, each point as a run of its own, and rank them by an evaluation.

{command} CONFIG.yaml [key=value ...] [--debug]

What varies is in the config's section sweep: sweep.space={{peft.r: [8, 16], optim.lr: {{loguniform:
[1e-5, 1e-3]}}}}, sweep.trials, sweep.metric. The folder run.storage_path/run.name gets results.csv,
best.yaml (a config for sft), and below trials/ a run's folder each. The same command continues a
sweep that was interrupted: finished trials are not run again, others go on.
"""

PREPARE = """\
Corpora into shards: Parquet with a clip in each row, which the format shards reads fast.

{command} CONFIG.yaml [key=value ...] [--debug]

What is prepared is data.train, in any format; how, is in the config's section prepare:
prepare.path (the folder), prepare.rows, prepare.audio, prepare.speech_tokens, prepare.speakers (or
data.speech_tokens, where a run makes the tokens itself). prepare.html shows what came of it.
The same command goes on with a preparation that was interrupted. Train on it with
data.train=[{{path: FOLDER/data.list}}].
"""

REPORT = """\
One page of a run, a sweep, or several runs beside each other: report.html, a file for itself.

{command} RUN [RUN ...] [--out FILE.html] [--debug]

RUN is the folder of a run, of a sweep or of stages. A run writes its page itself, at every
evaluation. Of folders with results of judging (RUN/evaluations/NAME/judged, or Speech-DRAME's own),
a model each: pictures of how they agree with raters, into the first or into --out FOLDER.
"""

TRANSCRIBE = """Text of clips, by a run or a model's folder. Needs no Ray.

{command} RUN_OR_FOLDER AUDIO ... [--prompt TEXT] [--lang LANG] [--task TASK] [--json]
    [--checkpoint N|best|last] [--batch-seconds N] [--max-new-tokens N] [--debug]

RUN_OR_FOLDER is a run's folder (its newest checkpoint, adapters included; --checkpoint takes
another), a folder that `export` wrote, adapters too, or a hub id. AUDIO is a clip, a folder of
clips, or a manifest of any format that data.train takes; where a manifest has references, what
answers are measured by (WER and so on) is printed at the end, on stderr.

Prints the text; of several clips a line each, path TAB text (line breaks as spaces); with --json a
line each {"path", "id", "text", "seconds"} (and "reference"). A clip that cannot be read, or is
longer than the model reads, is a line on stderr; others are transcribed, and the exit code is 1.

What is asked is what the run was trained with (its data.prompts by task, its chat template);
--prompt replaces the instruction. --lang: the language of the clips, as the data names it.
--task: asr, where it is left out. --batch-seconds: of audio that is answered at a time (120).
--max-new-tokens: longest answer; left out, it follows the clips' length.
"""

SYNTHESIZE = """Says texts, by a run or an exported folder of a model that speaks. Needs no Ray.

{command} RUN TEXT|FILE ... [--out FOLDER|FILE.wav] [--decoder RUN]
    [--speaker CLIP [--speaker-text TEXT]] [--task TASK] [--checkpoint N|best|last]
    [speak.KEY=VALUE ...] [--debug]

TEXT is what is to be said; FILE has a text a line (.txt), or is a manifest of any format that
data.train takes. A wave file each goes to FOLDER (left out: said); its path is printed, TAB, text.

--decoder: of a language model that writes units: the run of the flow decoder that speaks them.
--speaker: a clip that is heard before each text: what it says is said anew, as the text asks. With
--speaker-text, which says what it says, each text is said in its voice.
--task: whose instruction is used (tts); dialog: TEXT is a clip, and its spoken reply is said;
printed are the path, TAB, what was heard, TAB, the reply. speak.flow.steps, speak.flow.guidance,
speak.seed, speak.vocoder and other keys of speak say how; with the same seed the same is said.
"""

USAGE = """usage: raysft COMMAND ... (raysft COMMAND --help says more)

  raysft sft CONFIG.yaml [key=value ...]   train, or continue a run
  raysft prepare CONFIG.yaml [key=value .] corpora into shards
  raysft sweep CONFIG.yaml [key=value ...] try values of keys, ranked by an evaluation
  raysft evaluate RUN                      WER, CER and losses of a checkpoint
  raysft export RUN OUT                    a folder for from_pretrained
  raysft transcribe RUN_OR_FOLDER AUDIO... text of clips
  raysft synthesize RUN TEXT|FILE ...      waves of texts
  raysft report RUN [RUN ...]              a page of a run, a sweep, or several runs
  raysft audit RUN                         was every example trained on as planned?
"""


def sft(argv: Sequence[str], command: str = "raysft sft") -> None:
    """Train, or say what a run would do. Everything that can be found wrong is, before Ray
    starts."""
    arguments = parse(argv, SFT.format(command=command), positional=1, flags=["dry-run", "show="])
    shown = _count(arguments)

    from raysft import library

    config = library.load_config(arguments.positional[0], arguments.overrides)
    with ProgressLine() as show:
        show({"doing": f"{arguments.positional[0]}: checking config, sources and model"})
        if "dry-run" in arguments.flags:
            text = library.dry_run(config, show, show=shown, colours=sys.stdout.isatty())
        else:
            text = library.train(config, show).describe()
    print(text)


def sweep(argv: Sequence[str], command: str = "raysft sweep") -> None:
    """Begin, or continue, a sweep."""
    arguments = parse(argv, SWEEP.format(command=command), positional=1)

    from raysft import library

    config = library.load_config(arguments.positional[0], arguments.overrides)
    with ProgressLine() as show:
        show({"doing": f"{arguments.positional[0]}: checking config and space"})
        swept = library.sweep(config, show)
    print(swept.describe())


def prepare(argv: Sequence[str], command: str = "raysft prepare") -> None:
    """Make the shards that are not there, and say what there is."""
    arguments = parse(argv, PREPARE.format(command=command), positional=1)

    from raysft import library

    config = library.load_config(arguments.positional[0], arguments.overrides, model=False)
    with ProgressLine() as show:
        made = library.prepare(config, show)
    left = f"; {made.rejected:,} left out (quarantine.jsonl)" if made.rejected else ""
    print(
        f"{made.path}: {made.rows:,} utterances, {made.seconds / 3600:.2f} h in {made.shards:,} "
        f"shards, {made.made:,} of them made now{left}"
    )


def report(argv: Sequence[str], command: str = "raysft report") -> None:
    """Write the page, and say where it is."""
    usage = REPORT.format(command=command)
    arguments = parse(argv, usage, positional=1, flags=["out="], keys=False, more=True)

    from raysft import library

    out = arguments.flags.get("out")
    print(library.report(arguments.positional, None if out is None else str(out)))


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

    with ProgressLine() as show:
        outcome = library.evaluate(
            arguments.positional[0],
            arguments.overrides,
            data=str(arguments.flags["data"]) if "data" in arguments.flags else None,
            step=str(arguments.flags.get("step", "last")),
            progress=show,
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


def transcribe(argv: Sequence[str], command: str = "raysft transcribe") -> None:
    """Print a transcript as soon as it is there; leaves with exit code 1 where one is missing."""
    flags = ["prompt=", "lang=", "task=", "json", "checkpoint=", "batch-seconds="]
    flags.append("max-new-tokens=")
    usage = TRANSCRIBE.replace("{command}", command)  # it has other braces
    arguments = parse(argv, usage, positional=2, flags=flags, keys=False, more=True)
    model, *audio = arguments.positional
    given = {name: str(value) for name, value in arguments.flags.items()}
    numbers = {name: _number(name, given) for name in ("batch-seconds", "max-new-tokens")}

    from raysft import library

    transcripts = library.transcribe(
        model,
        audio,
        **{name: given.get(name) for name in ("prompt", "lang", "task", "checkpoint")},
        batch_seconds=numbers["batch-seconds"],
        max_new_tokens=numbers["max-new-tokens"],
    )

    from raysft.run.evaluations import table

    for one in transcripts:
        if one.error:
            print(f"error: {one.error}", file=sys.stderr, flush=True)
        elif "json" in given:
            print(one.line(), flush=True)
        else:
            before = f"{one.path}\t" if len(transcripts) > 1 else ""
            print(before + (" ".join(one.text.splitlines()) if before else one.text), flush=True)
    if figures := transcripts.figures():
        print(table(figures), file=sys.stderr)
    if transcripts.unended:
        print(
            f"warning: {transcripts.unended} of {len(transcripts)} answers are cut where they have "
            "as many tokens as an answer may have; --max-new-tokens raises that",
            file=sys.stderr,
        )
    if transcripts.failed:
        raise SystemExit(1)


def synthesize(argv: Sequence[str], command: str = "raysft synthesize") -> None:
    """Write a wave as soon as it is said; leaves with exit code 1 where one is missing."""
    flags = ["out=", "decoder=", "speaker=", "speaker-text=", "task=", "checkpoint="]
    arguments = parse(argv, SYNTHESIZE.format(command=command), 2, flags, keys=False, more=True)
    run, *words = arguments.positional
    texts = [word for word in words if not word.startswith("speak.")]
    given = {name: str(value) for name, value in arguments.flags.items()}

    from raysft import library
    from raysft.synthesis.waves import Out

    out = Out(given.get("out", "said"), len(texts))
    utterances = library.synthesize(
        run,
        texts,
        [word for word in words if word.startswith("speak.")],
        speaker=given.get("speaker"),
        speaker_text=given.get("speaker-text"),
        decoder=given.get("decoder"),
        task=given.get("task", "tts"),
        checkpoint=given.get("checkpoint"),
    )
    for one in utterances:
        if one.error:
            print(f"error: {one.error}", file=sys.stderr, flush=True)
        else:
            said = (one.heard, one.text) if one.heard else (one.text,)
            print("\t".join([str(out.write(one)), *said]), flush=True)
    if utterances.failed:
        raise SystemExit(1)


def _number(name: str, given: dict[str, str]) -> int | None:
    """What --name says; None where it is not given. Raises UserError."""
    value = given.get(name)
    if value is None:
        return None
    if not value.isdecimal() or not int(value):
        raise UserError(f"--{name}: expected a whole number greater than 0, found {value!r}")
    return int(value)


def _module(name: str) -> Callable[[Sequence[str]], None]:
    """The sub-command that is `python -m raysft.NAME`."""

    def command(argv: Sequence[str]) -> None:
        importlib.import_module(f"raysft.{name}").main(argv, f"raysft {name}")

    return command


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sft": sft,
    "sweep": sweep,
    "evaluate": evaluate,
    "export": export,
    "transcribe": transcribe,
    "synthesize": synthesize,
    "report": report,
    "prepare": prepare,
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
