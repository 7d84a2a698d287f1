"""One `SpeechModel` a family: micro-batch -> tensors -> summed losses, generation, saving.

Stands between stream and step: `collate` lays a micro-batch out, `Supervised` (the module that a
strategy wraps) turns it into losses, `generate` serves evaluation, `save` serves export.
Cost: logits are computed at supervised positions only, and are never all there at a time (`loss`);
packed rows have no padding at all.

What a batch holds (int64 but for the masks; R rows of L positions, M supervised tokens):
    input_ids, position_ids [R, L]     positions restart with every document
    documents int32 [n + 1]            packed: cumulative document lengths (R = 1)
    attention_mask [R, L]              padded: 1 where there is a token
    keep, targets, tasks [M]           flat position that predicts, token to predict, task number
    real [R, L]                        rows of one length (`layout.Static`): 1 where there is a
                                       document; tasks are then -1 where nothing is predicted
    kinds int8 [R, L]                  of a mixture of experts: kind of token, < 0: not counted
    input_features [C, mels, F], feature_attention_mask [C, F]   audio_lm: one row a clip
    input_features [R, mels, F], decoder_input_ids [R, L]   seq2seq: a clip a row, no input_ids
    input_values [R, S] or input_features [R, F, mels], attention_mask: of clips at their own length
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.config.speaking import Speak
from raysft.data.encode.verdict import Verdict
from raysft.data.example import MicroBatch, Sequence
from raysft.errors import UserError
from raysft.losses.chunked import TokenLoss
from raysft.losses.term import Term
from raysft.models import experts, generation, reach, routing, targets
from raysft.models.draws import Draws
from raysft.models.layout import (
    IGNORED,
    Batch,
    Document,
    Static,
    as_weights,
    context_of,
    fill_supervised,
    ints,
    pack,
    pad,
    tokens_of,
)
from raysft.models.modality import Plan
from raysft.models.router_losses import Weights
from raysft.models.routing import Routing
from raysft.models.supervised import PREFIX, Losses, Supervised
from raysft.models.watched import Generated, Watch, ended, watching
from raysft.parallel import unread


class SpeechModel(ABC):
    """A transformers model and what turns micro-batches into its inputs.

    net: the transformers model. model: what computes: that, or a peft model around it. new_ids:
    tokens that this run has added to the model's tokenizer. prepends: the model puts positions of
    its own in front of a row (prompt tuning), so padding must not come between. verdict: what is
    exact for this kind of model. unreached: parameters frozen because no batch reaches them.
    virtual: positions that train in front of a prompt. unended: answers cut at their limit so far.
    routing: the experts of a mixture and what they did, where its routers are known. writes:
    whether it reads and writes text: else it has no tokenizer, and is evaluated by its losses.
    speaker: the model in it that sounds the units it writes; None: there is none. placeholders:
    tokens that stand where audio is heard, and in no answer.
    """

    new_ids: Seq[int] = ()
    prepends = False
    verdict = Verdict("")
    unreached: Seq[str] = ()
    virtual = 0
    unended = 0
    routing: Routing | None = None
    writes = True
    speaker: SpeechModel | None = None
    placeholders: Seq[int] = ()
    _watch: Watch | None = None
    _choose: Draws | None = None
    answer_of: Callable[[str], str] = staticmethod(str)

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        mode: Literal["packed", "padded"],
        stop_ids: Seq[int],
    ) -> None:
        """tokenizer: None where the model writes no text. stop_ids: tokens that end an answer, next
        to the model's and the tokenizer's own."""
        self.net = net
        self.model: nn.Module = net
        self.mode = mode
        self.tasks: list[str] = []
        self.task_weights: dict[str, float] = {}  # in the loss that is trained
        self.more_losses: list[tuple[str, TokenLoss, float]] = []  # beside the cross-entropy
        self.supervised = self._supervised(net)
        self.stop_ids: list[int] = []
        self.pad_id = 0
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._end_answers(net, tokenizer, stop_ids)

    def _end_answers(
        self, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Seq[int]
    ) -> None:
        configured = net.generation_config.eos_token_id
        stops = {*stop_ids, tokenizer.eos_token_id}
        stops |= set(configured if isinstance(configured, list) else [configured])
        self.stop_ids = sorted(stops - {None})
        if not self.stop_ids:
            raise UserError("model.tokenizer: it has no end-of-sequence token; answers never end")
        own = tokenizer.pad_token_id
        self.pad_id = self.stop_ids[0] if own is None else own
        net.generation_config.eos_token_id = self.stop_ids
        net.generation_config.pad_token_id = self.pad_id
        if tokenizer.bos_token_id is not None:
            net.generation_config.bos_token_id = tokenizer.bos_token_id

    @property
    def proven(self) -> PreTrainedModel:
        """The model whose batches are proven to be exact: the one that sees tokens in a row."""
        return self.net

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a model that reads and writes text. Raises UserError for others."""
        if self._tokenizer is None:
            raise UserError(
                f"model: {type(self.net).__name__} reads and writes no text, and has no tokenizer"
            )
        return self._tokenizer

    def wrap(self, model: nn.Module) -> None:
        """Compute with `model`, which holds `net` (or is it, changed), from here on."""
        self.supervised.release()
        self.model = model
        self.supervised = self._supervised(model)
        self.supervised.windows = self.verdict.windows

    def _supervised(self, model: nn.Module) -> Losses:
        settings = (self.tasks, self.task_weights, self.more_losses, self.routing)
        return Supervised(model, *settings)

    def route(self, plan: Plan | None, weights: Weights | None) -> None:
        """Send tokens to experts by `plan`; watch what they do. weights: of the routers' losses."""
        self.routing = self.supervised.routing = routing.attach(self.net, plan, weights)

    def take(self, verdict: Verdict) -> None:
        """Lay batches out, and answer them, as the proof says is exact."""
        self.verdict = verdict
        self.supervised.windows = verdict.windows

    # -- batches ---------------------------------------------------------------------------------

    @abstractmethod
    def dummy_document(self) -> Document:
        """The smallest document that uses every parameter; all labels -100."""

    def full_document(self, length: int) -> Document:
        """As `dummy_document`, of about `length` positions where longer clips cost more."""
        return self.dummy_document()

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Cut a micro-batch into its sequences."""
        return [Document(s.input_ids, s.labels, s.task, s.arrays) for s in mb.sequences()]

    def features(self, documents: list[Document]) -> Batch:
        """Model inputs besides tokens."""
        return {}

    def rows(
        self, documents: list[Document], side: Literal["right", "left"]
    ) -> tuple[Batch, Seq[int]]:
        """A padded row a document, as the model takes them, and the flat position where each
        document begins (before its row, where not all of it stands there)."""
        batch, offsets = pad(documents, self.pad_id, side)
        if not self.verdict.positions:
            del batch["position_ids"]
        return batch, offsets

    def decoded(self, document: Document) -> int:
        """Positions of a document in its row."""
        return len(document.input_ids)

    def computed(self, batch: Batch) -> int:
        """Positions that a batch computes, padding among them."""
        return tokens_of(batch).numel()

    def touches_everything(self, documents: list[Document]) -> bool:
        """Whether these documents reach every parameter, as gradient reduction needs."""
        return bool(documents)

    def collate(
        self,
        mb: MicroBatch,
        side: Literal["right", "left"] = "right",
        static: Static | None = None,
    ) -> Batch:
        """CPU tensors of one micro-batch, as the module's docstring says.

        An empty one gives `dummy()`: a batch of no supervised token. side: where padding goes.
        static: packed rows are of its shapes.
        """
        documents = self.documents(mb) if len(mb.lengths) else []
        real = {id(document) for document in documents}
        offsets: Seq[int] | np.ndarray
        if not self.touches_everything(documents):
            documents.append(self.dummy_document())
        if self.mode == "packed":
            # Neighbours of equal length share one attention call; order means nothing to a sum.
            documents.sort(key=lambda d: len(d.input_ids))
            batch, offsets = pack(documents, static, self.pad_id)
        else:
            batch, offsets = self.rows(documents, side)
        keep, targets, tasks = [], [], []
        for document, offset in zip(documents, offsets, strict=True):
            # Position t - 1 predicts t; the first token of a document is nobody's to predict.
            at = np.flatnonzero(document.labels[1:] != IGNORED)
            keep.append(at + offset)
            targets.append(document.labels[1:][at])
            if len(at):  # else its task is none of those that are trained
                tasks.append(np.full(len(at), self._task_number(document.task)))
        batch["keep"] = ints(np.concatenate(keep))
        batch["targets"] = ints(np.concatenate(targets))
        batch["tasks"] = ints(np.concatenate([np.zeros(0), *tasks]))
        batch |= context_of(documents)
        if "real" in batch:
            fill_supervised(batch)
        if self.routing is not None:
            counted = [
                (int(offset), len(document.input_ids))
                for document, offset in zip(documents, offsets, strict=True)
                if id(document) in real
            ]
            batch["kinds"] = self.routing.laid_out(tokens_of(batch).numpy(), counted)
        return batch | self.features(documents)

    def dummy(self) -> Batch:
        """A batch of weight zero for a turn without examples: gradients are zeros, never None."""
        return self.collate(MicroBatch.join(0, 0, 0, []))

    def _task_number(self, task: str) -> int:
        if task not in self.tasks:
            self.tasks.append(task)
        return self.tasks.index(task)

    # -- training --------------------------------------------------------------------------------

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """What a micro-batch holds of what terms are divided by and costs are counted in; the same
        names whatever it holds, an empty one too.

        supervised: targets; the first token of a sequence is never one. squares: of the sequences'
        lengths, pairs of positions that attention may see. Of a mixture whose routers have losses,
        what those are divided by.
        """
        mask = mb.labels != IGNORED
        starts = np.cumsum(mb.lengths) - mb.lengths
        found = {
            "supervised": float(mask.sum() - mask[starts].sum()),
            "squares": float(np.square(mb.lengths, dtype=np.float64).sum()),
        }
        return found if self.routing is None else found | self.routing.counts(mb)

    def kept(self, positions: int, width: int, checkpointing: bool) -> float | None:
        """Bytes of activations that so many positions leave until the backward pass; None: as the
        layers of a language model do. width: bytes of a number; checkpointing: whether of a layer
        its input alone."""
        return None

    def loss(self, batch: Batch) -> list[Term]:
        """Terms by the bare module; under a strategy call its wrapped module instead."""
        return self.supervised(batch)

    def outputs(self, found: CausalLMOutputWithPast) -> list[torch.Tensor]:
        """What losses are made of, of what the model returned in its last forward pass."""
        assert found.logits is not None
        return [found.logits]

    def freeze(self, patterns: Seq[str]) -> list[str]:
        """Stop training the parameters whose names match a pattern (fnmatch); returns them.

        Raises UserError for a pattern that matches nothing, or if nothing is left to train.
        """
        return targets.freeze(self.model, patterns)

    def freeze_unreached(self) -> list[str]:
        """Stop training what no batch reaches (see `reach`); returns and remembers the names.

        Raises UserError if nothing else trains.
        """
        batch, _ = self.rows([self.dummy_document()], "right")
        # Stand-ins for weights cannot be multiplied in groups.
        alone = nullcontext() if unread.of(self.net) is None else experts.one_by_one(self.net)
        with alone:
            inputs = batch | self.features([self.dummy_document()])
            found = reach.freeze(self.model, inputs, self.outputs)
        self.unreached = [*self.unreached, *found]
        if self.unreached and not any(p.requires_grad for p in self.model.parameters()):
            raise UserError(
                "model: no batch of this data reaches what would train "
                f"({reach.summary(self.unreached)}); train other layers"
            )
        return found

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input and recompute the rest in the backward pass."""
        if not self.net.supports_gradient_checkpointing:
            raise UserError(
                f"train.gradient_checkpointing: {type(self.net).__name__} does not support it; "
                "set it to false"
            )
        self.net.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )

    # -- generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Seq[Sequence],
        max_new_tokens: int,
        synced_gpus: bool = False,
        within: generation.Within | None = None,
    ) -> list[str]:
        """Greedy answers to `prompts`, without special tokens: the texts of `answers`."""
        found = self.answers(prompts, max_new_tokens, synced_gpus, within=within)
        return [one.text for one in found]

    @torch.no_grad()
    def answers(
        self,
        prompts: Seq[Sequence],
        max_new_tokens: int,
        synced_gpus: bool = False,
        watched: Seq[int] = (),
        within: generation.Within | None = None,
        choose: Draws | None = None,
    ) -> list[Generated]:
        """Answers to `prompts`, greedy unless `choose` chooses, and what they were chosen by.

        watched: tokens whose logits are wanted. within: default, up to any of stop_ids.
        synced_gpus: keep every worker in step until the last has finished (sharded weights, whose
        root must be unsharded around this call); then workers without prompts call it too.
        Answers are those of one prompt at a time, and end where the model's positions end. They
        are computed as one left-padded batch where the model allows it (see `proof`), else by
        batches of prompts of one length, or one by one.
        """
        documents = [Document(s.input_ids, s.labels, s.task, s.arrays) for s in prompts]
        batches = self._batches([self.decoded(d) for d in documents], max_new_tokens)
        if synced_gpus:
            rounds = torch.tensor(len(batches), device=next(self.model.parameters()).device)
            dist.all_reduce(rounds, dist.ReduceOp.MAX)
            batches += [([], 1)] * (int(rounds) - len(batches))
        nothing = Generated("", [], np.zeros((0, len(watched)), np.float32))
        answers = [nothing] * len(documents)
        for rows, most in batches:
            asked = [documents[i] for i in rows]
            self._choose = None if choose is None else choose.of(rows)
            found = self._generate(asked, most, synced_gpus, watched, within)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def _batches(self, lengths: Seq[int], max_new_tokens: int) -> list[tuple[list[int], int]]:
        """Which prompts to answer together, by number, and with how many tokens at most."""
        if not lengths:
            return []
        verdict = self.verdict
        most = max(lengths) + max_new_tokens
        how = "length" if self.prepends else verdict.answers
        if not self.prepends and verdict.answers_until and most <= verdict.answers_until:
            how = "any"
        # The last token of an answer takes no position: nothing follows it.
        left = None if verdict.learned is None else verdict.learned + 1 - self.virtual
        if left is not None and most > left and how == "any":
            how = "length"
        every = range(len(lengths))
        groups = [list(every)]
        if how == "length":
            groups = [[i for i in every if lengths[i] == length] for length in sorted({*lengths})]
        elif how == "one":
            groups = [[i] for i in every]
        found = []
        for group in groups:
            longest = max(lengths[i] for i in group)
            tokens = max_new_tokens if left is None else min(max_new_tokens, left - longest)
            if tokens > 0:  # else there is no position for the prompt: its answer is empty
                found.append((group, tokens))
        return found

    def _generate(
        self,
        asked: list[Document],
        max_new_tokens: int,
        synced_gpus: bool,
        watched: Seq[int],
        within: generation.Within | None,
    ) -> list[Generated]:
        documents = list(asked)
        if not documents and not synced_gpus:
            return []
        if not self.touches_everything(documents):
            documents.append(self.dummy_document())
        batch, _ = self.rows(documents, "left")
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) for k, v in (batch | self.features(documents)).items()}
        inputs = as_weights(inputs, self.net)
        # The model's own generation config may sample or penalise repetition: not in evaluation.
        own, training = self.net.generation_config, self.model.training
        greedy = self._greedy(own, max_new_tokens)
        self.net.generation_config = greedy if within is None else within.of(greedy)
        self.model.eval()
        self._watch = Watch(watched) if watched else None
        try:
            tokens = self._answered(inputs, synced_gpus)
        finally:
            self.net.generation_config = own
            self.model.train(training)
        answers = tokens[: len(asked), tokens_of(inputs).shape[1] :].tolist()
        stops = self.stop_ids if within is None else within.stops
        return [self._generated(row, answer, stops) for row, answer in enumerate(answers)]

    def _greedy(self, own: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
        """How answers of at most so many tokens are generated. own: the model's config."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self.stop_ids, pad_token_id=self.pad_id
        )

    def _answered(self, inputs: Batch, synced_gpus: bool) -> torch.Tensor:
        """Prompts with their answers [R, L + new], by `net.generation_config`."""
        # Of transformers or peft, whose modules mypy takes for any.
        watch = watching(self._watch, self._choose)
        return self.model.generate(**inputs, **watch, synced_gpus=synced_gpus)  # type: ignore[operator]

    def _generated(self, row: int, answer: list[int], stops: Seq[int]) -> Generated:
        """An answer up to its first stop token."""
        end = ended(answer, stops)
        logits = np.zeros((end, 0), np.float32) if self._watch is None else self._watch.of(row, end)
        return Generated(self._text(answer, stops), answer[:end], logits, answer[end : end + 1])

    def _text(self, answer: list[int], stops: Seq[int]) -> str:
        """Decode up to the first stop token."""
        end = ended(answer, stops)
        self.unended += end == len(answer)
        return self.answer_of(self.tokenizer.decode(answer[:end], skip_special_tokens=True))

    def speak(self, prompts: Seq[Sequence], seeds: Seq[int], settings: Speak) -> list[np.ndarray]:
        """What is said after each of `prompts`: frames [frames, bins] of `Encoder.sounds`, each by
        noise of its own seed. Of models that speak alone."""
        raise NotImplementedError(f"{type(self).__name__} writes text")

    # -- saving ----------------------------------------------------------------------------------

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write model, tokenizer and generation config for `from_pretrained` into `folder`.

        state_dict: the weights to write, named as the model or as `Supervised` names them;
        default: the model's own. A model with adapters is merged first: see `peft`.
        """
        net = self.net
        if self.model is not self.net:
            raise ValueError("the model has adapters: merge them, or save their own files")
        weights: dict[str, torch.Tensor] = dict(state_dict or net.state_dict())
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
        lacking = net.state_dict().keys() - weights.keys()
        if lacking:
            raise ValueError(f"state_dict lacks {len(lacking)} weights, such as {min(lacking)}")
        for name, source in net.all_tied_weights_keys.items():  # none where nothing is tied
            if source in weights:
                weights.pop(name, None)
        generation.mend(net)
        net.save_pretrained(folder, state_dict=weights)
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Write what turns text and audio into the model's inputs."""
        self.tokenizer.save_pretrained(folder)
