"""flow_decoder: learns the velocity that carries noise to the mel that speech tokens say.

Stands between config and step. What a batch holds (R rows of T frames, N rows of codes):
    input_ids [R, N, codebooks]; rows, frames [R]     codes, as places in the table
    at, velocity, prompt [R, T, bins]                 the way from noise, and the mel that is given
    units, dropped [R]                                the time, and whether conditions are left out
    rows_of [R, T]                                    voicebox: the codes that a frame is spoken by
    voice [R, speaker_width]                          where the model reads one
    scored [R, T]; tasks [R]                          frames that the loss is of; -1: nobody's
Its one term, `flow`, is divided by the values that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from raysft.config import schema
from raysft.config.speaking import Speak
from raysft.data.encode import net_class
from raysft.data.example import MicroBatch, Sequence
from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.families.flow_decoder.draws import drawn
from raysft.families.flow_decoder.encode import CODES, DRAWS, MEL, VOICE, FlowEncoder
from raysft.families.flow_decoder.memory import kept
from raysft.families.flow_decoder.net import LOSSES, FlowDecoder
from raysft.losses.flow_matching import squares, way
from raysft.losses.term import Term, of_rows
from raysft.models import loading
from raysft.models.base import IGNORED, Batch, Document, SpeechModel
from raysft.models.flow_parts import T_UNITS
from raysft.models.layout import Static, as_weights, ints
from raysft.models.sampling import Velocity, guided, solve
from raysft.models.supervised import Losses

VALUES = "flow_values"


class FlowLosses(Losses):
    """The net with its loss as `forward`."""

    def forward(self, batch: Batch) -> list[Term]:
        """The term `flow`: squared errors over the frames that are scored; in training each example
        as its task weighs."""
        inputs = {name: value for name, value in batch.items() if name not in LOSSES}
        found = self.lm(**as_weights(inputs, self.lm)).velocity
        # The thread that lays out the next batches may add to the tasks.
        term = flow_term(found, batch, list(self.tasks), self.weights if self.training else {})
        return [term, *self.penalties(term.count)]


def flow_term(
    found: torch.Tensor, batch: Batch, names: Seq[str], weights: Mapping[str, float]
) -> Term:
    """The term `flow` of velocities [R, T, bins]. batch: has `LOSSES`. names: of tasks by number.
    weights: of tasks, 1 where none is given."""
    scored, bins = batch["scored"].to(torch.float32), batch["velocity"].shape[-1]
    each = (squares(found, batch["velocity"]) * scored).sum(1)
    counts = scored.sum(1) * bins
    return of_rows("flow", each, counts, batch["tasks"], names, weights, VALUES)


def scored_values(seeds: np.ndarray, frames: np.ndarray, config: FlowDecoderConfig) -> float:
    """What the loss of examples is divided by. seeds, frames: int [n], of each."""
    pairs = zip(seeds.tolist(), frames.tolist(), strict=True)
    scored = sum(drawn(seed, count, config)[0].scored for seed, count in pairs)
    return float(scored * config.settings.bins)


class FlowModel(SpeechModel):
    """A flow decoder of random weights, or of a folder's."""

    net: FlowDecoder
    writes = False

    def __init__(
        self, net: FlowDecoder, mode: Literal["packed", "padded"], encoder: FlowEncoder
    ) -> None:
        super().__init__(net, None, mode, [])
        self.config = encoder.config

    def _supervised(self, model: nn.Module) -> FlowLosses:
        return FlowLosses(model, self.tasks, self.task_weights)

    def _quiet(self, frames: int) -> Document:
        config = self.config
        rows = -(-frames // config.upsample)
        if config.of_voicebox:
            rows = max(1, int(rows_of(frames, 1 << 30, config)[-1]) + 1)
        codes = np.zeros((rows, len(config.codebooks or [])), np.int32)
        arrays: dict[str, list[np.ndarray]] = {
            CODES: [codes],
            MEL: [np.zeros((frames, config.settings.bins), np.float32)],
            DRAWS: [np.zeros(1, np.int64)],
        }
        if config.speaker_width:
            arrays[VOICE] = [np.ones((1, config.speaker_width), np.float32)]
        ids = np.zeros(frames, np.int32)
        return Document(ids, np.full(frames, IGNORED, np.int32), "none", arrays)

    def dummy_document(self) -> Document:
        """A few frames of a constant mel; nothing is learnt."""
        return self._quiet(2 * self.config.upsample)

    def full_document(self, length: int) -> Document:
        """So many frames of a constant mel; nothing is learnt."""
        return self._quiet(max(length, 1))

    def rows(
        self, documents: list[Document], side: Literal["right", "left"]
    ) -> tuple[Batch, Seq[int]]:
        """A padded row a document, and where each begins. Padding is on the right alone."""
        config, n = self.config, len(documents)
        codes = [document.arrays[CODES][0] for document in documents]
        mels = [document.arrays[MEL][0] for document in documents]
        rows = np.array([len(one) for one in codes])
        frames = np.array([len(one) for one in mels])
        ids = np.zeros((n, rows.max(), codes[0].shape[1]), np.int64)
        shape = (n, int(frames.max()), mels[0].shape[1])
        at, velocity, prompt = (torch.zeros(shape) for _ in range(3))
        scored, spoken = torch.zeros(shape[:2]), np.zeros(shape[:2], np.int64)
        units, dropped = np.zeros(n, np.int64), np.zeros(n, bool)
        for row, document in enumerate(documents):
            length = int(frames[row])
            ids[row, : rows[row]] = codes[row]
            draws, rng = drawn(int(document.arrays[DRAWS][0][0]), length, config)
            noise = torch.from_numpy(rng.standard_normal(mels[row].shape, np.float32))
            data = torch.from_numpy(np.ascontiguousarray(mels[row]))
            t = torch.tensor(draws.units / T_UNITS, dtype=torch.float32)
            at[row, :length], velocity[row, :length] = way(noise, data, t, float(config.sigma or 0))
            prompt[row, draws.start : draws.stop] = data[draws.start : draws.stop]
            units[row], dropped[row] = draws.units, draws.dropped
            if (document.labels != IGNORED).any():
                scored[row, :length] = 1
                if config.of_voicebox:
                    scored[row, draws.start : draws.stop] = 0
            if config.of_voicebox:
                spoken[row, :length] = rows_of(length, int(rows[row]), config)
        batch = {
            "input_ids": ints(ids),
            "rows": ints(rows),
            "frames": ints(frames),
            "at": at,
            "velocity": velocity,
            "prompt": prompt,
            "units": ints(units),
            "dropped": torch.from_numpy(dropped),
            "scored": scored,
        }
        if config.of_voicebox:
            batch["rows_of"] = ints(spoken)
        if config.speaker_width:
            voices = np.concatenate([document.arrays[VOICE][0] for document in documents])
            batch["voice"] = torch.from_numpy(voices)
        return batch, (np.arange(n) * shape[1]).tolist()

    @torch.no_grad()
    def speak(self, prompts: Seq[Sequence], seeds: Seq[int], settings: Speak) -> list[np.ndarray]:
        """See `SpeechModel.speak`. Prompts are padded on the right, and seen alone."""
        if not prompts:
            return []
        config, device = self.config, next(self.model.parameters()).device
        frames = [len(prompt.input_ids) for prompt in prompts]
        codes = [prompt.arrays[CODES][0] for prompt in prompts]
        shape = (len(prompts), max(frames), config.settings.bins)
        own_noise = [np.random.default_rng(seed) for seed in seeds]

        def normal() -> torch.Tensor:
            found = torch.zeros(shape)
            for row, (length, rng) in enumerate(zip(frames, own_noise, strict=True)):
                drawn = rng.standard_normal((length, shape[2]), np.float32)
                found[row, :length] = torch.from_numpy(drawn)
            return found.to(device)

        ids = np.zeros((len(prompts), max(map(len, codes)), codes[0].shape[1]), np.int64)
        spoken = np.zeros(shape[:2], np.int64)
        for row, (length, own) in enumerate(zip(frames, codes, strict=True)):
            ids[row, : len(own)] = own
            spoken[row, :length] = rows_of(length, len(own), config)
        told: Batch = {
            "input_ids": ints(ids),
            "rows": ints(np.array([len(own) for own in codes])),
        }
        if config.of_voicebox:
            told["rows_of"] = ints(spoken)
        if config.speaker_width:
            voices = np.concatenate([prompt.arrays[VOICE][0] for prompt in prompts])
            told["voice"] = torch.from_numpy(voices)
        told = as_weights({name: value.to(device) for name, value in told.items()}, self.net)
        there = torch.arange(shape[1], device=device) < torch.tensor(frames, device=device)[:, None]

        def by(nothing: bool) -> Velocity:
            dropped = torch.full((len(prompts),), nothing, device=device)
            mean, speaker = self.net.conditions(length=shape[1], dropped=dropped, **told)
            given = torch.zeros(shape, dtype=mean.dtype, device=device)

            def velocity(where: torch.Tensor, t: float) -> torch.Tensor:
                units = torch.full((len(prompts),), round(t * T_UNITS), device=device)
                where = where.to(mean.dtype)
                found = self.net.decoder(where, units, mean, given, speaker, there)
                return cast(torch.Tensor, found).float() * there.unsqueeze(2)

            return velocity

        training = self.model.training
        self.model.eval()
        try:
            guidance = settings.flow.guidance
            given = by(False)
            velocity = guided(given, by(True) if guidance else given, guidance)
            found = solve(velocity, normal(), settings.flow, normal)
        finally:
            self.model.train(training)
        return [row[:length].numpy() for row, length in zip(found.cpu(), frames, strict=True)]

    def collate(
        self,
        mb: MicroBatch,
        side: Literal["right", "left"] = "right",
        static: Static | None = None,
    ) -> Batch:
        """CPU tensors of one micro-batch, as the module's docstring says; of an empty one a row of
        nothing that counts."""
        documents = self.documents(mb) if len(mb.lengths) else []
        real = bool(documents)
        if not real:
            documents = [self.dummy_document()]
        batch, _ = self.rows(documents, side)
        tasks = [self._task_number(document.task) if real else -1 for document in documents]
        return batch | {"tasks": ints(np.array(tasks))}

    def computed(self, batch: Batch) -> int:
        """Frames, padding among them."""
        rows, length = batch["at"].shape[:2]
        return rows * length

    def counts(self, mb: MicroBatch) -> dict[str, float]:
        """supervised: frames that are scored; squares: of all frames' numbers; and the values that
        the loss is divided by."""
        values = 0.0
        if len(mb.lengths):
            values = scored_values(mb.arrays[DRAWS].values, mb.lengths, self.config)
        squared = float(np.square(mb.lengths, dtype=np.float64).sum())
        scored = values / self.config.settings.bins
        return {"supervised": scored, "squares": squared, VALUES: values}

    def kept(self, positions: int, width: int, checkpointing: bool) -> float:
        """See `memory.kept`."""
        return kept(self.net, positions, width, checkpointing)

    def freeze_unreached(self) -> list[str]:
        """Nothing: every batch reaches every parameter of the net."""
        return []

    def save_processor(self, folder: Path) -> None:
        """Nothing: what a mel is stands in the config."""


def rows_of(frames: int, rows: int, config: FlowDecoderConfig) -> np.ndarray:
    """int64 [frames]: the row of codes that sounds in the middle of each frame, the last behind
    them all."""
    mel = config.settings
    seconds = (np.arange(frames) + 0.5) * mel.hop / mel.rate
    found = np.floor(seconds * float(config.tokens_per_second or 1)).astype(np.int64)
    return np.minimum(found, rows - 1)


def make_model(
    model: schema.Model,
    data: schema.Data,
    encoder: FlowEncoder,
    seed: int,
    quantization: BitsAndBytesConfig | None = None,
) -> FlowModel:
    """The model of `model`."""
    auto = net_class(model)
    if model.config is not None:
        net = loading.from_config(model.config, auto, seed)
    else:
        net = loading.from_path(model, auto, quantization)
    assert isinstance(net, FlowDecoder)
    return FlowModel(net, data.mode, encoder)
