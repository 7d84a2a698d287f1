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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from raysft.models.modality import Plan, gates
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
        return cls(*(torch.zeros(s, dtype=torch.float64) for s in ((*shape, experts), shape, shape)))

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
        self.losses: list[torch.Tensor] = []  # of this pass, a row of terms a router
        self.sequences: torch.Tensor | None = None
        self.table: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None  # int8 [T]: kind, -1: padding
        self._open = self.training = False

    def __deepcopy__(self, memo: dict[int, object]) -> Routing:
        """Copies of a router (peft makes some) have the tokens of the model they are in."""
        return self

    # -- a forward pass --------------------------------------------------------------------------

    def begin(
        self, kinds: torch.Tensor, training: bool = False, sequences: torch.Tensor | None = None
    ) -> None:
        """A forward pass begins. kinds: int8, of every position, -1 where nothing is counted.

        training: count, and take losses. sequences: int [T], the number of each one's sequence.
        """
        self._tokens = kinds.flatten()
        self._open, self.training, self.losses = True, training, []
        self.sequences = sequences
        if training and self.seen.chosen.device != kinds.device:
            self.seen = self.seen.to(kinds.device)

    def end(self) -> None:
        """The forward pass is over: what comes now is recomputed."""
        self._open = False

    @property
    def begun(self) -> bool:
        """Whether a forward pass is under way."""
        return self._open

    def tokens(self, count: int) -> torch.Tensor:
        """Kinds of the tokens that a router is given, int64 [count]; -1: padding."""
        found = self._tokens
        if found is None or len(found) != count:
            there = "none" if found is None else len(found)
            if self.plan is None:  # kinds change nothing; positions in front count as others do
                return torch.zeros(count, dtype=torch.int64)
            raise ValueError(
                f"modality routing: {count} positions, but kinds of {there}: give the model "
                "input_ids, all of them"
            )
        return found.long()

    def watch(self, number: int, scoring: Scoring, found: Routed, kinds: torch.Tensor) -> None:
        """Count what router `number` did with tokens of `kinds`, and take its losses."""
        if not self.training:
            return
        logits, _, ids = found
        kinds = kinds.to(logits.device)
        of_kind = (kinds.unsqueeze(1) == torch.arange(len(self.kinds), device=logits.device)).float()
        chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, ids, 1.0)
        shares = shares_of(logits, scoring)
        if self.weights is not None:
            terms = losses_of(self, logits.float(), shares, chosen, of_kind)
            if self._open:
                self.losses.append(terms)
        if self._open:
            with torch.no_grad():
                entropy = torch.special.entr(shares.detach()).sum(1)
                self.seen.chosen[number] += of_kind.T @ chosen
                self.seen.tokens[number] += of_kind.sum(0)
                self.seen.entropy[number] += of_kind.T @ entropy

    # -- other forward passes than those in training ------------------------------------------------

    def before(
        self, net: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What is called without `begin` (generation, an exported model): kinds by input_ids."""
        if self._open:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("modality routing: kinds of tokens are told from input_ids; give them")
        assert self.table is not None
        if self.table.device != ids.device:
            self.table = self.table.to(ids.device)
        kinds = self.table[ids.clamp(max=len(self.table) - 1)]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kinds = kinds.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
        if bool((kinds < 0).any()):
            wrong = int(ids[kinds < 0][0])
            raise ValueError(f"modality routing: token {wrong} is of no kind (raysft_moe_modality)")
        self.begin(kinds)

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
        kinds = self.routing.tokens(len(hidden)).to(hidden.device)
        if self.parts:
            found = self._by_kind(hidden, kinds.clamp(min=0).unsqueeze(1))
        else:
            found = type(self.router).forward(self.router, hidden)
        self.routing.watch(self.number, self.scoring, found, kinds)
        return found

    def _by_kind(self, hidden: torch.Tensor, kinds: torch.Tensor) -> Routed:
        own = gates(self.router)
        parts = []
        for number, (kind, rows, settings) in enumerate(self.parts):
            weight = own[kind.name] if own is not None and number else None
            parts.append(restricted(self.router, rows, settings, hidden, weight))
        plan = self.routing.plan
        assert plan is not None
        total = None
        if plan.softmax == "all":
            every = torch.cat([logits.float() for logits, _, _ in parts], 1)
            total = every.logsumexp(1, keepdim=True)
        most = max(kind.top_k for kind in plan.kinds)
        k: int = self.router.top_k  # type: ignore[assignment]
        result: Routed | None = None
        for number, ((kind, rows, _), (logits, weights, ids)) in enumerate(zip(self.parts, parts)):
            weights = self._weights(logits, weights, ids, total, plan.renormalize)
            wide = torch.full(
                (len(hidden), self.routing.experts), torch.finfo(logits.dtype).min
            ).to(logits)
            columns = _at(rows, self.routing.experts, ids.device)
            wide = wide.index_copy(1, columns, logits)
            ids = columns[ids]
            if kind.top_k < k:
                more = torch.arange(k - kind.top_k, device=ids.device) % kind.top_k
                ids = torch.cat([ids, ids[:, more]], 1)
                weights = F.pad(weights, (0, k - kind.top_k))
            found = (wide, weights, ids)
            if result is None:
                result = found
            else:
                here = kinds == number
                result = tuple(torch.where(here, a, b) for a, b in zip(found, result))  # type: ignore
        assert result is not None and most <= k
        return result

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


def _at(rows: slice | torch.Tensor, every: int, device: torch.device) -> torch.Tensor:
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
            more = {kind.name: router.weight.detach().clone() for kind in plan.kinds[1:]}  # type: ignore
            router.by_kind = nn.ParameterDict({n: nn.Parameter(w) for n, w in more.items()})
        router.forward = Router(router, number, routing, scoring)
    if plan is not None:
        size = net.get_input_embeddings().num_embeddings
        routing.table = torch.from_numpy(plan.table(size))
        net.register_forward_pre_hook(routing.before, with_kwargs=True)
        net.register_forward_hook(routing.after, always_call=True)
    return routing
