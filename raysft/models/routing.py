"""Routers that know kinds of tokens, and what they have been seen to do.

`attach` puts a `Router` in place of a router's forward: transformers' own, once for the experts of
each kind (see `routers.restricted`), of which a token takes that of its kind. Nothing else of the
model is touched; without kinds the router's own forward runs, and is only watched.

A token's kind is no argument of transformers' forward. It lies in `Routing` from the start of a
forward pass to the start of the next, so a layer that is recomputed in the backward pass finds the
kinds of its own pass as long as that comes before another forward pass. What is counted, and the
losses of the routers, are taken while the forward pass runs and not when it is recomputed.

Cost: the rows of a router's weight are multiplied once, as ever; the choice is made once a kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raysft.data.example import MicroBatch
from raysft.errors import UserError
from raysft.models import several_gates
from raysft.models.layout import Batch
from raysft.models.modality import CONFIG, Plan, kept_plan, read_plan, remember, vocabulary
from raysft.models.router_losses import Weights, losses_of
from raysft.models.routers import Routed, Scoring, restricted, routers, scoring_of, settings_of


@dataclass
class Seen:
    """What routers did since it was last taken: sums over tokens of each kind, by layer.

    chosen [layers, kinds, experts]: tokens that went to an expert; tokens [layers, kinds];
    entropy [layers, kinds]: of a token's shares over the experts of its kind, in nats.
    """

    chosen: torch.Tensor
    tokens: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def zeros(cls, layers: int, kinds: int, experts: int) -> Seen:
        """Nothing yet."""
        shape = (layers, kinds)
        return cls(
            *(torch.zeros(s, dtype=torch.float64) for s in ((*shape, experts), shape, shape))
        )

    def to(self, device: torch.device) -> Seen:
        """On another device."""
        return Seen(*(x.to(device) for x in (self.chosen, self.tokens, self.entropy)))


class Routing:
    """The routers of one model, the tokens they are given, and what they did with them.

    names: of the routers, in order. kinds: names of the kinds; one, "", where there is no plan.
    weights: of the routers' losses in training.
    """

    def __init__(self, net: PreTrainedModel, plan: Plan | None, weights: Weights | None) -> None:
        found = routers(net)
        self.plan, self.weights = plan, weights
        self.names = list(found)
        self.kinds = [""] if plan is None else [kind.name for kind in plan.kinds]
        first = next(iter(found.values()))
        self.experts: int = first.num_experts  # type: ignore[assignment]
        self.seen = Seen.zeros(len(found), len(self.kinds), self.experts)
        every = [range(self.experts)] if plan is None else [kind.experts for kind in plan.kinds]
        self.sizes = [len(experts) for experts in every]
        self.losses: list[torch.Tensor] = []  # of this pass: sums of each router
        self.sequences: torch.Tensor | None = None  # int [T]: the number of a token's sequence
        self.rows = 0  # how many sequences there are
        size = vocabulary(net)
        self._numbers = np.zeros(0, np.int8) if plan is None else plan.table(size)
        self._table = torch.from_numpy(self._numbers)
        self._tokens: torch.Tensor | None = None  # int8 [T]: kinds, see `begin`
        self._open = self.training = False

    def __deepcopy__(self, memo: dict[int, object]) -> Routing:
        """Copies of a router (peft makes some) have the tokens of the model they are in."""
        return self

    # -- batches ---------------------------------------------------------------------------------

    def kinds_of(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of the kinds of token ids, int8; -1: of none."""
        return np.zeros(ids.shape, np.int8) if self.plan is None else self._numbers[ids]

    def laid_out(self, ids: np.ndarray, counted: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Kinds int8 of rows of ids [R, L]; -1 - kind where nothing is counted.

        counted: first flat position and length of each document that counts. Raises ValueError for
        a token of none in one of these.
        """
        kinds = self.kinds_of(ids).flatten()
        flat = -1 - kinds.clip(0)  # padding goes where it would go, and is not looked at
        for offset, length in counted:
            flat[offset : offset + length] = own = kinds[offset : offset + length]
            if (own < 0).any():
                wrong = ids.flatten()[offset : offset + length][own < 0][0]
                raise ValueError(f"token {wrong} is in no group of model.moe.modality")
        return torch.from_numpy(flat.reshape(ids.shape))

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """What the losses of the routers are divided by, of a micro-batch."""
        if self.weights is None:
            return {}
        kinds = self.kinds_of(mb.input_ids)
        found = {f"kind/{kind}": float((kinds == i).sum()) for i, kind in enumerate(self.kinds)}
        return found | {"sequences": float(len(mb.lengths))}

    # -- a forward pass --------------------------------------------------------------------------

    def begin(
        self, kinds: torch.Tensor, training: bool = False, ends: torch.Tensor | None = None
    ) -> None:
        """A forward pass begins. kinds: int8 [R, L], -1 - kind where nothing is counted.

        training: count, and take losses. ends: of the documents of a packed row, from 0 on; else a
        row is a sequence.
        """
        self._tokens = kinds.flatten()
        self._open, self.training, self.losses = True, training, []
        if training and self.seen.chosen.device != kinds.device:
            self.seen = self.seen.to(kinds.device)
        if training and self.weights is not None and self.weights.over == "sequence":
            lengths = [kinds.shape[1]] * len(kinds) if ends is None else ends.diff().tolist()
            self.rows = len(lengths)
            each = torch.arange(self.rows).repeat_interleave(torch.tensor(lengths))
            self.sequences = each.to(kinds.device)

    def end(self) -> None:
        """The forward pass is over: what comes now is recomputed."""
        self._open = False

    @property
    def begun(self) -> bool:
        """Whether a forward pass is under way."""
        return self._open

    def tokens(self, count: int, device: torch.device) -> torch.Tensor:
        """Kinds of the tokens that a router is given, int64 [count]; -1 - kind: not counted."""
        found = self._tokens
        if found is not None and len(found) == count:
            return found.to(device).long()
        if self.plan is None:  # positions in front (prompt tuning) count as all others do
            return torch.zeros(count, dtype=torch.int64, device=device)
        raise ValueError(
            f"modality routing: {count} positions, but kinds of "
            f"{0 if found is None else len(found)}: give the model input_ids, of every position"
        )

    def counted(self) -> torch.Tensor:
        """Tokens of each kind in this pass, float32 [kinds]."""
        assert self._tokens is not None
        return self._of_kind(self._tokens).sum(0)

    def sequences_counted(self) -> torch.Tensor:
        """How many sequences of this pass have a token that counts, float32 []."""
        assert self._tokens is not None and self.sequences is not None
        real = (self._tokens >= 0).float()
        found = torch.zeros(self.rows, device=real.device).scatter_add_(0, self.sequences, real)
        return (found > 0).sum().float()

    def _of_kind(self, kinds: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(len(self.kinds), device=kinds.device)
        return (kinds.unsqueeze(1) == numbers).float()

    @torch.compiler.disable  # which would leave out what a recomputed pass has no use for
    def watch(
        self,
        number: int,
        scoring: Scoring,
        found: Routed,
        kinds: torch.Tensor,
        mass: torch.Tensor | None,
    ) -> None:
        """Count what router `number` did with tokens of `kinds`, and take its losses.

        mass [T, 1]: what the shares of a kind's experts are of those of all; None: all there is.
        """
        logits, _, ids = found
        of_kind = self._of_kind(kinds)
        chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, ids, 1.0)
        shares = shares_of(logits, scoring)
        if self.weights is not None:
            scores = shares if mass is None else shares * mass
            terms = losses_of(self, logits.float(), scores, chosen, of_kind)
            if self._open:
                self.losses.append(terms)
        if self._open:
            with torch.no_grad():
                entropy = torch.special.entr(shares.detach()).sum(1)
                self.seen.chosen[number] += of_kind.T @ chosen
                self.seen.tokens[number] += of_kind.sum(0)
                self.seen.entropy[number] += of_kind.T @ entropy

    # -- other forward passes than those in training ---------------------------------------------

    def before(self, net: PreTrainedModel, args: tuple[torch.Tensor, ...], kwargs: Batch) -> None:
        """What is called without `begin` (generation, an exported model): kinds by input_ids."""
        if self._open:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("modality routing: kinds of tokens are told from input_ids; give them")
        if self._table.device != ids.device:
            self._table = self._table.to(ids.device)
        kinds = self._table[ids]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kinds = kinds.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
        if bool((kinds < 0).any()):
            wrong = int(ids[kinds < 0][0])
            raise ValueError(f"modality routing: token {wrong} is of no kind (raysft_moe_modality)")
        self.begin(kinds)

    @contextmanager
    def told(self, net: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
        """Of what is given embeddings, for the length of a `with` block: the tokens that they stand
        for. ids: [R, L]. mask: [R, all so far]."""
        if self.plan is None:
            yield
            return
        self.before(net, (), {"input_ids": ids, "attention_mask": mask})
        try:
            yield
        finally:
            self.after()

    def after(self, *_: object) -> None:
        """See `before`."""
        self.end()


class Router:
    """A router's forward: by kinds of tokens, where there are several; watched in any case."""

    def __init__(self, router: nn.Module, number: int, routing: Routing, scoring: Scoring) -> None:
        self.router, self.number, self.routing, self.scoring = router, number, routing, scoring
        self.parts = []
        plan = routing.plan
        for kind in plan.kinds if plan is not None else ():
            settings = settings_of(router, kind.experts, kind.top_k)
            self.parts.append((kind, _rows(kind.experts), settings))

    def __call__(self, hidden: torch.Tensor) -> Routed:
        """Hidden states [..., hidden] -> logits [T, experts] (of experts of other kinds the lowest
        number there is), weights and ids [T, k]. Slots beyond a kind's own k have weight 0 and
        ids of experts that the token goes to anyway."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        watched = self.routing.training and self.router.training
        if not watched and not self.parts:
            return type(self.router).forward(self.router, hidden)
        kinds, mass = self.routing.tokens(len(hidden), hidden.device), None
        if self.parts:
            found, mass = self._by_kind(
                hidden, torch.where(kinds < 0, -1 - kinds, kinds).unsqueeze(1)
            )
        else:
            found = type(self.router).forward(self.router, hidden)
        if watched:
            self.routing.watch(self.number, self.scoring, found, kinds, mass)
        return found

    def _by_kind(
        self, hidden: torch.Tensor, kinds: torch.Tensor
    ) -> tuple[Routed, torch.Tensor | None]:
        own = several_gates.of(self.router)
        parts = []
        for number, (kind, rows, settings) in enumerate(self.parts):
            weight = own[kind.name] if own is not None and number else None
            parts.append(restricted(self.router, rows, settings, hidden, weight))
        plan, k = self.routing.plan, self.router.top_k
        assert plan is not None and isinstance(k, int)
        total = None
        if plan.softmax == "all":
            every = torch.cat([logits.float() for logits, _, _ in parts], 1)
            total = every.logsumexp(1, keepdim=True)
        result: list[torch.Tensor] = []
        for number, ((kind, rows, _), (logits, weights, ids)) in enumerate(zip(self.parts, parts)):
            weights = self._weights(logits, weights, ids, total, plan.renormalize)
            columns = _at(rows, logits.device)
            lowest = torch.finfo(logits.dtype).min
            wide = logits.new_full((len(hidden), self.routing.experts), lowest)
            found = [wide.index_copy(1, columns, logits), weights, columns[ids]]
            if total is not None:
                found.append((logits.float().logsumexp(1, keepdim=True) - total).exp())
            if kind.top_k < k:
                more = torch.arange(k - kind.top_k, device=ids.device) % kind.top_k
                found[1] = F.pad(weights, (0, k - kind.top_k))
                found[2] = torch.cat([found[2], found[2][:, more]], 1)
            here = kinds == number
            result = [torch.where(here, a, b) for a, b in zip(found, result or found)]
        logits, weights, ids, *mass = result
        return (logits, weights, ids), next(iter(mass), None)

    def _weights(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        total: torch.Tensor | None,
        renormalize: bool | None,
    ) -> torch.Tensor:
        """The weights as the plan has them; those of the router, where it has them so."""
        scoring = self.scoring
        normalised = scoring.normalised if renormalize is None else renormalize
        if normalised == scoring.normalised and (normalised or total is None):
            return weights
        chosen = logits.float().gather(1, ids)
        if scoring.scores == "sigmoid":
            scores = chosen.sigmoid()
        else:
            if total is None:
                total = logits.float().logsumexp(1, keepdim=True)
            scores = (chosen - total).exp()
        if normalised:
            scores = scores / (scores.sum(1, keepdim=True) + 1e-20)
        return (scores * scoring.scale).to(weights.dtype)


def shares_of(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """A token's scores as shares of those of the experts it may go to, float32 [T, experts]."""
    if scoring.scores == "softmax":
        return logits.float().softmax(1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(1, keepdim=True).clamp(min=1e-20)


def _rows(experts: Sequence[int]) -> slice | torch.Tensor:
    """A view where the experts follow each other."""
    if experts[-1] - experts[0] == len(experts) - 1:
        return slice(experts[0], experts[-1] + 1)
    return torch.tensor(experts)


def _at(rows: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=device)
    return rows.to(device)


def attach(
    net: PreTrainedModel, plan: Plan | None, weights: Weights | None = None
) -> Routing | None:
    """Route the tokens of `net` by `plan`, in every forward pass from here on; watch its routers.

    Returns None where it has no routers that are known: there is nothing to route or watch then.
    """
    found = routers(net)
    scorings = [scoring_of(router) for router in found.values()]
    if not found or None in scorings or len({r.num_experts for r in found.values()}) > 1:
        return None
    routing = Routing(net, plan, weights)
    for number, (router, scoring) in enumerate(zip(found.values(), scorings, strict=True)):
        assert scoring is not None
        if plan is not None and plan.several:
            several_gates.add(router, [kind.name for kind in plan.kinds[1:]])
        router.forward = Router(router, number, routing, scoring)
    if plan is not None:
        remember(net, plan)
        net.register_forward_pre_hook(routing.before, with_kwargs=True)
        net.register_forward_hook(routing.after, always_call=True)
    return routing


def restore(net: nn.Module, folder: str | None = None) -> None:
    """Route the tokens of a model that was loaded as it was trained; see
    `raysft.modality_routing`."""
    parts = [part for part in net.modules() if isinstance(part, PreTrainedModel)]
    plan = next((kept for part in parts if (kept := kept_plan(part.config)) is not None), None)
    if plan is None and folder is not None:
        plan = read_plan(folder)
    if plan is None:
        raise UserError(
            f"modality_routing: {type(net).__name__} was trained without model.moe.modality: "
            f"neither its config.json has {CONFIG}, nor has a folder that was named {CONFIG}.json"
        )
    own = next((p for p in parts if kept_plan(p.config) is not None), parts[0] if parts else None)
    if own is None or not routers(own):
        raise UserError(f"modality_routing: {type(net).__name__} has no experts")
    if any(isinstance(r.__dict__.get("forward"), Router) for r in routers(own).values()):
        return
    copies = plan.several and several_gates.copied(own)
    if copies and folder is None:
        raise UserError(
            "modality_routing: the adapter has routers of its own, in its folder; give that too: "
            "raysft.modality_routing(net, folder)"
        )
    attach(own, plan)
    if plan.several:
        # The outermost knows where it was loaded from; a part's config, from where it once was.
        places = [folder, *(part.config._name_or_path for part in parts if not copies)]
        if not any(places):
            raise UserError(
                "modality_routing: the model does not say where it was loaded from, where its "
                "routers lie; give the folder: raysft.modality_routing(net, folder)"
            )
        several_gates.load(own, [place for place in places if place], {})
