"""The sequences of Ming-UniAudio: what patch_lm is asked, hears, writes and speaks.

Stands where other families have a chat template. Each piece is tokenized for itself. What is told
apart is what an example has, whatever its task is called:

    speaks a text      HUMAN ask NEWLINE text ASSISTANT <audio> PATCHES
    writes what it     HUMAN ask <audio> patches </audio> ASSISTANT LANG TAB TEXT END
    hears
    speaks it anew     HUMAN <audio> patches </audio> <prompt> ask NEWLINE </prompt>
                       ASSISTANT <answer> TEXT <gen_audio> PATCHES
    the same, without  HUMAN <audio> patches </audio> <prompt> ask NEWLINE </prompt>
    its transcript     ASSISTANT <gen_audio> PATCHES
    goes on speaking   HUMAN ask NEWLINE text of the clip, text ASSISTANT <audio> patches PATCHES
    in a clip's voice  (asked alone, never learnt)

Capitals are learnt, but for HUMAN and ASSISTANT, which are roles between <role> and </role>
(`model.patches.roles`).

Costs 40 us an example.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raysft.data.example import Audio, Example
from raysft.data.scripts import CLONE
from raysft.data.segments import Rendered, Segment
from raysft.data.tokenizer import HoldsTokenizer
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

ROLE, ROLE_END = "<role>", "</role>"
AUDIO, AUDIO_END, PATCH = "<audio>", "</audio>", "<audioPatch>"
PROMPT, PROMPT_END = "<prompt>", "</prompt>"
ANSWER, SPEAK = "<answer>", "<gen_audio>"
MARKERS = (ROLE, ROLE_END, AUDIO, AUDIO_END, PATCH, PROMPT, PROMPT_END, ANSWER, SPEAK)

ASKS = {
    "asr": "Please recognize the language of this speech and transcribe it. Format: oral.",
    "tts": "Please translate the text to speech.",
}
"""What Ming-UniAudio is asked, by task."""


class MingPrompt(HoldsTokenizer):
    """Makes examples the sequences above. See `raysft.data.encode.base.Renders`."""

    remark = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompts: dict[str, str],
        roles: Sequence[str] = ("HUMAN", "ASSISTANT"),
        kept: str | None = None,
    ) -> None:
        """tokenizer: with all of MARKERS. prompts: by task, `data.prompts`. roles: who asks, and
        who answers. kept: `source` of a run that has begun. Raises UserError where the run began
        with other prompts."""
        self._human, self._assistant = (f"{ROLE}{role}{ROLE_END}" for role in roles)
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._prompts = prompts
        self.end_id = int(tokenizer.eos_token_id)
        special = {*MARKERS, *tokenizer.all_special_tokens} - {tokenizer.unk_token}
        named = sorted(filter(None, special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, named)))
        self._ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in MARKERS}
        for task, text in prompts.items():
            if match := self._control.search(text):
                raise UserError(
                    f"data.prompts.{task}: contains {match[0]}, a token that steers the model: "
                    "give the instruction alone"
                )
        told = json.dumps([roles, prompts], sort_keys=True, ensure_ascii=False)
        self.source = f"{{# patch_lm: {told} #}}"
        if kept not in (None, self.source):
            raise UserError(
                f"data.prompts: the run began with {kept}, and would go on with {self.source}; "
                "start a new run for that (run.name)"
            )
        content = self._backend.to_str() + json.dumps([self.source, self.end_id])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def id_of(self, marker: str) -> int:
        """The id of one of MARKERS."""
        return self._ids[marker]

    def render(self, example: Example) -> Rendered:
        """What is given and what is learnt. Raises BadExample, or UserError where no example of
        its kind can be used."""
        given, learnt = self._cut(example)
        return Rendered([*given, *learnt], [False] * len(given) + [True] * len(learnt))

    def prompt(self, example: Example) -> list[Segment]:
        """What is given. Raises as `render` does."""
        if example.script == CLONE:
            return self._goes_on(example)
        return self._cut(example)[0]

    def speaking(self, example: Example) -> list[Segment]:
        """What stands before the clip that is spoken: what is given, and what is written before.
        Raises as `render` does."""
        if example.script == CLONE:
            return self._goes_on(example)
        given, learnt = self._cut(example)
        return [*given, *learnt[:-1]]

    def answer_of(self, generated: str) -> str:
        """What is generated, as it is."""
        return generated

    def _cut(self, example: Example) -> tuple[list[Segment], list[Segment]]:
        heard, spoken = _clips(example)
        if heard is None:
            return self._speaks(example, spoken)
        if spoken is None:
            return self._writes(example, heard)
        return self._edits(example, heard, spoken)

    def _speaks(
        self, example: Example, spoken: Audio | None
    ) -> tuple[list[Segment], list[Segment]]:
        if spoken is None:
            raise UserError(
                f"model.family: patch_lm hears or speaks, and example {example.id} does neither: "
                "use model.family: causal_lm for texts"
            )
        ask, text = self._ask(example), self._text(_texts(example.input))
        asked = f"{ask}\n{text}" if ask else text
        return [self._pieces(self._human, asked, self._assistant, AUDIO)], [spoken]

    def _goes_on(self, example: Example) -> list[Segment]:
        """A clip with its text, as the beginning of what is said."""
        shown, user = example.turns[0].content, example.turns[1].content
        clip = next((part for part in shown if isinstance(part, Audio)), None)
        text, more = _texts(shown).strip(), _texts(user).strip()
        if clip is None or not text or not more:
            raise BadExample("has no clip of the voice, or an empty text", "malformed record")
        ask, both = self._ask(example), self._text(f"{text} {more}")
        asked = f"{ask}\n{both}" if ask else both
        return [self._pieces(self._human, asked, self._assistant, AUDIO), clip]

    def _writes(self, example: Example, heard: Audio) -> tuple[list[Segment], list[Segment]]:
        text = self._text(_texts(example.output))
        if not text:
            raise BadExample("has nothing to be written: its text is empty", "malformed record")
        answer = f"{self._text(example.lang)}\t{text}" if example.lang else text
        before = self._pieces(self._human + self._ask(example), AUDIO)
        between = self._pieces(AUDIO_END, self._assistant)
        learnt = np.array([*self._encode(answer), self.end_id], np.int32)
        return [before, heard, between], [learnt]

    def _edits(
        self, example: Example, heard: Audio, spoken: Audio
    ) -> tuple[list[Segment], list[Segment]]:
        asked = example.instruction or _texts(example.input) or self._ask(example)
        request = f"{PROMPT}{self._text(asked)}\n{PROMPT_END}"
        before = self._pieces(self._human, AUDIO)
        transcript = self._text(_texts(example.output))
        if not transcript:
            between = self._pieces(AUDIO_END, request, self._assistant, SPEAK)
            return [before, heard, between], [spoken]
        between = self._pieces(AUDIO_END, request, self._assistant, ANSWER)
        written = np.array([*self._encode(transcript), self._ids[SPEAK]], np.int32)
        return [before, heard, between], [written, spoken]

    def _ask(self, example: Example) -> str:
        if example.instruction is not None:
            return self._text(example.instruction)
        if example.task not in self._prompts:
            raise UserError(
                f"data.prompts: has no entry for task {example.task!r}, and example {example.id} "
                f"brings no instruction: add {example.task}: TEXT to data.prompts"
            )
        return self._prompts[example.task]

    def _text(self, text: str) -> str:
        if match := self._control.search(text):
            raise BadExample(
                f"its text contains {match[0]}, a token that steers the model", "bad text"
            )
        return text

    def _pieces(self, *pieces: str) -> np.ndarray:
        return np.array([token for piece in pieces for token in self._encode(piece)], np.int32)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # `tokenizers` raises nothing more special
            raise BadExample(f"its text cannot be tokenized: {error}", "bad text") from error


def _clips(example: Example) -> tuple[Audio | None, Audio | None]:
    """What is heard, and what is spoken. Raises as `MingPrompt.render`."""
    if example.turns or example.document or example.tokens is not None or example.woven is not None:
        raise UserError(
            "model.family: patch_lm takes examples of a clip and a text, no conversations and no "
            "documents: use model.family: audio_lm or causal_lm for those"
        )
    found: list[Audio | None] = []
    for parts in (example.input, example.output):
        others = [part for part in parts if not isinstance(part, str)]
        if any(not isinstance(part, Audio) for part in others):
            raise UserError(
                "model.family: patch_lm hears and speaks clips, no units: sources of units need "
                "model.family: causal_lm"
            )
        if len(others) > 1:
            raise BadExample(f"has {len(others)} clips where one is taken", "not one clip")
        found.append(next((part for part in others if isinstance(part, Audio)), None))
    return found[0], found[1]


def _texts(parts: tuple[object, ...]) -> str:
    return "".join(part for part in parts if isinstance(part, str))
