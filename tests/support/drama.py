"""Records of judged speech, as Speech-DRAME's files have them, and a corpus of a few clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import soundfile

from tests.conftest import tone

FIELDS = (
    *("pitch_variation", "rhythmic_naturalness", "stress_and_emphasis", "emotion_accuracy"),
    *("emotion_intensity_control", "dynamic_range", "voice_identity_matching"),
    *("trait_embodiment", "local_story_fit", "global_story_coherence"),
)
LABELS = (
    *("PitchDynamics", "RhythmicNaturalness", "StressEmphasis", "EmotionAccuracy"),
    *("EmotionIntensity", "EmotionalDynamicRange", "VoiceIdentityMatching", "TraitEmbodiment"),
    *("LocalSceneFit", "GlobalStoryFit"),
)
TOLD = "Global Profile: A baker of a small town., Local Scene: A bill., Available Traits: Calm, Dry"


def role(number: int = 0, **ratings: Any) -> dict[str, Any]:
    """A line of ROLE, three raters; ratings: of fields, others than [4, 4, 2]."""
    return {
        "id": f"r{number}",
        "dataset_name": "ROLE",
        "wav_path": f"wav/{number}.wav",
        "local_scene": "A bill.",
        "char_age": "Adult",
        "char_style": "Calm, Dry",
        "char_profile": "A baker of a small town.",
        "transcript": "The kettle is boiling.",
        "annotations": {
            **{field: [4, 4, 2] for field in FIELDS},
            **ratings,
            "annotator_confidence_rating": [3, 3, 3],
            "comments": ["", "fine", ""],
            "multi-speaker_influence": [False, False, True],
        },
    }


def arche(number: int = 0, **ratings: Any) -> dict[str, Any]:
    """A line of Arche."""
    given = {"content_pass": [True, True, False], "audio_quality": [4, None, 5]}
    given |= {"human_likeness": [3, 3, 3], "appropriateness": [1, 2, 3]}
    return {
        "id": f"a{number}",
        "dataset_name": "Arche",
        "wav_path": f"wav/{number}.wav",
        "question": "You are a nurse. You say:",
        "annotations": {**given, **ratings, "confidence": [1, 1, 1]},
    }


def avqa(number: int = 0, **more: Any) -> dict[str, Any]:
    """A line of AVQA, which has no id."""
    return {
        "dataset_name": "AVQA",
        "audio_path": f"wav/{number}.wav",
        "question_text": "What is heard in the video?",
        "multi_choice": ["rain", "a voice"],
        "answer": 1,
        **more,
    }


def written(folder: Path, *records: dict[str, Any], name: str = "drama.jsonl") -> Path:
    """A file of them, and clips 0 to 7 beside it."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    for number in range(8):
        path = folder / "wav" / f"{number}.wav"
        if not path.exists():
            soundfile.write(path, tone(0.3, 16000, 200 + 20 * number), 16000)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(folder: Path, each: int = 3, fields: tuple[str, ...] = LABELS) -> Path:
    """A file of wordings."""
    texts = [
        {"id": f"{name}-{n}", "dimension_name": name, "prompt_text": f"Wording {n}: rate {name}."}
        for name in fields
        for n in range(each)
    ]
    path = folder / "prompts.json"
    path.write_text(json.dumps({"metadata": {}, "variations": {"dimension_prompts": texts}}))
    return path
