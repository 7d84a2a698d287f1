"""How a spoken dialog is answered: USDM's three steps.

What was said is written down, up to a newline; the answer is written, up to `<|correspond|>`; its
units are written, up to what ends them. Each step is asked with what those before it wrote, as it
was learnt (`data.scripts`), and has the tokens of its own kind alone. The likeliest token is taken
each time. Who speaks the units, is another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raysft.data import scripts
from raysft.data.example import ASSISTANT, Example, Turn
from raysft.data.example import Sequence as Encoded
from raysft.data.text import Template, unit_pattern
from raysft.errors import BadExample, UserError
from raysft.families.causal_lm.encode import CausalLMEncoder
from raysft.models.generation import Within
from raysft.transcribe.model import Answering

MOST_TEXT = 512  # tokens of a text


@dataclass
class Reply:
    """heard: what was said. said: the answer. error: why there is none."""

    heard: str = ""
    said: str = ""
    units: tuple[int, ...] = ()
    error: BadExample | None = None


class Replies:
    """Answers turns of speech."""

    def __init__(
        self,
        answering: Answering,
        prompt: Callable[[Answering, Example], Encoded | BadExample],
    ) -> None:
        """prompt: what a model is asked of an example. Raises UserError where the model is none
        that learns dialogs."""
        encoder = answering.encoder
        if not isinstance(encoder, CausalLMEncoder) or not isinstance(encoder.template, Template):
            raise UserError(
                f"{answering.name}: task {scripts.DIALOG} is answered by a language model of units "
                "(model.family: causal_lm)"
            )
        self._answering, self._prompt = answering, prompt
        tools = encoder.template.tools()
        self._units = unit_pattern(answering.config.model.unit_token)
        self.steps = steps(tools, encoder, answering.speech_model.net.config.get_text_config())

    def __call__(self, asked: Sequence[Example], most_units: int) -> list[Reply]:
        """The reply to each of `asked`, whose first turn is the user's: units, or a clip."""
        found = [Reply() for _ in asked]
        users = [_units_alone(example) for example in asked]
        heard, said, units = self.steps

        def turns(number: int) -> tuple[Turn, Turn]:
            reply = found[number]
            user = replace(users[number], content=(*users[number].content, reply.heard))
            return user, Turn(ASSISTANT, (reply.said,))

        for number, text in self._written(asked, found, lambda n: (users[n],), MOST_TEXT, heard):
            found[number].heard = text.strip()
        for number, text in self._written(asked, found, lambda n: turns(n)[:1], MOST_TEXT, said):
            found[number].said = text.strip()
        for number, text in self._written(asked, found, turns, most_units, units):
            found[number].units = tuple(int(one) for one in self._units.findall(text))
        return found

    def _written(
        self,
        asked: Sequence[Example],
        found: Sequence[Reply],
        turns: Callable[[int], tuple[Turn, ...]],
        most: int,
        within: Within,
    ) -> list[tuple[int, str]]:
        """What is written in one step, of those that have gone well so far."""
        prompts: dict[int, Encoded] = {}
        for number, example in enumerate(asked):
            if found[number].error is not None:
                continue
            prompt = self._prompt(self._answering, replace(example, turns=turns(number)))
            if isinstance(prompt, BadExample):
                found[number].error = prompt
            else:
                prompts[number] = prompt
        texts = self._answering.generate(list(prompts.values()), most, within)
        return list(zip(prompts, texts, strict=True))


def steps(
    tools: scripts.Tools, encoder: CausalLMEncoder, config: object
) -> tuple[Within, Within, Within]:
    """What each step is written within. config: of the language model, which may have more rows
    than there are tokens."""
    ends_text, correspond, ends_units = scripts.dialog_stops(tools)
    units = encoder.unit_tokens
    tokenizer, end = encoder.tokenizer, encoder.end_id
    markers = {tools.token(name) for name in ("<|continue|>", scripts.CORRESPOND)} - {None}
    pad = {tokenizer.pad_token_id} - {None, end}
    rows = max(len(tokenizer), int(getattr(config, "vocab_size", 0)))
    beyond = {*range(len(tokenizer), rows), *pad}
    no_text = tuple(sorted({*units, *beyond} - {end}))
    return (
        Within((ends_text, end), tuple(sorted({*no_text, *(m for m in markers if m is not None)}))),
        Within((correspond, end), no_text),
        Within((ends_units,), tuple(sorted({*range(rows)} - {*units, ends_units}))),
    )


def _units_alone(example: Example) -> Turn:
    """The user's turn as it is heard."""
    user = next((turn for turn in example.turns if turn.role == "user"), Turn("user", ()))
    return replace(user, content=tuple(part for part in user.content if not isinstance(part, str)))
