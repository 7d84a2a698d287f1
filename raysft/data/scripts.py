"""Examples that are told by a script of a published system, not by a chat template alone.

Stands beside `text.Template.render`; `Example.script` says which:

    dialog   USDM's spoken dialog. Capitals are learnt:
             BOS head NEWLINE NEWLINE ### User NEWLINE units <|correspond|> USER TEXT NEWLINE
             ### Agent NEWLINE AGENT TEXT <|CORRESPOND|> UNITS newline END
    clone    Step-Audio-EditX's: a system message with a voice (its name, what it says, the tokens
             of that), the user's text, and as the answer the tokens of it in that voice
    edit     Step-Audio-EditX's: what to do and the tokens to do it to, and the tokens it becomes

Clone and edit are conversations of the model's chat template (`data.template: step` has Step's).
A dialog is tokenized piece by piece, so that what is learnt is known by its place; each piece has
the ids that it has behind those before it, so that the whole is tokenized as its text would be. Of
the newline behind the agent's units the first token is learnt: inference stops there.

Of a dialog that is not whole yet (a turn without text, no turn of the agent) all there is is asked:
so go the three steps of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from raysft.data.example import ASSISTANT, Audio, Example, Part, Turn, Units
from raysft.data.segments import Rendered, cut
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIALOG, CLONE, EDIT = "dialog", "clone", "edit"
CORRESPOND = "<|correspond|>"

ASKS = {
    DIALOG: "Below is a conversation between the user and the agent. Each turn includes the user's "
    "speech and its corresponding transcript, along with the agent's response text and the "
    "corresponding speech.",
    CLONE: "Generate audio with the following timbre, prosody and speaking style\n\n"
    "[speaker_start]\nspeaker name: {speaker}\nspeaker prompt text: \n{text}\n"
    "speaker audio tokens: \n{tokens}\n[speaker_end]\n",
    EDIT: "You edit speech. You are told what to change and given audio tokens; answer with the "
    "tokens of the same speech, changed as told and otherwise as it was.\n",
}
"""What a script says before its example, where `data.prompts` has nothing by its name."""

_PLACES = re.compile(r"\{(speaker|text|tokens)\}")
_STEP = ("<|BOT|>", "<|EOT|>")


def step_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Step-Audio's form as a chat template. Raises UserError where the tokenizer lacks its
    tokens."""
    known = tokenizer.get_vocab()
    if lacking := [name for name in _STEP if name not in known]:
        raise UserError(
            f"data.template: step, but the tokenizer has no {' and no '.join(lacking)}: add "
            f"model.extra_tokens: [{', '.join(lacking)}], or use the tokenizer's own template"
        )
    begin, (opens, ends) = tokenizer.bos_token or "", _STEP
    return (
        f"{{{{- {begin!a} -}}}}"
        "{%- for message in messages -%}"
        "{%- set role = 'human' if message['role'] == 'user' else message['role'] -%}"
        f"{{{{- {opens!a} + role + '\\n' + message['content'] + {ends!a} -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {opens + 'assistant'!a} + '\\n' -}}}}"
        "{%- endif -%}"
    )


@dataclass(frozen=True)
class Tools:
    """What a template lends: its tokenizer, and what no text may hold.

    encode: text -> ids. rest: (ids before, ids of the whole, text) -> ids of the text behind them,
    where the whole does not begin with those before. token: name -> id, None where there is none.
    control: names no text may hold. steers: those of ids that steer the model. hole: name and id of
    the token that stands for a row of units. ends: ids that a text begins (None: with none) and
    ends with.
    """

    encode: Callable[[str], list[int]]
    rest: Callable[[list[int], list[int], str], list[int]]
    token: Callable[[str], int | None]
    control: re.Pattern[str]
    steers: Callable[[list[int]], list[int]]
    hole: tuple[str, int]
    ends: tuple[int | None, int]


@dataclass
class _Row:
    """The ids of pieces, one after the other."""

    tools: Tools
    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    others: list[Audio | Units] = field(default_factory=list)
    _text: str = ""  # since the last token that is no text, its name included
    _of_text: list[int] = field(default_factory=list)

    def token(self, name: str, token: int, learnt: bool = False) -> None:
        """A token that no text becomes."""
        self.ids.append(token)
        self.learnt.append(learnt)
        self._text, self._of_text = name, [token]

    def part(self, part: Audio | Units, learnt: bool = False) -> None:
        """Units, or a clip that becomes units."""
        self.others.append(part)
        self.token(*self.tools.hole, learnt=learnt)

    def text(self, text: str, learnt: bool = False) -> list[int]:
        """A text; returns its ids."""
        if not text:
            return []
        whole = self.tools.encode(self._text + text)
        before = self._of_text
        ids = whole[len(before) :]
        if whole[: len(before)] != before:
            ids = self.tools.rest(before, whole, text)
        ids = ids or self.tools.encode(text)  # a token that takes in what is beside it
        if steering := self.tools.steers(ids):
            raise BadExample(
                f"its text becomes the token {steering[0]}, which steers the model", "bad text"
            )
        self.ids += ids
        self.learnt += [learnt] * len(ids)
        self._text += text
        self._of_text = [*before, *ids]
        return ids


def dialog(example: Example, tools: Tools, prompts: Mapping[str, str]) -> Rendered:
    """The sequence of a dialog, as far as there is one. Raises BadExample for a turn that is
    empty or holds what steers the model, UserError where `<|correspond|>` is no token."""
    row = _Row(tools)
    correspond = tools.token(CORRESPOND)
    if correspond is None:
        raise UserError(
            f"model.extra_tokens: the tokenizer has no token {CORRESPOND}, which task {DIALOG} "
            f"needs: add <|continue|> and {CORRESPOND}"
        )
    if tools.ends[0] is not None:
        row.token("", tools.ends[0])
    row.text(f"{prompts.get(DIALOG, ASKS[DIALOG])}\n\n### User\n")
    user = _of_role(example, "user")
    units, text = _pair(user, "user")
    if units is None:
        raise BadExample("the user's turn has no units and no clip", "malformed record")
    row.part(units)
    row.token(CORRESPOND, correspond)
    if text is None:
        return _cut(row)
    row.text(_said(text, "user", tools), True)
    row.text("\n", True)
    row.text("### Agent\n")
    agent = _of_role(example, ASSISTANT)
    units, text = _pair(agent, "agent")
    if text is None:
        return _cut(row)
    row.text(_said(text, "agent", tools), True)
    row.token(CORRESPOND, correspond, True)
    if units is None:
        return _cut(row)
    row.part(units, True)
    closing = row.text("\n")
    row.learnt[len(row.learnt) - len(closing)] = True
    row.token("", tools.ends[1], True)
    return _cut(row)


def dialog_stops(tools: Tools) -> tuple[int, int, int]:
    """The tokens that end the user's text, the agent's text, and the agent's units: what inference
    stops on, each as a dialog is trained with it."""
    row = _Row(tools)
    row.text("a")
    ends_text = row.text("\n")[-1]
    row.part(Units((0,)))
    ends_units = row.text("\n")[0]
    return ends_text, tools.token(CORRESPOND) or 0, ends_units


def asked(example: Example, tools: Tools, prompts: Mapping[str, str]) -> Rendered:
    """What is given before the first that is learnt; of a dialog that is not whole, all there
    is."""
    found = dialog(example, tools, prompts)
    if len(example.turns) < 2 or not _whole(example):
        return Rendered(found.segments, [False] * len(found.segments))
    first = found.learnt.index(True)
    return Rendered(found.segments[:first], found.learnt[:first])


def conversation(example: Example, prompts: Mapping[str, str]) -> Example:
    """The conversation of a clone or an edit. Raises BadExample for one without text or tokens,
    UserError for a prompt without the places that it needs."""
    told = prompts.get(example.script, ASKS[example.script])
    system, user = _of_role(example, "system"), _of_role(example, "user")
    answer = next((turn for turn in example.turns if turn.role == ASSISTANT), None)
    last = () if answer is None else (answer,)
    if example.script == EDIT:
        units, text = _pair(user, "user")
        if units is None or not (text or "").strip():
            raise BadExample("has nothing to be changed, or no instruction", "malformed record")
        given: tuple[Part, ...] = (f"{(text or '').strip()}\n", units)
        turns = (Turn("system", (told,)), Turn("user", given), *last)
        return replace(example, script="", turns=turns)
    if "{tokens}" not in told:
        raise UserError(
            f"data.prompts.{CLONE}: has no place {{tokens}} for the tokens of the voice; it may "
            "have {speaker} and {text} too"
        )
    units, text = _pair(system, "prompt")
    if units is None:
        raise BadExample("has no tokens and no clip of the voice", "malformed record")
    spoken = "".join(part for part in user.content if isinstance(part, str)).strip()
    if not spoken or not (text or "").strip():
        raise BadExample("has an empty text", "malformed record")
    known = {"speaker": example.speaker or "", "text": (text or "").strip()}
    parts: list[Part] = []
    for number, piece in enumerate(_PLACES.split(told)):
        found: Part = piece
        if number % 2:
            found = units if piece == "tokens" else known[piece]
        if isinstance(found, str) and parts and isinstance(parts[-1], str):
            parts[-1] += found
        else:
            parts.append(found)
    turns = (Turn("system", tuple(parts)), Turn("user", (spoken,)), *last)
    return replace(example, script="", turns=turns)


def _of_role(example: Example, role: str) -> Turn:
    return next((turn for turn in example.turns if turn.role == role), Turn(role, ()))


def _pair(turn: Turn, whose: str) -> tuple[Audio | Units | None, str | None]:
    """Its units (or clip) and its text, each None where there is none."""
    units = [part for part in turn.content if not isinstance(part, str)]
    texts = turn.texts
    if len(units) > 1 or len(texts) > 1:
        raise BadExample(f"the {whose}'s turn has several texts or clips", "malformed record")
    return (units[0] if units else None), (texts[0] if texts else None)


def _whole(example: Example) -> bool:
    agent = _of_role(example, ASSISTANT)
    return None not in (*_pair(_of_role(example, "user"), "user"), *_pair(agent, "agent"))


def _said(text: str, whose: str, tools: Tools) -> str:
    """A transcript as USDM has it: lower case. The user's, which a newline ends, in one line."""
    if match := tools.control.search(text):
        raise BadExample(
            f"the {whose}'s text contains {match[0]}, a token that steers the model", "bad text"
        )
    found = text.strip().lower()
    if whose == "user":
        found = " ".join(filter(None, map(str.strip, found.splitlines())))
    if not found:
        raise BadExample(f"the {whose}'s text is empty", "malformed record")
    return found


def _cut(row: _Row) -> Rendered:
    return cut(row.ids, np.array(row.learnt, bool), row.others, row.tools.hole[1])
