"""pair: trains a language model and a flow decoder by the weighted sum of their losses.

Stands between config and step. A batch holds what `causal_lm`'s does, and what `flow_decoder`'s
does under `flow_NAME`. Its terms are those of the two, each times the weight of its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.config import schema
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch
from raysft.families.flow_decoder.encode import DRAWS, MEL
from raysft.families.flow_decoder.model import VALUES, FlowModel, flow_term, scored_values
from raysft.families.flow_decoder.net import LOSSES
from raysft.families.pair.config import PairConfig
from raysft.families.pair.encode import PairEncoder
from raysft.families.pair.net import FLOW, PairForCausalLM
from raysft.losses.chunked import TokenLoss
from raysft.losses.term import Term
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document, SpeechModel
from raysft.models.layout import ints
from raysft.models.routing import Routing
from raysft.models.supervised import Supervised
from raysft.parallel import unread


class PairSupervised(Supervised):
    """As `Supervised`, with the flow decoder's term."""

    def __init__(
        self,
        model: nn.Module,
        net: PairForCausalLM,
        tasks: list[str],
        weights: Mapping[str, float],
        more: Seq[tuple[str, TokenLoss, float]],
        routing: Routing | None,
    ) -> None:
        """model: what computes. net: the net in it. The rest, as `Supervised` takes it."""
        super().__init__(model, tasks, weights, more, routing)
        self._net = (net,)  # in a tuple: its weights are not to be saved under two names

    def forward(self, batch: Batch) -> list[Term]:
        """The terms of `batch`, the cross-entropy first, each as its model weighs."""
        held = {FLOW + name: batch[FLOW + name] for name in LOSSES}
        terms = super().forward({k: v for k, v in batch.items() if k not in held})
        held = {name.removeprefix(FLOW): tensor for name, tensor in held.items()}
        net = self._net[0]
        weights = {} if not self.training else self.weights
        flow = flow_term(net.take_velocity(), held, list(self.tasks), weights)
        config = net.config
        assert isinstance(config, PairConfig)
        own = [  # what is of the weights, not of the data, is neither model's
            t if t.counted is None else t._replace(weight=t.weight * config.llm_weight)
            for t in terms
        ]
        return [*own, flow._replace(weight=float(config.flow_weight))]


class PairLM(SpeechModel):
    """Tokens and mels. Writes what the language model does."""

    net: PairForCausalLM

    def __init__(
        self, net: PairForCausalLM, encoder: PairEncoder, mode: Literal["packed", "padded"]
    ) -> None:
        """encoder: of the same config."""
        self._own = net
        self.speaker = self._sound = FlowModel(net.flow, "padded", encoder.flow)
        super().__init__(net, encoder.tokenizer, mode, [encoder.end_id])

    def _supervised(self, model: nn.Module) -> Supervised:
        settings = (self.tasks, self.task_weights, self.more_losses, self.routing)
        return PairSupervised(model, self._own, *settings)

    @property
    def proven(self) -> PreTrainedModel:
        """The language model: the decoder computes each row by itself."""
        return self._own.llm

    def outputs(self, found: CausalLMOutputWithPast) -> list[torch.Tensor]:
        """As `SpeechModel.outputs`, and the velocity."""
        return [*super().outputs(found), self._own.take_velocity()]

    def dummy_document(self) -> Document:
        """Two end tokens, and a few frames of a constant mel."""
        ids = np.full(2, self.stop_ids[0], np.int32)
        sound = self._sound.dummy_document()
        return Document(ids, np.full(2, IGNORED, np.int32), "none", sound.arrays)

    def documents(self, mb: MicroBatch) -> list[Document]:
        """The language model's sequences, with the decoder's arrays."""
        documents = super().documents(mb)
        for document in documents:
            tokens = len(document.input_ids) - len(document.arrays[MEL][0])
            document.input_ids = document.input_ids[:tokens]
            document.labels = document.labels[:tokens]
        return documents

    def features(self, documents: list[Document]) -> Batch:
        """The decoder's batch. What nobody learns of the tokens counts for nothing here too."""
        spoken = [document for document in documents if MEL in document.arrays]
        if not spoken:  # prompts, of which it makes nothing
            return {}
        batch, _ = self._sound.rows(spoken, "right")
        learnt = [(document.labels != IGNORED).any() for document in spoken]
        tasks = [
            self._task_number(document.task) if counts else -1
            for document, counts in zip(spoken, learnt, strict=True)
        ]
        return {FLOW + name: tensor for name, tensor in batch.items()} | {
            f"{FLOW}tasks": ints(np.array(tasks))
        }

    def _answered(self, inputs: Batch, synced_gpus: bool) -> torch.Tensor:
        """As `SpeechModel._answered`, of the language model's inputs."""
        own = {name: tensor for name, tensor in inputs.items() if not name.startswith(FLOW)}
        return super()._answered(own, synced_gpus)

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, and what the decoder's loss is divided by."""
        values = 0.0
        if len(mb.lengths):
            seeds, frames = mb.arrays[DRAWS].values, mb.arrays[MEL].lengths
            values = scored_values(seeds, frames, self._sound.config)
        return super().counts(mb) | {VALUES: values}


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: PairEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> PairLM:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer."""
    auto, tokenizer = net_class(model), encoder.tokenizer
    with unread.deferring(False):
        if model.config is not None:
            llm = loading.fill_from_tokenizer(model.config.get("text_config") or {}, tokenizer)
            net = loading.from_config({**model.config, "text_config": llm}, auto, seed)
        else:
            net = loading.from_path(model, auto, quantization)
            loading.grow_vocabulary(net, len(tokenizer), seed)
    assert isinstance(net, PairForCausalLM)
    return PairLM(net, encoder, data.mode)
