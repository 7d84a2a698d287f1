"""What one training worker does: build the model, join the stream, train, evaluate.

Called by `launch` in every Ray Train worker at every (re)start, with readers of its stream. Runs
without Ray too: tests and benchmarks give it readers in their own process (`Data.in_process`).
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from raysft import models
from raysft.config import Config, losses
from raysft.config.moe import Backend
from raysft.config.strategies import traits_of
from raysft.data.encode import Encoder
from raysft.data.example import MicroBatch
from raysft.data.facts import reference_of
from raysft.data.index.build import Index
from raysft.data.plan.generations import open_index
from raysft.data.read.reader import Reader, Work
from raysft.errors import UserError
from raysft.evaluate.judging import judged
from raysft.evaluate.run import Corpus, evaluate
from raysft.json_types import JsonObject
from raysft.models import experts, fastest
from raysft.models.attention import used as attention_used
from raysft.models.base import SpeechModel
from raysft.models.experts import why_not
from raysft.models.layout import Static
from raysft.models.modality import CONFIG
from raysft.models.reach import summary
from raysft.objectives import build as objectives
from raysft.parallel import Strategy, World, determinism, make_strategy, precision, unread
from raysft.parallel.blocks import blocks, experts_of
from raysft.parallel.native import HALF
from raysft.patience import patient
from raysft.run import plans
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Measure, spoken_of
from raysft.run.folder import EXPERTS, check_base, initial_weights
from raysft.run.storage import write_whole
from raysft.scorers.rated import Rated
from raysft.train.checkpoint import load_weights, newest_sound
from raysft.train.feed import Feed, one_shape
from raysft.train.flops import cost_of, formula_holds
from raysft.train.job import Job
from raysft.train.replicas import Copies
from raysft.train.replicas import settled as settled_copies

if TYPE_CHECKING:
    from raysft.adapters.attach import PeftAdapters

Progress = Callable[[JsonObject], None]
Read = Callable[[Iterator[Work]], Iterator[MicroBatch]]
Seen = Callable[[int, int], None]
Tell = Callable[[str], None]
Hear = Callable[["Evaluation", bool, Path | None, Seen, Tell], dict[str, float]]


@dataclass
class Data:
    """Examples and how to read them.

    examples: of the training data, usable or not: what data.max_quarantined is a share of.
    hear: measures what the model speaks, where that is asked for (`raysft.hearing`); None: nobody.
    """

    examples: int
    eval: Index | None
    encoder: Encoder
    read_train: Read | None
    read_eval: Read | None
    hear: Hear | None = None

    @classmethod
    def in_process(
        cls, config: Config, encoder: Encoder, folder: Path, train: Index, evaluation: Index | None
    ) -> Data:
        """Read in this process, without Ray. folder: the run's, as `prepare` left it."""
        budget = config.data.budget
        read_eval = None
        if evaluation is not None:
            read_eval = Reader(evaluation, encoder, config.evaluate.tokens_per_batch, None).read
        index = open_index(plans.places(folder))
        reader = Reader(index, encoder, budget, config.run.seed)
        examples = len(train) + len(train.rejected)
        return cls(examples, evaluation, encoder, reader.read, read_eval)


def build_model(
    config: Config, encoder: Encoder, total_steps: int, later: bool = False
) -> tuple[SpeechModel, PeftAdapters | None]:
    """The model on the CPU, as a strategy takes it: with what `peft` and `train` do to it.

    total_steps: of the run; 0: it is not to be trained to an end. later: matrices are stand-ins
    where they can be (`parallel.unread`), for a strategy that reads them when it shards them, or
    for who asks for shapes only.
    """
    quantization = None
    if config.peft.method == "qlora":
        from raysft.models.quantized import nf4

        quantization = nf4(config)
    with unread.deferring(later and reads_later(config)):
        speech_model = models.build(
            config.model, config.data, encoder, config.run.seed, quantization
        )
    speech_model.task_weights.update(config.train.task_weights)
    speech_model.more_losses += [
        (name, losses.load(name), weight) for name, weight in config.train.losses.items()
    ]
    adapters = None
    if config.peft.method != "none":
        from raysft.adapters.attach import add_adapters  # peft takes 2 s to import

        adapters = add_adapters(speech_model, config, total_steps)
    elif config.train.freeze:
        speech_model.freeze(config.train.freeze)
    objectives.prepare(config, speech_model)
    if config.train.gradient_checkpointing:
        speech_model.enable_gradient_checkpointing()
    return speech_model, adapters


def build_to_wrap(
    config: Config, encoder: Encoder, total_steps: int
) -> tuple[SpeechModel, PeftAdapters | None]:
    """As `build_model`, for `wrap`: with stand-ins where the strategy reads what they stand for."""
    later = traits_of(config.parallel.strategy).reads
    return build_model(config, encoder, total_steps, later)


def reads_later(config: Config) -> bool:
    """Whether a model may have stand-ins for its matrices: it comes from `model.path`, and nothing
    is computed of them whole before a strategy has them: their norms (dora), rows of tokens
    (prompt), or 4 bits of them (qlora).
    """
    looks = config.peft.dora or config.peft.method in ("prompt", "qlora")
    return config.model.path is not None and not looks


def build_job(
    config: Config,
    folder: Path,
    world: World,
    data: Data,
    total_steps: int,
    progress: Progress | None = None,
) -> Job:
    """Model, strategy, plan and feed of one worker. `folder`: the run's, with its config.yaml.

    Raises UserError where this machine has another base at model.path than the run began with.
    """
    config = settled(config, world)
    check_base(config, folder)
    speech_model, adapters = build_to_wrap(config, data.encoder, total_steps)
    config, tried = settle_experts(config, folder, world, speech_model)
    speech_model.tasks[:] = plans.tasks(folder)
    sizes = sizes_of(speech_model)
    cost = None
    if world.is_main and formula_holds(speech_model.net):  # it writes the metrics
        cost = cost_of(speech_model.model, speech_model.unreached)
    config, copies = settled_copies(config, speech_model, world)
    if copies is not None:
        tried = {**tried, "replicate": {"copies": copies.number, "why": copies.why}}
    strategy = wrap(config, speech_model, world)
    if (held := getattr(strategy, "gradients", None)) is not None:
        tried = {**tried, "gradients": held}
    static = one_shape(config, world.device)
    shapes = Static(config.data.budget) if static else None
    initial = initial_weights(folder)
    built = objectives.build(config, speech_model, strategy, world, shapes, initial)
    settings, half = config.data, config.train.precision != "fp32"
    slow = _slow_experts(config, speech_model, world)
    if slow is not None and world.is_main and progress is not None:
        progress({"event": "warning", "reason": slow})
    assert data.read_train is not None  # what trains reads
    feed = Feed(
        plans.load(folder),
        settings.lanes,
        speech_model,
        data.read_train,
        world,
        total_steps,
        settings.prefetch,
        shapes,
        built.lay_out,
    )
    return Job(
        config=config,
        folder=folder,
        world=world,
        strategy=strategy,
        stream=feed,
        tasks=list(speech_model.tasks),
        total_steps=total_steps,
        examples=data.examples,
        catalogue=Catalogue.of(config.checkpoint, folder),
        evaluate=Evaluation(config, world, data, speech_model, strategy)
        if data.eval is not None
        else None,
        progress=progress if world.is_main else None,
        weights=initial,
        objective=built.objective,
        identity=plans.identity(folder),
        adapters=adapters,
        cost=cost,
        routing=speech_model.routing,
        start={
            "precision": config.train.precision,
            "attention": attention_used(speech_model.model, world.device, half),
            "static_shapes": static,
            "proof": speech_model.verdict.describe(),
            **({"unreached": list(speech_model.unreached)} if speech_model.unreached else {}),
            **tried,
            **({"slow": slow} if slow is not None else {}),
            **sizes,
        },
        extras=_extras(speech_model, folder) if world.is_main else {},
    )


def sizes_of(speech_model: SpeechModel) -> dict[str, int]:
    """Parameters, and those of them that train; two of 4 bits lie in each byte."""
    parameters = list(speech_model.model.parameters())
    return {
        "parameters": sum(p.numel() * (1 if p.is_floating_point() else 2) for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def describe(job: Job) -> str:
    """The model, for the summary at the start."""
    parameters, trained = job.start["parameters"], job.start["trained"]
    method = job.config.peft.method
    how = "" if method == "none" else f" ({method})"
    said = f"model   {parameters:,} parameters, {trained:,} of them train{how}"
    if unreached := job.start.get("unreached"):
        said += f"\nfrozen  {len(unreached)} that no batch reaches: {summary(unreached)}"
    if (copies := job.start.get("replicate")) is not None and copies["copies"] > 1:
        said += f"\nshards  {Copies(copies['copies'], copies['why']).describe(job.world.size)}"
    return said


def wrap(config: Config, speech_model: SpeechModel, world: World) -> Strategy:
    """The model in its strategy, compiled where `train.compile` says so; torch as `settled` sets
    it."""
    config, _ = settled_copies(settled(config, world), speech_model, world)
    if config.model.moe is not None:
        chosen = config.model.moe.experts
        backend: Backend = "torch" if chosen == "auto" else chosen
        experts.require(backend, world.device, _dtype(config))
        experts.use(speech_model.net, backend)
    if config.train.compile:
        from raysft.models.compiled import compile_blocks

        fixed = set()
        if one_shape(config, world.device):  # an encoder's clips are as many as they are
            fixed = set(speech_model.net.get_decoder().modules())
        compile_blocks(blocks(speech_model.supervised), world.device, fixed)
    world.barrier()  # some have loaded for longer; what follows is a collective of the GPUs
    return make_strategy(config, speech_model.supervised, world)


def settled(config: Config, world: World) -> Config:
    """`config` in the precision that auto is on this device. Lets torch compute, in this process,
    as `train.deterministic` and `train.tf32` say: before it computes anything."""
    determinism.settle(config.train.deterministic, world.device)
    precision.use_tf32(config.train.tf32)
    return precision.settled(config, world.device)


def settle_experts(
    config: Config, folder: Path, world: World, speech_model: SpeechModel
) -> tuple[Config, JsonObject]:
    """`config` with what model.moe.experts: auto means in the run in `folder`, and the facts of it.

    It is tried once, by the first start, and kept: another way to compute has other last bits. A
    collective.
    """
    if config.model.moe is None or config.model.moe.experts != "auto":
        return config, {}
    known: JsonObject | None = None
    if world.is_main:
        known = kept_experts(folder)
        if known is None:
            tried = fastest.milliseconds(
                speech_model.net, world.device, _dtype(config), config.data.budget
            )
            known = {"backend": min(tried.ms, key=tried.ms.__getitem__), "ms": tried.ms}
            if tried.failed:
                known["failed"] = tried.failed
            write_whole(folder / EXPERTS, json.dumps(known).encode())
    known = world.share(known)
    assert known is not None
    return _with_experts(config, known["backend"]), {"experts": known}


def _slow_experts(config: Config, speech_model: SpeechModel, world: World) -> str | None:
    """What makes the products of a mixture's experts slow here; None: nothing does."""
    if world.device.type != "cuda" or not experts_of(speech_model.net):
        return None
    backend = "torch" if config.model.moe is None else config.model.moe.experts
    capability = torch.cuda.get_device_capability(world.device)
    return experts.slow(backend, _dtype(config), capability)


@patient
def kept_experts(folder: Path) -> JsonObject | None:
    """By what the experts of the run in `folder` compute, and what was measured; None: not tried
    yet."""
    written = folder / EXPERTS
    return json.loads(written.read_bytes()) if written.is_file() else None


def _with_experts(config: Config, backend: Backend) -> Config:
    moe = config.model.moe
    assert moe is not None
    model = config.model.model_copy(update={"moe": moe.model_copy(update={"experts": backend})})
    return config.model_copy(update={"model": model})


def _dtype(config: Config) -> torch.dtype:
    return HALF.get(config.train.precision, torch.float32)


@patient
def _extras(speech_model: SpeechModel, folder: Path) -> dict[str, bytes]:
    """What goes into each checkpoint beside the state: config, tokenizer, feature extractor."""
    found = {}
    if (folder / "config.yaml").is_file():
        found["config.yaml"] = (folder / "config.yaml").read_bytes()
    if speech_model.routing is not None and speech_model.routing.plan is not None:
        plan = speech_model.routing.plan.to_json()  # for an adapter: its base knows of none
        found[f"processor/{CONFIG}.json"] = json.dumps(plan).encode()
    with tempfile.TemporaryDirectory() as scratch:
        speech_model.save_processor(Path(scratch))
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                found[f"processor/{path.relative_to(scratch)}"] = path.read_bytes()
    return found


@dataclass
class Evaluation:
    """Evaluates what a strategy holds on `data.eval`: what `job.Evaluate` asks for."""

    config: Config
    world: World
    data: Data
    speech_model: SpeechModel
    strategy: Strategy

    def measure(self, final: bool) -> Measure:
        """What an evaluation would measure."""
        assert self.data.eval is not None  # who makes one sees to it
        return Measure.taken(self.data.eval, self.config.evaluate, final, self.config.speak)

    def __call__(
        self,
        final: bool,
        predictions: Path | None = None,
        seen: Callable[[int, int], None] = lambda done, total: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> dict[str, float]:
        """Figures by name. A collective."""
        index, read, strategy = self.data.eval, self.data.read_eval, self.strategy
        assert index is not None and read is not None
        names = [source.name for source in index.sources]
        judges = judged(index.tasks, self.config.evaluate.metrics)

        def references(rows: np.ndarray) -> list[str | None]:
            return [reference_of(example) for example in index.examples(rows)]

        def rated(rows: np.ndarray) -> list[tuple[Rated, ...]]:
            return [example.rated for example in index.examples(rows)]

        def batches(rows: list[np.ndarray]) -> Iterator[MicroBatch]:
            return read(Work(0, number, 0, chosen) for number, chosen in enumerate(rows))

        with strategy.whole() as whole:
            synced = traits_of(self.config.parallel.strategy).synced and whole is not True
            found = evaluate(
                strategy.module,
                self.speech_model,
                Corpus(index.tokens, index.source, names, references, rated if judges else None),
                batches,
                self.config.evaluate,
                self.world,
                strategy.autocast,
                final,
                predictions=predictions,
                synced=synced,
                seen=seen,
                tell=tell,
            )
            if final and self.data.hear is not None:
                folder = None if predictions is None else spoken_of(predictions)
                found |= self.data.hear(self, synced, folder, seen, tell)
        return found


@dataclass
class Evaluator:
    """What an evaluation needs of a `Job`, of a worker that does not train."""

    world: World
    strategy: Strategy
    catalogue: Catalogue
    evaluate: Evaluation


def build_evaluator(config: Config, run: Path, world: World, data: Data) -> Evaluator:
    """Model and strategy of one worker, for checkpoints of the run in `run`."""
    config = settled(config, world)
    check_base(config, run)
    speech_model, _ = build_to_wrap(config, data.encoder, 0)
    if config.model.moe is not None and config.model.moe.experts == "auto":
        known = kept_experts(run)
        # It may have been found on another kind of device than is here.
        if known and why_not(known["backend"], world.device, _dtype(config)) is None:
            config = _with_experts(config, known["backend"])
    strategy = wrap(config, speech_model, world)
    evaluation = Evaluation(config, world, data, speech_model, strategy)
    return Evaluator(world, strategy, Catalogue.of(config.checkpoint, run), evaluation)


def evaluate_checkpoint(
    job: Evaluator | Job,
    step: int | None = None,
    predictions: Path | None = None,
    seen: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
    final: bool = True,
) -> dict[str, float]:
    """Figures of the checkpoint of `step` (None: the newest sound one) on all of data.eval; not
    final: on what is evaluated while training.

    A collective. Writes `predictions` and nothing else. Raises UserError where the checkpoint is
    damaged, or gone: the run that it belongs to may have deleted it meanwhile.
    """
    assert job.evaluate is not None  # checked by the job's entry
    world = job.world
    if step is None:
        saved, _ = newest_sound(job.catalogue, world)
        assert saved is not None
    else:
        saved = Saved(step, job.catalogue.storage)
        reasons = world.gather(saved.damage(world.rank, world.size))
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            raise UserError(
                f"{reason}. If the run goes on and has deleted this checkpoint since, evaluate "
                "again, or raise its checkpoint.keep"
            )
    load_weights(saved, job.strategy)
    job.strategy.module.eval()
    return job.evaluate(final, predictions, seen, tell)


def device_of(config: Config, gpu: bool | None = None) -> torch.device:
    """Where this worker computes. gpu: whether it was given one; None: nobody gives any, and
    `parallel.device` decides by what is here.

    Raises UserError where it was to have a GPU and torch finds none.
    """
    there = torch.cuda.is_available()
    if not there and (gpu or config.parallel.device == "cuda"):
        raise UserError(
            f"parallel.device: {config.parallel.device}, but torch finds no GPU on "
            f"{socket.gethostname()}: look at `nvidia-smi` there and at `python -c 'import torch; "
            "print(torch.version.cuda)'`, take the node out, or set parallel.device=cpu"
        )
    if gpu is False or config.parallel.device == "cpu" or not there:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
