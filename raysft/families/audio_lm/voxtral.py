"""Voxtral: its processor without mistral-common, its chat template, its requests to transcribe.

transformers hands the dialogues of a Voxtral to mistral-common, which makes ids of them by code,
not by a template. Here the same ids come of a template in jinja (`CHAT`) and of the fast tokenizer
that transformers makes of tekken.json: they are rendered, measured and kept as those of all models.
Rules of mistral-common's `InstructTokenizerV7`, which V11 shares: a system message stands at the
head, and in no dialogue that has a clip; turns take turns; spaces that end an answer are taken off.

    <s>[INST][BEGIN_AUDIO][AUDIO]...the question[/INST]the answer</s>
    <s>[INST][BEGIN_AUDIO][AUDIO]...[/INST]lang:de[TRANSCRIBE]the transcript</s>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import transformers

from raysft.config.schema import Data
from raysft.data.example import Audio, Example
from raysft.data.segments import Rendered, Segment
from raysft.data.text import Template
from raysft.data.tokenizer import template_of
from raysft.errors import BadExample

FRAMES_PER_TOKEN = 8  # a convolution of stride 2, four positions merged into one
CHAT = """\
{%- set said = namespace(last='assistant', clip=false) -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}{%- set said.clip = true -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('Voxtral takes a system message at the head alone') -}}
{%- elif said.clip -%}
{{- raise_exception('Voxtral takes no system message where there are clips') -}}
{%- endif -%}
{{- '[SYSTEM_PROMPT]' -}}
{%- elif message['role'] in ('user', 'assistant') and message['role'] != said.last -%}
{%- set said.last = message['role'] -%}
{%- if said.last == 'user' -%}{{- '[INST]' -}}{%- endif -%}
{%- else -%}
{{- raise_exception('Voxtral takes turns of user and assistant, the user first') -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'].rstrip(' ') if message['role'] == 'assistant' else message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}{{- '[BEGIN_AUDIO][AUDIO]' -}}
{%- else -%}
{%- if not loop.first and loop.previtem['type'] == 'text' -%}{{- '\\n\\n' -}}{%- endif -%}
{{- part['text'].rstrip(' ') if message['role'] == 'assistant' and loop.last else part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}{{- '[/SYSTEM_PROMPT]' -}}
{%- elif message['role'] == 'user' -%}{{- '[/INST]' -}}
{%- else -%}{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
TASKS = ("asr", "s2t", "transcribe")  # that are requests to transcribe where nothing is asked
_UNSET = Data().prompts
_CODE = re.compile("[a-z]{2}")
_REQUEST = ("<s>", "[INST]", "[BEGIN_AUDIO]"), ("[/INST]",), ("[TRANSCRIBE]",)


class VoxtralProcessor(transformers.VoxtralProcessor):
    """transformers' processor, asked for a clip at a time as the others are."""

    def _process_audio(
        self, audio: list[np.ndarray], **kwargs: object
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Features [rows, mels, frames] of the clips, and the audio tokens of each."""
        rows = self.feature_extractor.nb_max_frames
        made = [
            self._retrieve_input_features(
                [clip],
                rows,
                sampling_rate=self.feature_extractor.sampling_rate,
                padding=True,
                truncation=False,
                pad_to_multiple_of=self.feature_extractor.n_samples,
                return_tensors="pt",
            ).numpy()
            for clip in audio
        ]
        texts = [self.audio_token * (len(one) * rows // FRAMES_PER_TOKEN) for one in made]
        return {"input_features": np.concatenate(made)}, texts


class VoxtralTemplate(Template):
    """Dialogues, and requests to transcribe: a clip of one of TASKS with no instruction of its own,
    where data.prompts is as raysft has it, or empty, for the task. Of these transcript and end are
    learnt. An answer never says its language: the request does."""

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        data: Data,
        reserved: list[str],
        *,
        hole: str,
        markup: str,
        own: str | None,
        kept: str | None,
    ) -> None:
        """As Template has it, with CHAT where the model has no chat template."""
        if own is None and kept is None and data.template != "plain":
            own = template_of(tokenizer) or CHAT
        super().__init__(tokenizer, data, reserved, hole=hole, markup=markup, own=own, kept=kept)

    def render(self, example: Example) -> Rendered:
        """As Template has it. Raises BadExample for a language that is no code of two letters."""
        if not self._requests(example):
            return super().render(replace(example, lang=None))
        text = "".join(part for part in example.output if isinstance(part, str))
        self._check_text(text)
        answer = np.array([*self._encode(text), self.end_id], np.int32)
        prompt = self._request(example)
        return Rendered([*prompt, answer], [False] * len(prompt) + [True])

    def prompt(self, example: Example) -> list[Segment]:
        """As Template has it."""
        return self._request(example) if self._requests(example) else super().prompt(example)

    def _requests(self, example: Example) -> bool:
        return (
            self.chat
            and not example.turns
            and example.task in TASKS
            and example.instruction is None
            and self._prompts.get(example.task, "") in ("", *_UNSET.values())
            and all(isinstance(part, str) for part in example.output)
            and [type(part) for part in example.input if part != ""] == [Audio]
        )

    def _request(self, example: Example) -> list[Segment]:
        if example.lang and not _CODE.fullmatch(example.lang):
            raise BadExample(
                f"its language is {example.lang!r}, and Voxtral is told a code of two letters",
                "unknown language",
            )
        told = self._encode(f"lang:{example.lang}") if example.lang else []
        before, after, last = (self.tokenizer.convert_tokens_to_ids(list(n)) for n in _REQUEST)
        clip = next(part for part in example.input if isinstance(part, Audio))
        return [np.array(before, np.int32), clip, np.array([*after, *told, *last], np.int32)]

    def _check_text(self, text: str) -> None:
        if match := self._control.search(text):
            raise BadExample(
                f"its text contains {match[0]}, a token that steers the model", "bad text"
            )
