"""A tiny Voxtral: its tekken.json, and what mistral-common makes of dialogues with it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.base import Tokenized
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import VoxtralProcessor, WhisperFeatureExtractor

SPECIALS = {
    **dict(enumerate(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))),
    **dict(enumerate(("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"), 5)),
    **dict(enumerate(("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>"), 8)),
    **dict(enumerate(("[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"), 12)),
    **dict(enumerate(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"), 17)),
    **{24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[TRANSCRIBE]"},
}
RESERVED = 40
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tekken(folder: Path, version: str = "v7") -> None:
    """All bytes and a few words; chunks of 2 s for 16 mels, else as the hub's."""
    words = [bytes([byte]) for byte in range(256)] + [b"it", b" i", b" is", b"Say", b"\n\n"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    named = {rank: SPECIALS.get(rank, f"<SPECIAL_{rank}>") for rank in range(RESERVED)}
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + RESERVED,
            "default_num_special_tokens": RESERVED,
            "version": version,
        },
        "vocab": vocabulary,
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in named.items()
        ],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 2.0,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def wav(wave: np.ndarray) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, wave, 16000, format="WAV", subtype="FLOAT")
    return held.getvalue()


def dialogue(folder: Path, messages: list[dict[str, Any]], waves: list[np.ndarray]) -> Tokenized:
    """What mistral-common makes of a dialogue: as `VoxtralProcessor.apply_chat_template` asks it.

    Audio parts of the messages are `waves`, in order.
    """
    rest = iter(waves)
    given = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {
                    "type": "input_audio",
                    "input_audio": {
                        "data": base64.b64encode(wav(next(rest))).decode(),
                        "format": "wav",
                    },
                }
                if part["type"] == "audio"
                else part
                for part in content
            ]
        given.append({**message, "content": content})
    whole = messages[-1]["role"] == "assistant"
    mode = ValidationMode.finetuning if whole else ValidationMode.test
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json", mode=mode)
    return tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(messages=given))


def request(folder: Path, wave: np.ndarray, language: str | None) -> Tokenized:
    """As `VoxtralProcessor.apply_transcription_request` asks it: with a clip of 16 bits."""
    held = io.BytesIO(wav(wave))
    asked = {"model": "tiny", "file": held, "language": language}
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json")
    return tokenizer.instruct_tokenizer.encode_transcription(
        TranscriptionRequest.from_openai(asked)
    )


def features(folder: Path, found: Tokenized) -> torch.Tensor:
    """The model's input of its clips, by transformers' processor."""
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    processor = VoxtralProcessor.__new__(VoxtralProcessor)
    processor.feature_extractor = extractor
    return processor._retrieve_input_features(
        [audio.audio_array for audio in found.audios],
        extractor.nb_max_frames,
        sampling_rate=16000,
        padding=True,
        truncation=False,
        pad_to_multiple_of=extractor.n_samples,
        return_tensors="pt",
    )


def inputs(
    folder: Path, messages: list[dict[str, Any]], waves: list[np.ndarray]
) -> dict[str, torch.Tensor]:
    """What the model is given for a dialogue."""
    found = dialogue(folder, messages, waves)
    made = {"input_ids": torch.tensor([found.tokens])}
    return made | ({"input_features": features(folder, found)} if waves else {})
