"""`model.moe.modality` for one model: which kind each token id is of, and its experts.

Made on the driver, where what does not go together is refused, and in every worker; kept in the
model's config (`CONFIG`), so that a folder that was exported says how its tokens are routed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from raysft.config import schema
from raysft.config.modality import GROUPS, KEY, Group, Span, read_groups, said, spans_of
from raysft.data.encode import Encoder
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.models import balance
from raysft.models.routers import Scoring, routers, scoring_of, settings_of, try_out

CONFIG = "raysft_moe_modality"
"""The key of config.json that holds it."""


@dataclass(frozen=True)
class Kind:
    """A kind of token. ids: spans of its ids; experts: that it may go to, in ascending order;
    top_k: of them for each token."""

    name: str
    ids: tuple[Span, ...]
    experts: tuple[int, ...]
    top_k: int


@dataclass(frozen=True)
class Plan:
    """Which tokens go to which experts, and how their weights are made.

    several: each kind has a router of its own. renormalize: None: as the router does.
    """

    kinds: tuple[Kind, ...]
    softmax: Literal["group", "all"] = "group"
    renormalize: bool | None = None
    several: bool = False

    def table(self, size: int) -> np.ndarray:
        """The number of its kind for each token id, int8 [size]; -1: of none."""
        found = np.full(size, -1, np.int8)
        for number, kind in enumerate(self.kinds):
            for first, last in kind.ids:
                found[first : last + 1] = number
        return found

    def to_json(self) -> JsonObject:
        """For a model's config.json."""
        groups = [  # a list: configs are written with their keys in alphabetical order
            {
                "name": kind.name,
                "ids": [list(span) for span in kind.ids],
                "experts": [list(span) for span in spans_of(kind.experts)],
                "top_k": kind.top_k,
            }
            for kind in self.kinds
        ]
        start = "one_router" if self.several else None
        rest = {"softmax": self.softmax, "renormalize": self.renormalize, "from": start}
        return {"groups": groups, **rest}

    @classmethod
    def from_json(cls, found: JsonObject) -> Plan:
        """The inverse of `to_json`."""
        kinds = [
            Kind(
                group["name"],
                tuple((first, last) for first, last in group["ids"]),
                tuple(i for first, last in group["experts"] for i in range(first, last + 1)),
                group["top_k"],
            )
            for group in found["groups"]
        ]
        several = found["from"] is not None
        return cls(tuple(kinds), found["softmax"], found["renormalize"], several)


def kept_plan(config: PreTrainedConfig) -> Plan | None:
    """The plan that a checkpoint's config.json holds."""
    found = getattr(config, CONFIG, None)
    return None if found is None else Plan.from_json(found)


def read_plan(folder: str) -> Plan | None:
    """The plan in the folder of an exported adapter, whose base knows of none."""
    path = Path(folder) / f"{CONFIG}.json"
    if not path.is_file():
        return None
    return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))


def plan_of(model: schema.Model, net: PreTrainedModel, encoder: Encoder) -> Plan | None:
    """What `model` asks for of `net`, or what its checkpoint was trained with; None: neither.

    net: its weights are not looked at. Raises UserError, with the key, for what this model cannot
    have, and where the keys contradict the checkpoint's.
    """
    kept, moe = kept_plan(net.config), model.moe
    asked = moe.modality if moe is not None else None
    weighed = moe is not None and (moe.balance or moe.z_loss)
    if asked is None and kept is None and not weighed:
        return None
    scoring, every, top_k = _standard(net)
    if balance.asked(net):
        raise UserError(
            "model: its config asks for a balance loss over all experts (output_router_logits: "
            f"true), which does not go with {KEY}, model.moe.balance or model.moe.z_loss; set "
            "model.config.output_router_logits: false (with model.path: in its config.json)"
        )
    if asked is None:
        if kept is not None:
            _cover(kept, net, encoder)
        return kept
    groups, wrong = read_groups(asked)
    if wrong:  # refused with the config; not where a program makes one
        raise UserError(wrong[0].text)
    size = size_of(net, encoder)
    audio = _audio_token(net, encoder)
    kinds = tuple(_kind(group, groups, net, audio, size, every, top_k) for group in groups)
    plan = Plan(kinds, asked.softmax, asked.renormalize, asked.several)
    _check_experts(plan, net, every, scoring)
    if kept is not None:
        _check_kept(plan, kept, size)
    _cover(plan, net, encoder)
    return plan


def size_of(net: PreTrainedModel, encoder: Encoder) -> int:
    """Token ids there are, once the model has a row for each token of the tokenizer."""
    return max(len(encoder.tokenizer), vocabulary(net))


def _standard(net: PreTrainedModel) -> tuple[Scoring, int, int]:
    """How the routers score, how many experts there are, and how many a token goes to."""
    found = list(routers(net).values())
    kind = net.config.model_type
    if not found:
        raise UserError(f"model.moe: {kind} has no experts; leave it out")
    scoring = scoring_of(found[0])
    each = {(module.num_experts, module.top_k, scoring_of(module)) for module in found[1:]}
    every, top_k = found[0].num_experts, found[0].top_k
    if scoring is None or each - {(every, top_k, scoring)}:
        raise UserError(
            f"{KEY}: the routers of {kind} ({type(found[0]).__name__}) are none of those that give "
            "each token k experts by a softmax or by sigmoids; use another model"
        )
    return scoring, every, top_k  # type: ignore[return-value]


def _kind(
    group: Group,
    groups: list[Group],
    net: PreTrainedModel,
    audio: int | None,
    size: int,
    every: int,
    top_k: int,
) -> Kind:
    """A group with its ids, of a vocabulary of `size`. audio: as `_audio_token`."""
    if any(other.ids == "audio" for other in groups) and audio is None:
        own = next(other for other in groups if other.ids == "audio")
        raise UserError(
            f"{own.key}.ids: audio, but {net.config.model_type} hears nothing: name the ids of its "
            "audio tokens, such as 100002-100503"
        )
    if group.ids == "audio":
        assert audio is not None
        ids: tuple[Span, ...] = ((audio, audio),)
    elif group.ids == "rest":
        others = [_ids(other, audio) for other in groups if other.ids != "rest"]
        taken = {i for spans in others for first, last in spans for i in range(first, last + 1)}
        ids = tuple(spans_of(i for i in range(size) if i not in taken))
    else:
        ids = group.ids
    if all(first >= size for first, _ in ids):
        raise UserError(f"{group.key}.ids: {said(ids)}: the model has {size} tokens")
    experts = tuple(range(every)) if group.experts is None else tuple(sorted(group.experts))
    if experts[-1] >= every:
        raise UserError(
            f"{group.key}.experts: {said(spans_of(i for i in experts if i >= every))}: the model "
            f"has {every} experts, 0-{every - 1}"
        )
    k = top_k if group.top_k is None else group.top_k
    if k > top_k:
        raise UserError(f"{group.key}.top_k: {k}, but a token of this model has {top_k} experts")
    if k > len(experts):
        raise UserError(
            f"{group.key}.experts: {len(experts)}, fewer than the {k} that a token goes to; name "
            f"more, or set {group.key}.top_k: {len(experts)}"
        )
    return Kind(group.name, ids, experts, k)


def _ids(group: Group, audio: int | None) -> Sequence[Span]:
    if group.ids == "audio":
        return [] if audio is None else [(audio, audio)]
    assert not isinstance(group.ids, str)
    return group.ids


def _audio_token(net: PreTrainedModel, encoder: Encoder) -> int | None:
    """The id at the positions of clips, of a model that hears."""
    config = net.config
    if encoder.audio_id is not None:
        return encoder.audio_id
    parts = (config, getattr(config, "audio_config", None))
    found = (getattr(part, "audio_token_id", None) for part in parts)
    return next((token for token in found if token is not None), None)


def _check_experts(plan: Plan, net: PreTrainedModel, every: int, scoring: Scoring) -> None:
    """Refuse what the routers cannot do."""
    unused = set(range(every)).difference(*(kind.experts for kind in plan.kinds))
    if unused:
        raise UserError(
            f"{GROUPS}: experts {said(spans_of(sorted(unused)))} are in no group, so no token "
            "would reach them; put each of them into one"
        )
    if plan.softmax == "all" and scoring.scores == "sigmoid":
        raise UserError(
            f"{KEY}.softmax: all, but the router of {net.config.model_type} scores each expert for "
            "itself (sigmoid): leave it out"
        )
    if plan.softmax == "all" and plan.several:
        raise UserError(
            f"{KEY}.softmax: all, but with from: one_router the scores of a kind are of its own "
            "router: leave it out"
        )
    router = next(iter(routers(net).values()))
    for kind in plan.kinds:
        try:
            try_out(router, kind.experts, settings_of(router, kind.experts, kind.top_k))
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{GROUPS}.{kind.name}.experts: {reason}") from error


def _check_kept(plan: Plan, kept: Plan, size: int) -> None:
    """Refuse keys that contradict those that the checkpoint was trained with. More ids than it had
    do not: its vocabulary may have grown."""
    was, now = kept.table(size), plan.table(size)
    moved = np.flatnonzero((was >= 0) & (was != now))
    ours, theirs = plan.to_json(), kept.to_json()
    for name in ours:
        one, other = ours[name], theirs[name]
        if name == "groups":
            one, other = ([(k.name, k.experts, k.top_k) for k in p.kinds] for p in (plan, kept))
        if one != other:
            raise UserError(
                f"{KEY}.{name}: contradicts the checkpoint, which was trained with "
                f"{theirs[name]} (config.json: {CONFIG}); leave {KEY} out to go on as it was"
            )
    if len(moved):
        raise UserError(
            f"{GROUPS}: ids {said(spans_of(moved.tolist()))} were of another kind when the "
            f"checkpoint was trained (config.json: {CONFIG}); leave {KEY} out to go on as it was"
        )


def _cover(plan: Plan, net: PreTrainedModel, encoder: Encoder) -> None:
    """Refuse a plan without a kind for tokens that every example has."""
    tokenizer = encoder.tokenizer
    table = plan.table(size_of(net, encoder))
    needed = {"the end of an answer": [encoder.end_id], "a unit": list(encoder.new_ids)}
    audio = _audio_token(net, encoder)
    needed["audio"] = [] if audio is None else [audio]
    own = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    needed["a special token"] = [token for token in own if token is not None]
    for what, ids in needed.items():
        lacking = [i for i in ids if table[i] < 0]
        if lacking:
            token = tokenizer.convert_ids_to_tokens(lacking[0])
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise UserError(
                f"{GROUPS}: id {lacking[0]} ({token}){more}, {what}, is in no group; add it to the "
                "ids of one, or give one ids: rest"
            )


def vocabulary(net: PreTrainedModel) -> int:
    """How many token ids a net has a row for."""
    size: int = net.config.get_text_config().vocab_size  # peft may stand before its embeddings
    return size


def remember(net: PreTrainedModel, plan: Plan) -> None:
    """Keep `plan` in the config that `net` is saved with, and its tokens without a kind out of what
    it generates: they would have no experts to go to."""
    setattr(net.config, CONFIG, plan.to_json())
    lacking = np.flatnonzero(plan.table(vocabulary(net)) < 0).tolist()
    if lacking and net.can_generate():
        own = net.generation_config.suppress_tokens or []
        net.generation_config.suppress_tokens = sorted({*own, *lacking})
