"""What jobs/prepare.py can hear with, as data: methods of speech tokens (prepare.speech_tokens) and
of speaker embeddings (prepare.speakers), a row each.

Nothing here imports torch; `load` gets the class of a row where it is used.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from pathlib import Path

from raysft.config.section import Section
from raysft.errors import UserError

TOKENS, SPEAKERS = "prepare.speech_tokens", "prepare.speakers"


@dataclass(frozen=True)
class Method:
    """A way to hear a clip.

    section: whose `method` it is, TOKENS or SPEAKERS. implementation: "module:class", a
    `raysft.prepare.listener.Listener`. needs, takes: keys of the section that it cannot do without,
    and may have; others of `OWN` are refused. about: one line for people.
    """

    section: str
    name: str
    implementation: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    about: str = ""


OWN = (
    *("model", "revision", "layer", "stack", "clusters", "fit_clips", "path", "codebooks"),
    *("pattern", "streams"),
)
"""Keys that are not for every method."""

_ROWS: dict[tuple[str, str], Method] = {}


def register(row: Method) -> None:
    """Add a row to the table, in every process that reads the config or prepares. Raises UserError
    for a name that another row of its section has."""
    key = (row.section, row.name)
    if _ROWS.get(key) is row:
        return
    if key in _ROWS:
        raise UserError(
            f"{row.section} has a method {row.name} already: give this one another name"
        )
    _ROWS[key] = row


def tokens() -> list[str]:
    """What prepare.speech_tokens.method takes."""
    return [name for section, name in _ROWS if section == TOKENS]


def speakers() -> list[str]:
    """What prepare.speakers.method takes."""
    return [name for section, name in _ROWS if section == SPEAKERS]


def about(section: str) -> str:
    """`name: one line` of each row of a section."""
    return "; ".join(f"{row.name}: {row.about}" for row in _ROWS.values() if row.section == section)


def load(section: str, name: str) -> type:
    """The class of a row. Imports what it hears with."""
    return pkgutil.resolve_name(_ROWS[section, name].implementation)


def check(section: str, settings: Section) -> None:
    """Raises UserError: a key that the method needs is not given, or one that it does not take."""
    row = _ROWS[section, getattr(settings, "method")]  # noqa: B009 - of any of the sections
    fields = type(settings).model_fields
    given = [
        name
        for name in OWN
        if name in fields
        and getattr(settings, name) != fields[name].get_default(call_default_factory=True)
    ]
    for name in row.needs:
        if name not in given:
            raise UserError(f"{section}.{name}: not given, and method {row.name} needs it")
    for name in given:
        if name not in (*row.needs, *row.takes):
            others = [
                other.name
                for other in _ROWS.values()
                if other.section == section and name in (*other.needs, *other.takes)
            ]
            raise UserError(
                f"{section}.{name}: method {row.name} has none: leave it out (it is for "
                f"{' and '.join(others)})"
            )


def opened(section: str, settings: Section, where: str, folder: Path) -> object:
    """What hears as `settings` say, which stand not in the section of a preparation but at `where`.

    folder: where it keeps what it fits. Raises UserError, naming `where`.
    """
    try:
        check(section, settings)
        made: object = load(section, getattr(settings, "method"))(settings, folder)  # noqa: B009
        return made
    except UserError as error:
        raise UserError(str(error).replace(section, where)) from None


register(
    Method(
        TOKENS,
        "kmeans",
        "raysft.prepare.tokens.kmeans:HiddenUnits",
        needs=("model", "layer"),
        takes=("revision", "stack", "clusters", "fit_clips", "path"),
        about="nearest of the clusters of a hidden layer (HuBERT, WavLM, w2v-BERT, XLS-R)",
    )
)
register(
    Method(
        TOKENS,
        "codec",
        "raysft.prepare.tokens.codec:Codec",
        needs=("model",),
        takes=("revision", "codebooks", "pattern"),
        about="codebooks of a neural codec of transformers (DAC, Mimi, EnCodec, X-Codec, X-Codec2)",
    )
)
register(
    Method(
        TOKENS,
        "onnx",
        "raysft.prepare.tokens.onnx:Streams",
        needs=("streams",),
        takes=("pattern",),
        about="one or more ONNX models (Step's two codebooks, S3 tokenizers)",
    )
)
register(
    Method(
        SPEAKERS,
        "onnx",
        "raysft.prepare.speakers:Campplus",
        needs=("path",),
        about="an ONNX model that reads 80 fbank bins less their mean (CAM++)",
    )
)
register(
    Method(
        SPEAKERS,
        "xvector",
        "raysft.prepare.speakers:XVector",
        needs=("model",),
        takes=("revision",),
        about="a model with an x-vector head of transformers (WavLM, wav2vec 2)",
    )
)
