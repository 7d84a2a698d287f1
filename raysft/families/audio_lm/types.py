"""The model types that are trained through their own processor: a row each.

A processor of transformers turns a clip into tensors and into the text that stands for it
(`_process_audio`). What differs between the types is here: how the tensors lie, how many positions
a clip takes by the number of its samples, how much of it is read at most, and what the encoder
needs so that a clip's embedding depends on that clip alone.

Pure data but for a few functions; imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from raysft.data.example import Audio, Units
from raysft.errors import UserError
from raysft.families.audio_lm import costs
from raysft.families.audio_lm.costs import halved, windowed
from raysft.families.audio_lm.protocols import Config, Processor

if TYPE_CHECKING:
    import numpy as np


def refuse_part(part: Audio | Units, answer: bool) -> None:
    """Raises UserError for what no model of the family reads (units) or writes (speech)."""
    if isinstance(part, Units):
        raise UserError(
            "model.family: audio_lm reads audio, no speech units: sources of units need "
            "model.family: causal_lm"
        )
    if answer:
        raise UserError(
            "model.family: audio_lm answers in text only; task tts needs causal_lm with "
            "data.speech_tokens"
        )


Lengths = Callable[[Processor, int], int]
"""(processor, samples) -> how many."""


@dataclass(frozen=True)
class AudioType:
    """How the clips of one model type are laid out.

    processor: its class, "module:class".
    tokens: audio tokens that a clip of so many samples takes.
    layout: `frames`: one row of features a clip, as long as the clip; batches are padded to the
        longest. `rows`: rows of one length, of which a clip takes as many as it needs.
    features, mask: their names among the model's inputs; mask None: it takes none.
    time: axis of the frames in what the processor gives, [1, mels, frames] or [1, frames, mels].
    multiple: a batch of `frames` is as long as a multiple of it.
    counted: (config, frames of each clip) -> what its mask or `sizes` counts; None: the frames.
    sizes: name of the input that says how many audio tokens each clip has; None: there is none.
    most: (processor) -> samples it reads of a clip at most; None: all.
    tower: path of an encoder whose output depends on how long the rows are that it is given: it is
        called for clips of one length at a time. None: its mask makes it exact.
    window: path of an encoder that reads windows of `2 * n_window` frames and pads each to the
        longest of the batch: it is called for clips shorter than one by length.
    alike: (config, frames of each clip) -> positions that the model makes of each. It pads all
        clips of a batch to the longest: it is called for clips of about one length at a time.
    whole: a checkpoint of this type holds the model below this name, and other models beside it;
        whole_net is the class of transformers that has them all.
    joined: of rows, the features are those of the whole clip, padded to whole chunks, and then
        cut; else those of each chunk for itself.
    silenced: its processor pads a clip with silence to the extractor's chunk, of which the model
        reads the clip's own frames: our log-mel computes those alone.
    bracketed: the plain template writes the processor's begin and end of audio around a clip.
    markup: what the plain template writes for a clip, where it is neither of these.
    template: class of its dialogues, "module:class"; None: `raysft.data.text.Template`.
    interleaved: other text stands between the audio tokens of a clip, of its own for every length;
        its processor wants torch tensors.
    says_language: whether the answer of an asr example begins with its lang.
    package: what transformers needs beside itself to build the model: its name, and the extra of
        raysft that has it.
    stacked: frames of mels beside each other in one of its features, where its extractor does not
        say so itself (num_frames_lfr); 0: those are samples.
    cost: what its encoder computes; None: no formula is right, its runs have no `tflops`.
    """

    processor: str
    tokens: Lengths
    layout: Literal["frames", "rows"] = "frames"
    features: str = "input_features"
    mask: str | None = "input_features_mask"
    time: int = 2
    multiple: int = 1
    counted: Callable[[Config, np.ndarray], np.ndarray] | None = None
    sizes: str | None = None
    most: Callable[[Processor], int] | None = None
    tower: str | None = None
    window: str | None = None
    alike: Callable[[Config, np.ndarray], np.ndarray] | None = None
    whole: str | None = None
    whole_net: str = ""
    joined: bool = False
    silenced: bool = False
    bracketed: bool = False
    markup: str | None = None
    template: str | None = None
    interleaved: bool = False
    says_language: bool = True
    package: tuple[str, str] | None = None
    stacked: int = 1
    cost: costs.EncoderCost | None = None


def _ceil(samples: int, hop: int) -> int:
    return -(-samples // hop)


def _pooled(processor: Processor, samples: int) -> int:
    """Whisper's frames, a convolution and a pooling of stride 2 each (audioflamingo3)."""
    return (halved(_ceil(samples, processor.feature_extractor.hop_length)) - 2) // 2 + 1


def _merged(processor: Processor, samples: int) -> int:
    """Whisper's frames, a convolution of stride 2, four positions merged into one (glmasr)."""
    return (halved(_ceil(samples, processor.feature_extractor.hop_length)) - 4) // 4 + 1


def _qwen3_asr(processor: Processor, samples: int) -> int:
    extractor = processor.feature_extractor
    frames = max(samples, extractor.min_length) // extractor.hop_length
    return windowed(frames, 2 * processor.audio_kwargs["n_window"])


def _qwen3_asr_positions(config: Config, frames: np.ndarray) -> np.ndarray:
    return windowed(frames, 2 * config.audio_config.n_window)


def _qwen3_omni(processor: Processor, samples: int) -> int:
    return windowed(samples // processor.feature_extractor.hop_length, 2 * processor.n_window)


def _granite(processor: Processor, samples: int) -> int:
    return int(processor.audio_processor._get_num_audio_features([samples])[0])


def _granite_windows(config: Config, frames: np.ndarray) -> np.ndarray:
    """Queries that the projector answers, by windows of frames."""
    return -(-frames // config.window_size) * (config.window_size // config.downsample_rate)


def _phi4(processor: Processor, samples: int) -> int:
    extractor = processor.audio_processor
    frames = (samples - extractor.win_length) // extractor.hop_length + 1
    reduced = _ceil(frames * extractor.audio_feat_stride, extractor.audio_compression_rate)
    return _ceil(reduced, extractor.audio_downsample_rate)


def _phi4_sizes(config: Config, frames: np.ndarray) -> np.ndarray:
    audio = config.audio_config
    return -(-frames // audio.time_reduction) // audio.downsample_rate


def _gemma4(processor: Processor, samples: int) -> int:
    """Frames whose whole window is of the clip, behind half a window of silence; two convolutions
    of stride 2."""
    extractor = processor.feature_extractor
    frames = _ceil(samples - extractor.frame_length // 2, extractor.hop_length)
    return _ceil(_ceil(max(0, frames), 2), 2)


def _gemma4_positions(config: Config, frames: np.ndarray) -> np.ndarray:
    return (frames + 3) // 4


def _as_many(config: Config, frames: np.ndarray) -> np.ndarray:
    return frames


def _gemma4_unified(processor: Processor, samples: int) -> int:
    """Frames of samples, of which each makes a position."""
    return _ceil(samples, processor.feature_extractor.audio_samples_per_token)


def _moss(processor: Processor, samples: int) -> int:
    """Whisper's frames of each chunk, a convolution of stride 2, some positions merged into one."""
    extractor, merged = processor.feature_extractor, processor.audio_merge_size
    chunks, rest = divmod(samples, extractor.n_samples)
    whole = _ceil(halved(extractor.nb_max_frames), merged)
    return chunks * whole + (
        _ceil(halved(_ceil(rest, extractor.hop_length)), merged) if rest else 0
    )


def _gemma3n(processor: Processor, samples: int) -> int:
    """As many for every clip; those behind its own hold the embedding of padding."""
    return processor.audio_seq_length


def _fun_asr(processor: Processor, samples: int) -> int:
    """Kaldi's frames, of which each stride makes a position."""
    extractor = processor.feature_extractor
    window, hop = (
        extractor.sampling_rate * milliseconds // 1000
        for milliseconds in (extractor.frame_length, extractor.frame_shift)
    )
    return _ceil(max(0, 1 + (samples - window) // hop), extractor.stride_lfr)


def _voxtral(processor: Processor, samples: int) -> int:
    """Chunks, each whole: a convolution of stride 2, four positions merged into one."""
    extractor = processor.feature_extractor
    return _ceil(samples, extractor.n_samples) * (extractor.nb_max_frames // 8)


def _half_a_minute(processor: Processor) -> int:
    """What its extractor cuts off behind 480,000 samples, whatever the rate."""
    return 480_000


def _chunk_limit(processor: Processor) -> int:
    """Whole chunks within max_audio_len; what is beyond, its processor cuts off."""
    extractor = processor.feature_extractor
    return int(processor.max_audio_len // extractor.chunk_length) * int(extractor.n_samples)


def _one_chunk(processor: Processor) -> int:
    return int(processor.feature_extractor.n_samples)


_QWEN25 = AudioType(
    processor="transformers:Qwen2_5OmniProcessor",
    tokens=_pooled,
    mask="feature_attention_mask",
    most=_one_chunk,
    silenced=True,
    bracketed=True,
    cost=costs.QWEN25,
)
_QWEN3 = AudioType(
    processor="transformers:Qwen3OmniMoeProcessor",
    tokens=_qwen3_omni,
    mask="feature_attention_mask",
    window="model.audio_tower",
    bracketed=True,
    cost=costs.QWEN3,
)
_FLAMINGO = AudioType(
    processor="transformers:AudioFlamingo3Processor",
    tokens=_pooled,
    layout="rows",
    most=_chunk_limit,
    cost=costs.whisper(2),
)

TYPES: dict[str, AudioType] = {
    "qwen3_asr": AudioType(
        processor="transformers:Qwen3ASRProcessor",
        tokens=_qwen3_asr,
        multiple=100,
        alike=_qwen3_asr_positions,
        bracketed=True,
        cost=costs.QWEN3,
    ),
    "qwen2_5_omni": replace(
        _QWEN25, whole="thinker", whole_net="Qwen2_5OmniForConditionalGeneration"
    ),
    "qwen2_5_omni_thinker": _QWEN25,
    "qwen3_omni_moe": replace(
        _QWEN3, whole="thinker", whole_net="Qwen3OmniMoeForConditionalGeneration"
    ),
    "qwen3_omni_moe_thinker": _QWEN3,
    "audioflamingo3": _FLAMINGO,
    "musicflamingo": replace(_FLAMINGO, processor="transformers:MusicFlamingoProcessor"),
    "glmasr": replace(
        _FLAMINGO,
        processor="transformers:GlmAsrProcessor",
        tokens=_merged,
        cost=costs.whisper(4),
    ),
    "granite_speech": AudioType(
        processor="transformers:GraniteSpeechProcessor",
        tokens=_granite,
        time=1,
        counted=_granite_windows,
        tower="model.encoder",
        stacked=2,
        cost=costs.GRANITE,
    ),
    "phi4_multimodal": AudioType(
        processor="transformers:Phi4MultimodalProcessor",
        tokens=_phi4,
        features="audio_input_features",
        mask=None,
        time=1,
        counted=_phi4_sizes,
        sizes="audio_embed_sizes",
        tower="model.embed_tokens_extend.audio_embed.encoder",
    ),
    "gemma4": AudioType(
        processor="transformers:Gemma4Processor",
        tokens=_gemma4,
        time=1,
        alike=_gemma4_positions,
        most=_half_a_minute,
    ),
    "gemma4_unified": AudioType(
        processor="transformers:Gemma4UnifiedProcessor",
        tokens=_gemma4_unified,
        time=1,
        stacked=0,
    ),
    "moss_transcribe_diarize": AudioType(
        processor="transformers:MossTranscribeDiarizeProcessor",
        tokens=_moss,
        layout="rows",
        bracketed=True,
        interleaved=True,
        cost=costs.whisper(None),
    ),
    "gemma3n": AudioType(
        processor="transformers:Gemma3nProcessor",
        tokens=_gemma3n,
        time=1,
        most=_half_a_minute,
        tower="model.audio_tower",
        package=("timm", "gemma3n"),
    ),
    "fun_asr_nano": AudioType(
        processor="transformers:FunAsrNanoProcessor",
        tokens=_fun_asr,
        time=1,
        alike=_as_many,
        cost=costs.FUN_ASR,
    ),
    "voxtral": AudioType(
        processor="raysft.families.audio_lm.voxtral:VoxtralProcessor",
        tokens=_voxtral,
        layout="rows",
        joined=True,
        mask=None,
        markup="[BEGIN_AUDIO][AUDIO]",
        template="raysft.families.audio_lm.voxtral:VoxtralTemplate",
        says_language=False,
        cost=costs.whisper(4),
    ),
}
TYPES["granite_speech_plus"] = TYPES["granite_speech"]

COSTS = {kind: row.cost for kind, row in TYPES.items() if row.cost is not None}
COSTS["qwen2_audio"] = costs.QWEN2
"""What encoders compute, by model type; of others no formula is right."""
