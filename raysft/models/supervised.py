"""The module that a strategy wraps: micro-batch as tensors -> terms of the loss.

Stands in the step. Logits are computed at supervised positions only, and are never all there at a
time. See `base` for what a batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raysft.errors import UserError
from raysft.losses.chunked import (
    Kinds,
    OfTokens,
    TokenLoss,
    chunk_rows,
    chunked_losses,
    head_is_last,
    in_one_call,
    weighted_sum,
)
from raysft.losses.learns import Learns
from raysft.losses.term import CROSS_ENTROPY, Term
from raysft.models import balance, router_losses
from raysft.models.attention import document_mask
from raysft.models.copies import with_weights
from raysft.models.layout import CONTEXT, Batch, as_weights, tokens_of
from raysft.models.routing import Routing

# What of a batch is no input of the model.
_OURS = ("keep", "targets", "tasks", "kinds", "real", CONTEXT)
# Parameter names of `Supervised` (and so of checkpoints) are the plain model's after this prefix.
PREFIX = "lm."
LOGPS = "logps"


class Losses(nn.Module):
    """A model with its losses as `forward`: what DDP and FSDP2 wrap, so that their hooks run.

    tasks: names by task number; `SpeechModel` appends as it meets new ones. weights: of tasks in
    the loss that is trained, 1 where none is given. penalty: gives the term that training adds to
    the loss once a step. windows: see `attention.document_mask`. routing: of a mixture whose
    routers are known.
    """

    def __init__(
        self,
        net: nn.Module,
        tasks: list[str],
        weights: Mapping[str, float] | None = None,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.lm = net
        self.tasks = tasks
        self.weights = {} if weights is None else weights
        self.penalty: Callable[[], torch.Tensor] | None = None
        self.windows = False

    def release(self) -> None:
        """Take from the model what was put into it: another module computes losses from here on."""

    def penalties(self, like: torch.Tensor) -> list[Term]:
        """In training the penalty on the weights. like: a count, for what its tensor is like."""
        if self.penalty is None or not self.training:
            return []
        found = self.penalty()
        once = torch.ones_like(like)
        return [Term("penalty", found.detach(), once, {}, found, None, reported=False)]


class Supervised(Losses):
    """A language model with its losses of tokens.

    more: losses beside the cross-entropy: name, function, weight. learns: what batches whose tokens
    have a context teach. telling: instead of terms a pass gives one, LOGPS, whose sum is [M]: the
    negative log-probability of each supervised token.
    """

    lm: PreTrainedModel

    def __init__(
        self,
        net: PreTrainedModel,
        tasks: list[str],
        weights: Mapping[str, float] | None = None,
        more: Seq[tuple[str, TokenLoss, float]] = (),
        routing: Routing | None = None,
    ) -> None:
        super().__init__(net, tasks, weights, routing)
        self.more = more
        self.learns: Learns | None = None
        self.telling = False
        self.rows: int | None = None  # through the head at a time; None: see `chunk_rows`
        self.balance = balance.coefficient(net)
        self._keep: torch.Tensor | None = None
        self._columns = 0  # of the rows of tokens
        head = net.get_output_embeddings()
        if head is None:
            raise UserError(f"model: {type(net).__name__} has no language-model head to train")
        self._head = (head,)  # in a tuple: a module's attribute would be saved under two names
        self._hook = head.register_forward_pre_hook(self._select)
        self._vocabulary, self._head_is_last = _logits_of(net, head)

    def _select(self, head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Only what predicts a supervised token goes through the head: [R, L, H] -> [1, M, H].

        A hook, because not every model takes `logits_to_keep`, and because whatever a model does
        after its head (scaling, capping) then stays its own. Rows that are longer than their
        tokens have virtual positions in front (prompt tuning).
        """
        keep = self._keep
        if keep is None:
            return None
        if virtual := args[0].shape[1] - self._columns:
            keep = keep + (keep // self._columns + 1) * virtual
        return (args[0].flatten(0, -2).index_select(0, keep).unsqueeze(0),)

    def release(self) -> None:
        """Take the hook from the model's head: another module computes losses from here on."""
        self._hook.remove()

    def forward(self, batch: Batch) -> list[Term]:
        """The terms of `batch`, the cross-entropy first; what is trained has a graph to every
        parameter even when nothing counts.

        Its sum is that of float32 cross-entropies over supervised tokens, in training each times
        its task's weight; by task it never is. Then the other losses of tokens; the balance loss of
        a mixture's routers, of which a micro-batch has its share of supervised tokens; in training
        the penalty on the weights, and what `router_losses` are asked for.
        """
        real = batch.get("real")
        inputs = {k: v for k, v in batch.items() if k not in _OURS}
        if self.routing is not None:
            self.routing.begin(batch["kinds"], self.training, batch.get("documents"))
        if "documents" in inputs:
            ends = inputs.pop("documents")
            device = inputs["input_ids"].device
            inputs["attention_mask"] = document_mask(ends, device, self.windows, real)
        names = list(self.tasks)  # the thread that lays out the next batches may add to them
        weights = None
        if self.weights and self.training:
            by_name = [float(self.weights.get(name, 1.0)) for name in names]
            weights = torch.tensor(by_name or [1.0], device=batch["tasks"].device)[batch["tasks"]]
        if real is not None:  # of the rows of M some count for nothing
            counted = (batch["tasks"] >= 0).float()
            weights = counted if weights is None else weights * counted
        learns = self.learns if CONTEXT in batch else None
        kinds: OfTokens = Kinds(tuple((loss, weight) for _, loss, weight in self.more))
        of_tokens = weights
        if learns is not None:  # bits, so that nothing rounds them on the way
            context = batch[CONTEXT].view(torch.float32)
            kinds, of_tokens = learns, context
            if weights is not None:
                of_tokens = learns.weighted(context, weights)
            if self.telling:  # what the context has is not known yet
                of_tokens = None
        keep, targets = batch["keep"], batch["targets"]
        losses, total, unbalanced = self._losses(inputs, keep, targets, of_tokens, kinds)
        if self.telling:
            return [Term(LOGPS, losses[0].detach(), losses.new_ones(()))]
        # By comparison, not by scattered additions: the same bits every time on a GPU too.
        numbers = torch.arange(len(names), device=losses.device).unsqueeze(1)
        chosen = (batch["tasks"].unsqueeze(0) == numbers).float()
        counts = chosen.sum(1).long()
        count = torch.full((), losses.shape[1], device=losses.device)
        if real is not None:
            count = counts.sum()

        def term(name: str, each: torch.Tensor, *rest: Any) -> Term:
            sums = (chosen * each).sum(1)
            by_task = {task: (sums[i], counts[i]) for i, task in enumerate(names)}
            return Term(name, weighted_sum(each, weights), count, by_task, *rest)

        if learns is not None:
            terms = learns.terms(losses, total, context, chosen, names, self.training)
        else:
            first, *others = losses.detach()
            terms = [term(CROSS_ENTROPY, first, total)]
            for each, (name, _, weight) in zip(others, self.more, strict=True):
                terms.append(term(name, each, None, "supervised", weight))
        if unbalanced is not None:
            found = unbalanced * count
            terms.append(Term("balance", found.detach(), count, trained=found, reported=False))
        terms += self.penalties(count)
        if self.routing is not None and self.training:
            terms += router_losses.terms_of(self.routing)
        return terms

    def _losses(
        self,
        inputs: Batch,
        keep: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        kinds: OfTokens,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Float32 losses [kinds, M] and what is trained of them, with the graph; the balance loss.

        Those of many rows are made inside the head, which returns them as logits [1, kinds, M + 1]:
        whatever is hooked to the head sees one call, on every worker.
        """
        head, rows = self._head[0], self.rows or chunk_rows(self._vocabulary, keep.device)
        chunked = self._head_is_last and len(keep) > rows and not in_one_call(head)
        own, compute = head.__dict__.get("forward"), head.forward
        if chunked:
            head.forward = lambda hidden: chunked_losses(
                head, compute, hidden[0], targets, rows, weights, kinds
            ).unsqueeze(0)
        self._keep, self._columns = keep, tokens_of(inputs).shape[1]
        try:
            found = self.lm(**as_weights(inputs, self.lm), use_cache=False)
        finally:
            if self.routing is not None:
                self.routing.end()
            self._keep = None
            if own is not None:
                head.forward = own
            elif chunked:
                del head.forward
        logits, unbalanced = found.logits[0], None
        if self.balance is not None:
            unbalanced = self.balance * found.aux_loss
        if chunked:
            return logits[:, :-1].detach(), logits[0, -1], unbalanced
        losses = kinds.of_logits(logits, targets)
        return losses, kinds.total(losses, weights), unbalanced


def _logits_of(net: PreTrainedModel, head: nn.Module) -> tuple[int, bool]:
    """As `head_is_last`, of a model whose weights may not be read yet. Such a one has no positions
    of peft's that change what is asked (`worker.reads_later`)."""
    plain = net.get_base_model() if hasattr(net, "get_base_model") else net
    tried = with_weights(plain)
    if tried is plain:
        return head_is_last(net, head)
    _, last = head_is_last(tried, tried.get_output_embeddings())
    net.train(net.training)  # as one that was tried itself
    return plain.get_output_embeddings().weight.shape[0], last
