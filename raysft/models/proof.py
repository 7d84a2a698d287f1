"""The proof at the start: what a model does with documents in batches, told from a small copy.

A batch is exact if it is worth its documents alone, as transformers computes each of them in a
fresh process. `prove` asks a small copy of the model (see `copies`) for documents on both sides of
every length in its config, in two batches in turn, so that what is carried from one to the next
shows too:

    causal    no position depends on a later one
    padded    rows padded on the right
    packed    one row of documents with restarting positions
    answers   generation from rows padded on the left; else of one length; else one at a time

It says what is exact and why the rest is not; `check` refuses what the config asks for and cannot
have. The verdict depends on the config alone, so it is the same in every worker, and is kept for
the process. Costs about half a second the first time.

Rounding makes differences of 1e-6 and, where layers are many or sums long, 1e-5 of the largest
logit; one position that sees what it should not makes 1e-2 and more. A difference is believed when
two sets of random weights show it: choosing experts is a comparison, which rounding may decide.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from raysft.data.encode.verdict import Batched, Verdict
from raysft.errors import UserError
from raysft.models import copies, decoders, rope
from raysft.models.attention import attachable, document_mask, inexact, refusal
from raysft.models.layout import Document, pack, pad
from raysft.models.loading import line_of

log = logging.getLogger(__name__)

LIMIT = 1e-3  # of the largest logit
# On both sides of 8 (windows, chunks) and of 16 (the length before positions are stretched).
BATCHES = ((21, 3, 9, 40), (14, 5, 17))
PROMPTS = (5, 14, 20)
SHORT = (3, 5, 4)  # with ANSWER[1] more they stay within any window
ANSWER = (4, 3)
FAILURES = (
    *(TypeError, NotImplementedError, RuntimeError, ValueError, IndexError, KeyError),
    *(AttributeError, AssertionError, ZeroDivisionError, ImportError),
)


_KNOWN: dict[str, Verdict] = {}


def prove(net: PreTrainedModel) -> Verdict:
    """The verdict on models like `net`, whose weights do not matter."""
    key = f"{type(net)} {json.dumps(net.config.to_dict(), sort_keys=True, default=str)}"
    if key not in _KNOWN:
        verdict = decoders.prove(net) if net.config.is_encoder_decoder else _prove(net, 0)
        if verdict.differs:
            verdict = _better(verdict, _prove(net, 1))
        _KNOWN[key] = verdict
    return _KNOWN[key]


def refuse_early(net: PreTrainedModel, mode: Literal["packed", "padded"]) -> None:
    """Raises UserError where the config of `net` alone tells that it cannot be trained exactly."""
    if (reason := _out_of_reach(net.config)) is not None:
        raise _refused(text_type(net), reason)
    if mode == "packed" and (reason := refusal(net)) is not None:
        raise inexact(text_type(net), reason)


def check(verdict: Verdict, mode: Literal["packed", "padded"]) -> None:
    """Raises UserError where the model is not causal, or batches of `mode` are not exact."""
    kind = verdict.model_type
    if verdict.copied is not None:
        log.warning(
            "model type %s: batches beyond its windows are not proven exact, for no small copy of "
            "it can be made (%s)",
            kind,
            line_of(ValueError(verdict.copied)),
        )
    if verdict.causal is not None:
        remedy = "; set model.config.is_decoder: true, or use" if verdict.decoder else "; use"
        raise UserError(
            f"model: type {kind} is no causal language model as it is configured: "
            f"{verdict.causal}{remedy} another model"
        )
    if mode == "packed" and verdict.packed is not None and verdict.padded is None:
        raise inexact(kind, verdict.packed)
    if verdict.padded is not None:
        raise _refused(kind, verdict.padded)


def _refused(kind: str, reason: str) -> UserError:
    return UserError(
        f"model: batches are not exact for model type {kind}, packed or padded: {reason}; use "
        "another model"
    )


def _out_of_reach(config: PreTrainedConfig) -> str | None:
    """Why what trains would depend on how long rows are."""
    for rates in (getattr(part, "compress_rates", None) for part in copies.parts(config)):
        if rates:
            most = max(rates.values() if isinstance(rates, dict) else rates)
            return (
                f"parts of it work on {most} tokens at a time, and shorter rows do not reach them"
            )
    return None


def _better(one: Verdict, other: Verdict) -> Verdict:
    """Of two tries with other weights: a reason counts if both have it."""
    order = ("any", "length", "one")
    until = (one.answers_until or 0, other.answers_until or 0)
    return replace(
        one,
        causal=one.causal and other.causal,
        padded=one.padded and other.padded,
        packed=one.packed and other.packed,
        windows=one.windows or other.windows,
        answers=min(one.answers, other.answers, key=order.index),
        answers_until=max(until) or None,
    )


def _prove(net: PreTrainedModel, seed: int) -> Verdict:
    kind = text_type(net)
    try:
        plain = copies.small_copy(net, seed)
    except ValueError as error:
        return Verdict(kind, copied=str(error))
    lab = _Lab(plain)
    known = copies.lengths_of(net.config)
    lengths = {
        name: (known[name], length)
        for name, length in copies.lengths_of(plain.config).items()
        if name in known
    }
    try:
        lab.documents_alone()
    except FAILURES as error:
        return Verdict(kind, causal=f"it fails on text alone ({line_of(error)})", lengths=lengths)
    if causal := lab.causal():
        decoder = getattr(net.config, "is_decoder", None) is False
        return Verdict(kind, causal=causal, decoder=decoder, lengths=lengths)
    rope.attach(lab.net)
    positions, padded = True, lab.batches(lab.padded)
    if padded is not None and lab.batches(lab.unnumbered) is None:
        positions, padded = False, None
    padded = _out_of_reach(net.config) or padded
    packed, windows = lab.packed_or_windows()
    answers, short = lab.answers(positions)
    least = min((length for length, _ in lengths.values()), default=None)
    return Verdict(
        kind,
        differs=not lab.differences.isdisjoint({padded, packed}),
        padded=padded,
        packed=packed,
        windows=windows,
        answers=answers,
        answers_until=least if short else None,
        positions=positions,
        learned=lab.learned(net.config),
        lengths=lengths,
    )


class _Lab:
    """A small copy, what it says of documents alone, and what it says of them together."""

    def __init__(self, plain: PreTrainedModel) -> None:
        """plain: as transformers made it; the other one is given our parts."""
        self.plain, self.net = plain, copies.twin(plain)
        rng = np.random.default_rng(0)
        special = _specials(plain)
        size = plain.get_input_embeddings().weight.shape[0]
        tokens = np.array([i for i in range(size) if i not in special])
        self.pad_id = next((i for i in sorted(special) if i < size), 0)
        self.batch_ids = [[rng.choice(tokens, n) for n in batch] for batch in BATCHES]
        self.prompt_ids = [[rng.choice(tokens, n) for n in batch] for batch in (PROMPTS, SHORT)]
        self.same_ids = [rng.choice(tokens, PROMPTS[2]) for _ in range(2)]
        self.alone: dict[int, torch.Tensor] = {}
        self.differences: set[str] = set()  # the reasons that were measured

    def documents_alone(self) -> None:
        """The reference: each document by transformers, shorter ones first, for some modules
        remember the longest they have seen."""
        every = [ids for batch in self.batch_ids for ids in batch]
        for ids in sorted(every, key=len):
            self.alone[id(ids)] = _logits(self.plain, input_ids=_row(ids))[0]

    def causal(self) -> str | None:
        """Whether a later token changes what is said before it."""
        ids = self.batch_ids[0][2].copy()
        expected = self.alone[id(self.batch_ids[0][2])][:-1]
        ids[-1] = ids[0] if ids[0] != ids[-1] else ids[1]
        found = _logits(self.plain, input_ids=_row(ids))[0, :-1]
        if _difference(found, expected) < LIMIT:
            return None
        return "every position sees those after it"

    def learned(self, config: PreTrainedConfig) -> int | None:
        """How many positions a model of `config` has, if this one fails beyond its own."""
        table = _table(self.plain.config)
        if table is None or self._runs(table[1] + 1):
            return None
        most = next((n for n in range(table[1], table[1] - 9, -1) if self._runs(n)), None)
        real = dict([_table(config) or table])[table[0]]
        return None if most is None else real - (table[1] - most)

    def _runs(self, length: int) -> bool:
        ids = np.resize(self.batch_ids[0][2], length)
        try:
            _logits(self.plain, input_ids=_row(ids))
        except FAILURES:
            return False
        return True

    def batches(self, lay_out: Callable[[list[np.ndarray]], list[torch.Tensor]]) -> str | None:
        """Both batches in turn, each document against itself alone."""
        for number, batch in enumerate(self.batch_ids):
            try:
                found = lay_out(batch)
            except FAILURES as error:
                return f"a batch fails with: {line_of(error)}"
            for ids, logits in zip(batch, found, strict=True):
                difference = _difference(logits, self.alone[id(ids)])
                if not difference < LIMIT:
                    others = ", ".join(str(len(other)) for other in batch if other is not ids)
                    carried = " after another batch" if number else ""
                    reason = (
                        f"a document of {len(ids)} tokens beside some of {others}{carried} differs "
                        f"by {difference:.1e} from itself alone"
                    )
                    self.differences.add(reason)
                    return reason
        return None

    def padded(self, batch: list[np.ndarray]) -> list[torch.Tensor]:
        """Rows padded on the right, with positions and mask, as training has them."""
        inputs, _ = pad(_documents(batch), self.pad_id, "right")
        logits = _logits(self.net, **inputs)
        return [row[: len(ids)] for row, ids in zip(logits, batch, strict=True)]

    def unnumbered(self, batch: list[np.ndarray]) -> list[torch.Tensor]:
        """The same, with the model's own count of positions."""
        inputs, _ = pad(_documents(batch), self.pad_id, "right")
        del inputs["position_ids"]
        logits = _logits(self.net, **inputs)
        return [row[: len(ids)] for row, ids in zip(logits, batch, strict=True)]

    def packed_or_windows(self) -> tuple[str | None, bool]:
        """Why a packed row is not exact, and whether it needs the config's window to be."""
        reason = attachable(self.net)
        if reason is not None:
            return reason, False
        first = self.batches(lambda batch: self.packed(batch, windows=False))
        if first is None:
            return None, False
        if self.batches(lambda batch: self.packed(batch, windows=True)) is None:
            return None, True
        return first, False

    def packed(self, batch: list[np.ndarray], windows: bool) -> list[torch.Tensor]:
        """One row of documents, attended document by document."""
        inputs, _ = pack(_documents(batch))
        ends = inputs.pop("documents")
        logits = _logits(self.net, **inputs, attention_mask=document_mask(ends, windows=windows))[0]
        return list(logits.split([len(ids) for ids in batch]))

    def answers(self, positions: bool) -> tuple[Batched, bool]:
        """Which prompts may share a batch, and whether short ones may all the same."""
        if self._answers_equal(self.prompt_ids[0], ANSWER[0], positions):
            return "any", False
        short = self._answers_equal(self.prompt_ids[1], ANSWER[1], positions)
        if self._answers_equal(self.same_ids, ANSWER[0], positions):
            return "length", short
        return "one", short

    def _answers_equal(self, prompts: list[np.ndarray], tokens: int, positions: bool) -> bool:
        try:
            together = self._answers(prompts, tokens, positions)
            for ids, found in zip(prompts, together, strict=True):
                (alone,) = self._answers([ids], tokens, positions)
                if not _difference(found, alone) < LIMIT:
                    return False
        except FAILURES:
            return False
        return True

    def _answers(
        self, prompts: list[np.ndarray], tokens: int, positions: bool
    ) -> list[torch.Tensor]:
        """Logits [new tokens, V] of each prompt's answer."""
        inputs, _ = pad(_documents(prompts), self.pad_id, "left")
        if not positions:
            del inputs["position_ids"]
        size = self.net.get_input_embeddings().weight.shape[0]
        self.net.generation_config = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=size - 1,
            pad_token_id=self.pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.no_grad():
            found = self.net.generate(**inputs)
        return list(torch.stack(found.logits, 1).float())


def text_type(net: PreTrainedModel) -> str:
    """The model type of what reads text in `net`."""
    try:
        return net.config.get_text_config().model_type or net.config.model_type
    except ValueError:  # several
        return net.config.model_type


def _table(config: PreTrainedConfig) -> tuple[str, int] | None:
    """Name and length of the table of positions in `config`, if there is one."""
    try:
        own = vars(config.get_text_config())
    except ValueError:
        return None
    return next(((k, own[k]) for k in copies.TABLES if type(own.get(k)) is int), None)


def _documents(batch: list[np.ndarray]) -> list[Document]:
    return [Document(ids, np.full(len(ids), -100), "none") for ids in batch]


def _row(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)


@torch.no_grad()
def _logits(net: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return net(**inputs, use_cache=False).logits.float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; NaN where there is one."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _specials(net: PreTrainedModel) -> set[int]:
    """Tokens that stand for something else: padding, images, audio, ends."""
    found: set[int] = set()
    for part in copies.parts(net.config):
        for key, value in vars(part).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if copies.SPECIAL.search(key):
                found |= {v for v in values if isinstance(v, int) and v >= 0}
    return found
