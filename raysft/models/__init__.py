"""Models: one `SpeechModel` (see `base`) a family, built from the config by its `Build`."""

from __future__ import annotations

from typing import Protocol

from transformers import BitsAndBytesConfig

from raysft.config import schema
from raysft.data.encode import Encoder, model_family
from raysft.errors import UserError
from raysft.models import balance, experts, loading, modality, proof, rope, several_gates
from raysft.models.attention import attach
from raysft.models.base import SpeechModel
from raysft.models.copies import NoCopy
from raysft.models.router_losses import Weights
from raysft.models.routers import routers
from raysft.models.supervised import PREFIX, Supervised
from raysft.parallel import unread

__all__ = ["PREFIX", "Build", "SpeechModel", "Supervised", "build"]


class Build(Protocol):
    """The module of a family that makes its models (`Family.model`)."""

    def make_model(
        self,
        model: schema.Model,
        data: schema.Data,
        encoder: Encoder,
        seed: int,
        quantization: BitsAndBytesConfig | None = None,
    ) -> SpeechModel:
        """The model of `model` on the CPU, in float32, with an embedding for every token of the
        encoder's tokenizer. Random weights come from `seed` alone.

        encoder: made by the family's encoder module. quantization: as in `build`. Raises UserError
        if the model cannot be had.
        """
        ...


def build(
    model: schema.Model,
    data: schema.Data,
    encoder: Encoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> SpeechModel:
    """The model of `model` on the CPU, with float32 weights that are the same on every worker.
    Under `unread.deferring` it has stand-ins for its matrices, if it can do without them. What no
    batch reaches does not train.

    encoder: of the same config; gives the tokenizer and, for audio_lm, the front end.
    quantization: (qlora) how the language model's weights are stored. Raises UserError if the
    model cannot be had, or is not exact in this data.mode.
    """
    try:
        return _build(model, data, encoder, seed, quantization)
    except NoCopy:
        with unread.deferring(False):
            return _build(model, data, encoder, seed, quantization)


def _build(
    model: schema.Model,
    data: schema.Data,
    encoder: Encoder,
    seed: int,
    quantization: BitsAndBytesConfig | None,
) -> SpeechModel:
    if model.path is not None and model.config is not None:
        raise UserError("model: found both model.path and model.config; give exactly one")
    module: Build = model_family(model).model_module()
    speech_model = module.make_model(model, data, encoder, seed, quantization)
    speech_model.new_ids = encoder.new_ids
    speech_model.answer_of = encoder.template.answer_of
    loading.refuse_layer_drop(model, speech_model.model.config)
    proof.refuse_early(speech_model.proven, data.mode)
    verdict = encoder.verdict or proof.prove(speech_model.proven)
    proof.check(verdict, data.mode)
    rope.attach(speech_model.net)
    balance.attach(speech_model.net)
    if data.mode == "packed":
        attach(speech_model.net, verdict.windows)
    if model.moe is not None:
        experts.check(speech_model.net)
    speech_model.take(verdict)
    _route(speech_model, model, encoder)
    speech_model.freeze_unreached()
    return speech_model


def _route(speech_model: SpeechModel, model: schema.Model, encoder: Encoder) -> None:
    """Tokens to the experts of their kind, and routers with losses, as `model.moe` says."""
    if (unseen := unread.of(speech_model.net)) is not None:
        for router in routers(speech_model.net).values():  # they are small, and tried out
            unseen.realise(router)
    plan = modality.plan_of(model, speech_model.net, encoder)
    moe = model.moe
    weights = None
    if moe is not None and (moe.balance or moe.z_loss):
        weights = Weights(moe.balance, moe.z_loss, moe.balance_over)
    begun = modality.kept_plan(speech_model.net.config) is not None
    speech_model.route(plan, weights)
    if plan is not None and plan.several and begun:
        assert model.path is not None  # a config of random weights keeps no plan
        several_gates.load(speech_model.net, [model.path], model.hub)
