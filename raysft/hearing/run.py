"""What a model speaks of data.eval, measured: what an ASR run hears in it, how far it is from the
real clips, and how alike the speakers are. Beside each figure, its bound: the real clips by way of
the same mel and vocoder.

Above `worker`, which calls `hear` where it was given it (`worker.Data.hear`). Each worker speaks,
and hears, every n-th example; where a forward pass is a collective all speak all of them together,
and hear their own. An example says the same whoever speaks it: its noise follows from speak.seed
and its id.

Costs the ASR's load on every worker, and what speaking and transcribing cost.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from raysft import patience
from raysft.config.evaluation import Evaluate
from raysft.data.clips import mels
from raysft.data.clips.audio import load as decode
from raysft.data.clips.audio import resample
from raysft.data.encode.base import Encoder
from raysft.data.example import Audio, Example, Units
from raysft.data.index.table import Index
from raysft.errors import BadExample, UserError
from raysft.hearing import samples
from raysft.hearing.check import KEY, TASK, listener_of
from raysft.hearing.distortion import distortion
from raysft.scorers import SPEAKING, Spoken, added, scorers
from raysft.scorers.error_rates import error_rates
from raysft.synthesis.run import SPOKEN, Utterance, Utterances
from raysft.synthesis.vocoders import Raw, Vocoder
from raysft.transcribe.asked import Asked
from raysft.transcribe.model import Answering, load
from raysft.transcribe.run import Transcripts
from raysft.worker import Evaluation

Embed = Callable[[np.ndarray, int], np.ndarray | None]
Wave = tuple[np.ndarray, int]  # float32 [samples], Hz


def hear(
    evaluation: Evaluation,
    synced: bool,
    folder: Path | None,
    seen: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Figures by name, `wer/TASK`: the same on every worker. A collective.

    synced: a forward pass is one too. folder: that rank 0 writes samples into. seen, tell: as in
    `evaluate.run`. Raises UserError where what is to hear cannot be had.
    """
    config, world, data = evaluation.config, evaluation.world, evaluation.data
    assert data.eval is not None
    model, autocast = evaluation.speech_model, evaluation.strategy.autocast
    answering = Answering("model", config, data.encoder, model, autocast)
    wanted = [
        _asked(example, data.encoder.writes) for example in chosen(data.eval, config.evaluate)
    ]
    every = range(len(wanted))
    own = every[world.rank :: world.size]
    spoken = every if synced else own
    seen(0, 2 * len(own) + 1)
    speaking = Utterances(answering, [wanted[place] for place in spoken], config.speak)
    said: dict[int, Utterance] = {}
    for done, (place, one) in enumerate(zip(spoken, speaking, strict=True)):
        said[place] = one
        seen(min(done, len(own)) + 1, 2 * len(own) + 1)
    vocoder, voice = speaking.vocoder, data.encoder.speaker or data.encoder
    assert not isinstance(vocoder, Raw)  # `check_tools` refuses it
    embed = _embedding(config.evaluate)
    pairs: dict[int, tuple[Wave, Wave, Wave]] = {}
    lost: list[str] = []
    for place in own:
        try:
            if said[place].error:
                raise BadExample(said[place].error)
            pairs[place] = _waves(wanted[place], said[place], voice, vocoder)
        except (BadExample, OSError) as error:
            lost.append(f"{wanted[place].id}: {error}")
    heard, unheard = _heard(config.evaluate.asr, [wanted[p] for p in pairs], pairs, seen, len(own))
    found = {
        place: _measured(wanted[place], heard.get(place, (None, None)), pairs[place], embed)
        for place in pairs
    }
    kept = {place: _sample(found[place], pairs[place], config.evaluate) for place in found}
    world.barrier(lambda: seen(2 * len(own) + 1, 2 * len(own) + 1))
    parts = world.gather(({p: kept[p].figures for p in kept}, lost, unheard))
    if folder is not None:
        gathered = world.gather_main(kept)
        if world.is_main:
            everything = {place: one for part in gathered for place, one in part.items()}
            samples.write(folder, [everything[place] for place in sorted(everything)])
    if world.is_main:
        for text in _remarks([x for _, part, _ in parts for x in part], sum(n for *_, n in parts)):
            tell(text)
    joined = {place: one for part, *_ in parts for place, one in part.items()}
    return figures([joined[place] for place in sorted(joined)], config.evaluate)


def chosen(index: Index, settings: Evaluate) -> list[Example]:
    """What is spoken of data.eval: `evaluate.speak_examples` of each task that speaks, evenly."""
    found: list[Example] = []
    for task in SPEAKING:
        if task in index.tasks:
            rows = np.flatnonzero(index.task == index.tasks.index(task))
            if len(rows) > settings.speak_examples:
                places = np.linspace(0, len(rows) - 1, settings.speak_examples).astype(np.int64)
                rows = rows[places]
            found += index.examples(rows) if len(rows) else []
    return found


def figures(spoken: Sequence[Spoken], settings: Evaluate) -> dict[str, float]:
    """Of what was spoken, by name: NAME/TASK."""
    found: dict[str, float] = {}
    for task in dict.fromkeys(one.task for one in spoken):
        own = [one for one in spoken if one.task == task]
        for row in scorers():
            if row.wants == "speech":
                values = row.result(added([row.count(own, settings)]))
                found |= {f"{name}/{task}": value for name, value in values.items()}
    return found


def _asked(example: Example, writes: bool) -> Example:
    """What is given for `example` to be spoken. Of a flow decoder that makes tokens of the clip
    itself, that clip."""
    if writes or any(isinstance(part, Units) for part in example.parts):
        return example
    return replace(example, input=(_clip(example),), output=(SPOKEN, _clip(example)))


def _clip(example: Example) -> Audio:
    """The real clip of what is to be spoken. Raises BadExample where there is none."""
    for part in reversed(example.output):
        if isinstance(part, Audio):
            return part
    raise BadExample("has no clip that is spoken", "not one clip")


def _waves(
    example: Example, said: Utterance, encoder: Encoder, vocoder: Vocoder
) -> tuple[Wave, Wave, Wave]:
    """What was spoken, the real clip by the same vocoder, and the real clip."""
    mel = encoder.sounds
    rate = encoder.sample_rate if mel is None else mel.rate
    assert rate is not None
    real = decode(_clip(example), rate)
    if mel is not None:
        frames = mels.log_mel(real, mel) if mels.frames(len(real), mel) else None
    else:
        assert encoder.frames_of is not None
        frames = encoder.frames_of(real)
    if frames is None or not len(frames):
        raise BadExample(f"its clip of {len(real) / rate:.3f} s has no frame", "too short")
    return (said.wave, int(said.rate)), (vocoder(frames), vocoder.rate), (real, rate)


def _heard(
    asr: str | None,
    examples: Sequence[Example],
    pairs: dict[int, tuple[Wave, Wave, Wave]],
    seen: Callable[[int, int], None],
    most: int,
) -> tuple[dict[int, tuple[str, str]], int]:
    """What the ASR run hears in what was spoken and in its bound, and how many of these waves it
    could not hear: nothing is heard in them."""
    if asr is None or not pairs:
        return {}, 0
    with _own_patience():
        try:
            answering = load(asr)
        except UserError as error:
            raise UserError(f"{KEY}: {error}") from None
        asked = []
        for example, waves in zip(examples, pairs.values(), strict=True):
            lang = example.lang or example.language
            for name, wave in zip(("spoken", "bound"), waves[:2], strict=True):
                clip = Audio(f"{example.id} ({name})", bytes=_wav(*wave))
                one = Example(clip.path, TASK, (clip,), (), None, lang)
                asked.append(Asked(clip.path, clip.path, "", one))
        transcripts = Transcripts(answering, asked)
        texts: list[str] = []
        for done, transcript in enumerate(transcripts):
            texts.append(_plain(transcript.text))
            seen(most + (done + 1) // 2, 2 * most + 1)
    places = list(pairs)
    found = {p: (texts[2 * n], texts[2 * n + 1]) for n, p in enumerate(places)}
    return found, transcripts.failed


def _plain(text: str) -> str:
    """A transcript without the language before it, where the example names none to be taken off."""
    head, tab, rest = text.partition("\t")
    return rest if tab and len(head.split()) < 2 else text


@contextmanager
def _own_patience() -> Iterator[None]:
    """Around what reads another run, which has a patience of its own."""
    before = patience.allowed()
    try:
        yield
    finally:
        patience.allow(before)


def _wav(wave: np.ndarray, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


def _embedding(settings: Evaluate) -> Embed | None:
    """What tells speakers apart, of a wave and its rate; None for a wave that is too short."""
    if settings.speakers is None:
        return None
    listener = listener_of(settings.speakers)
    return partial(_embedded, listener.hear, listener.sample_rate)


def _embedded(
    embed: Callable[[np.ndarray], np.ndarray], wanted: int, wave: np.ndarray, rate: int
) -> np.ndarray | None:
    try:
        return embed(resample(wave, rate, wanted))
    except BadExample:
        return None


def cosine(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Of two embeddings; None where there is none, or one points nowhere."""
    if one is None or other is None:
        return None
    a, b = one.astype(np.float64), other.astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else None


def _measured(
    example: Example,
    heard: tuple[str | None, str | None],
    waves: tuple[Wave, Wave, Wave],
    embed: Embed | None,
) -> Spoken:
    spoken, bound, real = waves
    of = [None] * 3 if embed is None else [embed(*wave) for wave in waves]

    def far(wave: Wave) -> float:
        return distortion(wave[0], resample(real[0], real[1], wave[1]), wave[1])

    return Spoken(
        id=example.id,
        task=example.task,
        reference=example.text if example.text and example.text.strip() else None,
        heard=heard[0],
        heard_bound=heard[1],
        distortion=far(spoken),
        distortion_bound=far(bound),
        similarity=cosine(of[0], of[2]),
        similarity_bound=cosine(of[1], of[2]),
    )


def _sample(one: Spoken, waves: tuple[Wave, Wave, Wave], settings: Evaluate) -> samples.Sample:
    def wer(heard: str | None) -> float | None:
        if one.reference is None or heard is None:
            return None
        return error_rates([one.reference], [heard], settings.normalize, settings.spelling)["wer"]

    spoken, bound, _ = waves
    files = samples.flac(*spoken), samples.flac(*bound)
    return samples.Sample(one, *files, wer(one.heard), wer(one.heard_bound))


def _remarks(lost: list[str], unheard: int) -> Iterator[str]:
    """What a reader of the figures has to know of them."""
    if lost:
        yield (
            f"{len(lost)} examples of data.eval could not be spoken, or held against their clip, "
            f"and are in no figure of speech; the first: {lost[0]}"
        )
    if unheard:
        yield (
            f"{KEY}: {unheard} of what was spoken, and of real clips, could not be transcribed, "
            "and count as nothing heard"
        )
