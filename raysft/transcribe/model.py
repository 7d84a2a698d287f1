"""What answers: a run at one of its checkpoints, adapters included, or a model as others have it.

Costs the base's read and the checkpoint's; weights lie in float32, of a model in half precision on
a GPU in that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from raysft import hub, paths, patience
from raysft.config import Config
from raysft.config.schema import Data, Model
from raysft.data.clips.audio import Limits
from raysft.data.encode import Encoder, make_encoder, model_family, require_template
from raysft.data.example import Sequence as Encoded
from raysft.errors import UserError
from raysft.models.base import SpeechModel
from raysft.models.generation import Within
from raysft.parallel.native import HALF
from raysft.parallel.precision import settled
from raysft.run import stages
from raysft.run.catalogue import Saved
from raysft.run.evaluations import choose
from raysft.run.folder import check_base, read_config
from raysft.train.checkpoint import read_weights
from raysft.worker import build_model

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
UNIT_FORMS = ("<|unit{}|>", "<audio_{}>", "[Hu{}]")  # that published models have
LAYERS = ("LORA", "ADALORA", "IA3")  # adapters of layers, not of positions


@dataclass
class Answering:
    """A model that answers. config: the run's; of a model, its path and defaults."""

    name: str
    config: Config
    encoder: Encoder
    speech_model: SpeechModel
    autocast: Callable[[], AbstractContextManager[object]]

    def generate(
        self, prompts: Sequence[Encoded], most: int, within: Within | None = None
    ) -> list[str]:
        """Answers of at most so many tokens, in order; within: see `SpeechModel.generate`."""
        with torch.inference_mode(), self.autocast():
            return self.speech_model.generate(prompts, most, within=within)

    @property
    def speaker(self) -> Answering | None:
        """The decoder that stands in the same model; None: there is none."""
        encoder, model = self.encoder.speaker, self.speech_model.speaker
        if encoder is None or model is None:
            return None
        return replace(self, encoder=encoder, speech_model=model)


def load(given: str, checkpoint: str | None = None) -> Answering:
    """The model that `given` names: a run's folder, a folder with weights or an adapter, a hub id.

    checkpoint: of a run, a step, `best` or `last` (None: last). On a GPU where there is one. Raises
    UserError where there is no such model, or it cannot be had.
    """
    name = paths.model(given)
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, checkpoint or "last")
    if checkpoint is not None:
        raise UserError(
            f"--checkpoint: {given} is no run's folder, which alone has some; leave it out"
        )
    if (folder / ADAPTER).is_file():
        return _of_adapter(given, folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        stages.refuse_folder(folder)
        raise UserError(
            f"{given}: neither a run (config.yaml) nor a model (config.json) nor an adapter is here"
        )
    hub.check(name, "RUN_OR_FOLDER")
    config = Config(model=_of_units(Model(path=name), folder), data=Data(mode="padded"))
    # Of no run's folder: what is fitted or kept for one is not looked for in a model's.
    encoder, speech_model = _build(config, folder / "no-run")
    return _ready(given, config, encoder, speech_model, _device(), _halved(config, speech_model))


def _of_run(run: Path, word: str) -> Answering:
    config = read_config(run)
    patience.allow(config.patience_s)
    found, skipped = choose(run, config.checkpoint, word, Saved.damage, "--checkpoint")
    for reason in skipped:
        log.warning("skipped: %s", reason)
    require_template(run)
    check_base(config, run)
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    config = config.model_copy(update={"train": train})
    encoder, speech_model = _build(config, run)
    weights = read_weights(found)
    supervised, adapted = speech_model.supervised, config.peft.method != "none"
    wanted = {name for name, p in supervised.named_parameters() if p.requires_grad or not adapted}
    if lacking := wanted - weights.keys():
        raise ValueError(f"the checkpoint lacks {len(lacking)} weights, such as {min(lacking)}")
    supervised.load_state_dict(weights, strict=False)
    device = _device()
    half = HALF.get(settled(config, device).train.precision)
    return _ready(f"{run}, step {found.step}", config, encoder, speech_model, device, half)


def _of_adapter(given: str, folder: Path) -> Answering:
    """An adapter over its base, in peft's layout, with the tokenizer and template it has."""
    settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind not in LAYERS or not base:
        wrong = f"an adapter of type {kind}" if base else "an adapter that does not name its base"
        raise UserError(f"{given}: {wrong}; name the run's folder, or export the run with --merge")
    model = Model(path=paths.model(base))
    hub.check(base, f"{given}: base_model_name_or_path")
    if model_family(model).every_causal_lm:  # whose units may be new
        model.tokenizer = str(folder)
    config = Config(model=_of_units(model, folder), data=Data(mode="padded"))
    encoder, speech_model = _build(config, folder)
    half = _halved(config, speech_model)

    from peft import PeftModel  # it takes 2 s to import

    speech_model.wrap(PeftModel.from_pretrained(speech_model.net, str(folder)))
    return _ready(given, config, encoder, speech_model, _device(), half)


def _of_units(model: Model, folder: Path) -> Model:
    """With the name of its units, which an exported folder does not say but in its tokens."""
    known = folder / "tokenizer.json"
    names = known.read_text(encoding="utf-8") if known.is_file() else ""
    forms = (form for form in UNIT_FORMS if json.dumps(form.format(0)) in names)
    return model.model_copy(update={"unit_token": next(forms, model.unit_token)})


def _build(config: Config, run: Path) -> tuple[Encoder, SpeechModel]:
    encoder = make_encoder(config.model, config.data, run)
    # What training leaves out (silence, long clips) is transcribed as it is.
    latents = encoder.limits.latents
    encoder.limits = Limits(read_timeout_s=config.data.read_timeout_s, latents=latents)
    speech_model, _ = build_model(config, encoder, 0)
    learned = speech_model.verdict.learned
    encoder.limit(None if learned is None else learned - speech_model.virtual)
    return encoder, speech_model


def _halved(config: Config, speech_model: SpeechModel) -> torch.dtype | None:
    """Half precision, where the model's files are in it and a GPU computes: matrices are stored in
    it from here on, norms and biases stay."""
    half = AutoConfig.from_pretrained(config.model.path).dtype
    if _device().type == "cpu" or half not in HALF.values():
        return None
    for parameter in speech_model.net.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(half)
    return half


def _ready(
    name: str,
    config: Config,
    encoder: Encoder,
    speech_model: SpeechModel,
    device: torch.device,
    half: torch.dtype | None,
) -> Answering:
    """half: what matrix products are computed in; None: as the weights are."""
    speech_model.model.to(device)
    speech_model.model.eval()
    autocast = nullcontext if half is None else partial(torch.autocast, device.type, dtype=half)
    return Answering(name, config, encoder, speech_model, autocast)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
