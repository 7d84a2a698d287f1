"""patch_lm: hears and speaks patches of speech, and writes text, in one model and one step.

Stands between config and step. Beside what `models.base` says, a batch holds (P patches in all, Q
of them to be spoken, in U utterances):
    patches [P, S, latent]; patch_at [P]        frames, and the flat position of each
    spoken, first, owners, speech_tasks [Q]     which of them, whether it is its clip's first, its
                                                utterance, its task
    noisy, velocity [Q, S, latent]; units, dropped [Q]   the way from noise to it: see `flow_head`
    stops [Q]                                   labels of the stop head
    counted [U]                                 0 of what only keeps parameters in the graph
Its losses: of text the cross-entropy; `flow`, divided by the values of all spoken frames; `stop`
and `goes_on`, each divided by the utterances that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from raysft.config import schema
from raysft.config.patches import Patches
from raysft.config.speaking import Speak
from raysft.data.encode import net_class
from raysft.data.encode.families import model_type
from raysft.data.example import MicroBatch, Sequence
from raysft.families.patch_lm.config import MODEL_TYPE, PatchLMConfig
from raysft.families.patch_lm.encode import DRAWS, LATENTS, PatchEncoder, settled
from raysft.families.patch_lm.latents import latents_of
from raysft.families.patch_lm.net import LOSSES, PatchLMForCausalLM
from raysft.families.patch_lm.speak import speak
from raysft.losses.chunked import TokenLoss
from raysft.losses.flow_matching import squares, way
from raysft.losses.stop import NEAR, labels, stop_loss
from raysft.losses.term import Term, of_rows
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document, SpeechModel
from raysft.models.flow_parts import T_UNITS
from raysft.models.layout import Static, as_weights, ints, tokens_of
from raysft.models.meta import on_meta
from raysft.models.routing import Routing
from raysft.models.supervised import Supervised
from raysft.parallel import unread

SPOKEN = "spoken"  # of a document: int64, SAID or SILENT for each of its patches that is spoken
HEARD, SAID, SILENT = 0, 1, 2  # SILENT: for nothing but the graph
SPEECH = ("spoken", "first", "noisy", "units", "dropped")  # of a batch: what heads compute by


class PatchSupervised(Supervised):
    """As `Supervised`, with the losses of flow head and stop head."""

    def __init__(
        self,
        model: nn.Module,
        net: PatchLMForCausalLM,
        patches: Patches,
        tasks: list[str],
        weights: Mapping[str, float],
        more: Seq[tuple[str, TokenLoss, float]],
        routing: Routing | None,
    ) -> None:
        """model: what computes. net: the net in it. The rest, as `Supervised` takes it."""
        super().__init__(model, tasks, weights, more, routing)
        self._net = (net,)  # in a tuple: its weights are not to be saved under two names
        self._patches = patches

    def forward(self, batch: Batch) -> list[Term]:
        """The terms of `batch`: cross-entropy first, then those of speech."""
        own = {name: batch[name] for name in LOSSES if name in batch}
        terms = super().forward({k: v for k, v in batch.items() if k not in own})
        if not own:
            return terms
        velocity, stops = self._net[0].take_spoken()
        settings, device = self._patches, velocity.device
        first = terms[0]
        terms[0] = first._replace(weight=first.weight * settings.text_weight)
        owners, counted = own["owners"], own["counted"].float()
        each = squares(velocity, own["velocity"]).sum(1)
        values = torch.full_like(each, own["velocity"][0].numel()) * counted[owners]
        rows = len(counted)
        flow = torch.zeros(rows, device=device).index_add(0, owners, each * counted[owners])
        values = torch.zeros(rows, device=device).index_add(0, owners, values)
        found = stop_loss(stops, own["stops"], owners, rows)
        goes_on = found.goes_on.float() * counted
        tasks = torch.full((rows,), -1, device=device).index_copy(0, owners, own["speech_tasks"])
        names, weights = list(self.tasks), self.weights if self.training else {}
        half = settings.stop_weight / 2
        for name, sums, count, weight in (
            ("flow", flow, values, settings.flow_weight),
            ("stop", found.last * counted, counted, half),
            ("goes_on", found.hardest * goes_on, goes_on, half),
        ):
            terms.append(of_rows(name, sums, count, tasks, names, weights, name, weight))
        for name, losses, count in (
            ("likely_stop", found.last, counted),
            ("likely_goes_on", found.hardest, goes_on),
        ):
            likely = ((-losses.detach()).exp() * count).sum()
            terms.append(Term(name, likely, count.sum(), counted=None, aside=True))
        return terms


class PatchLM(SpeechModel):
    """A causal LM with patches of speech among its tokens."""

    net: PatchLMForCausalLM

    def __init__(
        self,
        net: PatchLMForCausalLM,
        encoder: PatchEncoder,
        mode: Literal["packed", "padded"],
    ) -> None:
        """encoder: of the same config."""
        self.patches, self.patch_id = encoder.patches, encoder.patch_id
        self.latent = encoder.latents.width
        self.frames_per_second = encoder.latents.frames_per_second
        self._own = net
        super().__init__(net, encoder.tokenizer, mode, [encoder.end_id])

    def _supervised(self, model: nn.Module) -> Supervised:
        settings = (self.tasks, self.task_weights, self.more_losses, self.routing)
        return PatchSupervised(model, self._own, self.patches, *settings)

    @property
    def proven(self) -> PreTrainedModel:
        """The language model: heads see one patch at a time."""
        return self._own.language_model

    def outputs(self, found: CausalLMOutputWithPast) -> list[torch.Tensor]:
        """As `SpeechModel.outputs`, and what the heads made."""
        return [*super().outputs(found), *self._own.take_spoken()]

    # -- batches ---------------------------------------------------------------------------------

    def dummy_document(self) -> Document:
        """An end token and a patch that is spoken, for nothing."""
        ids = np.array([self.stop_ids[0], self.patch_id], np.int32)
        frames = np.zeros((self.patches.size, self.latent), np.float32)
        arrays = {
            LATENTS: [frames],
            SPOKEN: [np.array([SILENT])],
            DRAWS: [np.zeros(2, np.int64)],
        }
        return Document(ids, np.full(2, IGNORED, np.int32), "none", arrays)

    def documents(self, mb: MicroBatch) -> list[Document]:
        """Sequences; which of their patches are spoken is among their arrays, and no label."""
        documents = super().documents(mb)
        for name, document in zip(mb.ids, documents, strict=True):
            at = document.input_ids == self.patch_id
            frames = sum(map(len, document.arrays.get(LATENTS, [])))
            if int(at.sum()) * self.patches.size != frames:
                raise ValueError(f"{name}: {int(at.sum())} patches, and frames for {frames}")
            said = np.where(document.labels[at] == self.patch_id, SAID, HEARD)
            document.arrays[SPOKEN] = [said]
            document.labels = np.where(at, IGNORED, document.labels)
        return documents

    def touches_everything(self, documents: list[Document]) -> bool:
        """Whether something is spoken, by which all heads compute."""
        return any((flags > HEARD).any() for d in documents for flags in d.arrays.get(SPOKEN, []))

    def rows(
        self, documents: list[Document], side: Literal["right", "left"]
    ) -> tuple[Batch, Seq[int]]:
        """As `SpeechModel.rows`, with the places of patches."""
        batch, offsets = super().rows(documents, side)
        batch["patch_at"] = self._places(batch)
        return batch, offsets

    def collate(
        self,
        mb: MicroBatch,
        side: Literal["right", "left"] = "right",
        static: Static | None = None,
    ) -> Batch:
        """As `SpeechModel.collate`, with what the module's docstring says."""
        batch = super().collate(mb, side, static)
        if "patch_at" not in batch:  # packed: `rows` has not made them
            batch["patch_at"] = self._places(batch)
        return batch

    def _places(self, batch: Batch) -> torch.Tensor:
        return (tokens_of(batch).flatten() == self.patch_id).nonzero()[:, 0]

    def features(self, documents: list[Document]) -> Batch:
        """The patches of all documents, and of those to be spoken what heads learn."""
        shape = (self.patches.size, self.latent)
        patches: list[np.ndarray] = [np.zeros((0, *shape), np.float32)]
        found: list[_Utterance] = []
        before = 0
        for document in documents:
            wanted = int((document.input_ids == self.patch_id).sum())
            own = [clip.reshape(-1, *shape) for clip in document.arrays.get(LATENTS, [])]
            # Of a prompt, which was cut from a sequence, what is spoken stands behind its end.
            own_patches = np.concatenate([patches[0], *own])[:wanted]
            flags = np.concatenate([np.zeros(0, np.int64), *document.arrays.get(SPOKEN, [])])
            flags = flags[:wanted]
            if (flags > HEARD).any():
                seed, trains = map(int, document.arrays[DRAWS][0])
                rng = np.random.default_rng(seed)
                start = 0
                for clip in own:
                    said = flags[start : start + len(clip)]
                    if len(said) and said[0] > HEARD:
                        task = self._task_number(document.task) if said[0] == SAID else -1
                        at = np.arange(len(said)) + before + start
                        clean = own_patches[start : start + len(said)]
                        power = self.patches.time_power if trains else 1
                        found.append(self._utterance(clean, at, task, rng, power))
                        if trains and (noise := self.patches.history_noise):
                            drawn = rng.standard_normal(clean.shape, np.float32)
                            own_patches[start : start + len(said)] = clean + noise * drawn
                    start += len(clip)
            patches.append(own_patches)
            before += wanted
        batch = {"patches": torch.from_numpy(np.concatenate(patches))}
        return batch | (_joined(found) if found else {})

    def _utterance(
        self,
        patches: np.ndarray,
        at: np.ndarray,
        task: int,
        rng: np.random.Generator,
        power: int,
    ) -> _Utterance:
        """patches: its own. at: their numbers in the batch. power: of times."""
        data = torch.from_numpy(np.ascontiguousarray(patches))
        units = first = rng.integers(T_UNITS, size=len(at))
        for _ in range(power - 1):  # whole numbers: the same on every processor
            units = units * first // T_UNITS
        noise = torch.from_numpy(rng.standard_normal(data.shape, np.float32))
        dropped = rng.random(len(at)) < self.patches.condition_dropout
        t = torch.from_numpy((units / T_UNITS).astype(np.float32)).view(-1, 1, 1)
        return _Utterance(at, task, *way(noise, data, t), units, dropped)

    def _answered(self, inputs: Batch, synced_gpus: bool) -> torch.Tensor:
        """As `SpeechModel._answered`: of what is written, to what is heard."""
        heard = {k: v for k, v in inputs.items() if k not in (*SPEECH, *LOSSES)}
        return super()._answered(heard, synced_gpus)

    def speak(self, prompts: Seq[Sequence], seeds: Seq[int], settings: Speak) -> list[np.ndarray]:
        """See `SpeechModel.speak`."""
        if not prompts:
            return []
        documents = [Document(s.input_ids, s.labels, s.task, s.arrays) for s in prompts]
        batch, _ = self.rows(documents, "left")
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in (batch | self.features(documents)).items()}
        inputs = as_weights({k: v for k, v in batch.items() if k not in SPEECH}, self._own)
        training = self.model.training
        self.model.eval()
        try:
            rate = self.frames_per_second
            return speak(self._own, inputs, seeds, settings, rate, self.routing)
        finally:
            self.model.train(training)

    # -- training --------------------------------------------------------------------------------

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """As `SpeechModel.counts`, and by what the losses of speech are divided."""
        spoken = mb.labels == self.patch_id
        starts = np.cumsum(mb.lengths) - mb.lengths
        plain = mb.labels
        if spoken.any():
            plain = np.where(spoken, IGNORED, mb.labels)
        text = MicroBatch(
            mb.epoch, mb.step, mb.lane, mb.ids, mb.tasks, mb.lengths, mb.input_ids, plain
        )
        begins = spoken.copy()
        begins[1:] &= ~spoken[:-1]
        begins[starts] = spoken[starts]
        number = np.cumsum(begins)[spoken]
        patches = np.bincount(number) if len(number) else np.zeros(0, int)
        return super().counts(text) | {
            "flow": float(spoken.sum() * self.patches.size * self.latent),
            "stop": float(begins.sum()),
            "goes_on": float((patches > 1 + NEAR).sum()),
        }


class _Utterance:
    """What heads learn of one clip that is spoken."""

    def __init__(
        self,
        at: np.ndarray,
        task: int,
        noisy: torch.Tensor,
        velocity: torch.Tensor,
        units: np.ndarray,
        dropped: np.ndarray,
    ) -> None:
        self.at, self.task, self.noisy, self.velocity = at, task, noisy, velocity
        self.units, self.dropped = units, dropped


def _joined(found: list[_Utterance]) -> Batch:
    first = [np.arange(len(one.at)) == 0 for one in found]
    owners = [np.full(len(one.at), number) for number, one in enumerate(found)]
    tasks = [np.full(len(one.at), one.task) for one in found]
    return {
        "spoken": ints(np.concatenate([one.at for one in found])),
        "first": torch.from_numpy(np.concatenate(first)),
        "owners": ints(np.concatenate(owners)),
        "speech_tasks": ints(np.concatenate(tasks)),
        "noisy": torch.cat([one.noisy for one in found]),
        "velocity": torch.cat([one.velocity for one in found]),
        "units": ints(np.concatenate([one.units for one in found])),
        "dropped": torch.from_numpy(np.concatenate([one.dropped for one in found])),
        "stops": ints(np.concatenate([labels(len(one.at)) for one in found])),
        "counted": ints(np.array([one.task >= 0 for one in found])),
    }


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: PatchEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> PatchLM:
    """The model of `model`, with an embedding for every token of the encoder's tokenizer; its heads
    from `seed` where it has none yet."""
    tokenizer, auto = encoder.tokenizer, net_class(model)
    with unread.deferring(False):
        if model_type(model) == MODEL_TYPE:
            net = loading.from_path(model, auto, quantization)
            loading.grow_vocabulary(net, len(tokenizer), seed)
            assert isinstance(net, PatchLMForCausalLM)
        else:
            net = _with_heads(_language_model(model, encoder, seed, quantization), encoder, seed)
    net.config.patch_token_id = encoder.patch_id
    net.config.latents = encoder.latents.facts
    return PatchLM(net, encoder, data.mode)


def _language_model(
    model: schema.Model, encoder: PatchEncoder, seed: int, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel:
    auto = net_class(model)
    if model.config is not None:
        settings = loading.fill_from_tokenizer(model.config, encoder.tokenizer)
        return loading.from_config(settings, auto, seed)
    found = loading.from_path(model, auto, quantization)
    loading.grow_vocabulary(found, len(encoder.tokenizer), seed)
    return found


def skeleton(model: schema.Model) -> PreTrainedModel:
    """The layers of the model without weights: see `loading.skeleton`."""
    found = loading.plain_skeleton(model)
    if isinstance(found, PatchLMForCausalLM):
        return found
    patches = settled(model)
    with on_meta():
        return PatchLMForCausalLM.around(found, _sizes(patches, latents_of(patches).width))


def _sizes(patches: Patches, latent: int) -> Callable[[PreTrainedConfig], PatchLMConfig]:
    """Makes the config of a net of that of its language model."""
    return lambda text: PatchLMConfig(
        text_config=text,
        latent_width=latent,
        patch_size=patches.size,
        flow_width=patches.width,
        flow_depth=patches.depth,
        flow_heads=patches.heads,
        flow_mlp=patches.mlp,
        flow_dropout=patches.dropout,
        roles=patches.roles,
    )


def _with_heads(
    language_model: PreTrainedModel, encoder: PatchEncoder, seed: int
) -> PatchLMForCausalLM:
    with loading.seeded(seed):
        sizes = _sizes(encoder.patches, encoder.latents.width)
        net = PatchLMForCausalLM.around(language_model, sizes)
    net.generation_config = language_model.generation_config
    return net
