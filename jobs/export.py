"""Write a checkpoint of a run as a folder that transformers loads by from_pretrained.

python jobs/export.py RUN OUT [--step N|best|last] [--merge] [--debug]

Without --step it is the newest; best: by the run's checkpoint.best.

Of a run with adapters (peft.method) the folder is the adapter, for PeftModel.from_pretrained; with
--merge it is the whole model, adapter included. Where the run has added tokens to the tokenizer,
give the base their rows first: base.resize_token_embeddings(len(tokenizer)).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysft import paths
from raysft.cli import guarded, parse


def main(argv: Sequence[str]) -> None:
    """Needs neither Ray nor the training data."""
    arguments = parse(argv, __doc__ or "", positional=2, flags=["merge", "step="], keys=False)
    run, out = map(paths.argument, arguments.positional, ("RUN", "OUT"))
    wanted = str(arguments.flags.get("step", "last"))

    from raysft import remarks
    from raysft.driver import preflight as prepare

    prepare.check_export(run, out, wanted)

    from raysft.export import export_run, prompts  # imports torch: not before a mistake is said

    remarks.quiet()
    step = export_run(run, out, merge="merge" in arguments.flags, step=wanted)
    print(f"exported step {step} to {out}")
    for task, text in prompts(run).items():
        print(
            f"{task} examples without an instruction of their own were asked: {text or 'nothing'}"
        )


if __name__ == "__main__":
    guarded(main)
