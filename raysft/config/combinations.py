"""Keys that are each right but do not go together: found before anything starts.

Pure functions of the config; what only the model's files can tell is refused where it is built.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from raysft.config.deepspeed import check as check_deepspeed
from raysft.config.deepspeed import wrong_stage
from raysft.config.families import AUTO, Family, any_text, named, owner
from raysft.config.learnt import check as check_objective
from raysft.config.modality import read_groups
from raysft.config.schema import Config, Optim, Peft, Section
from raysft.config.strategies import names, traits_of
from raysft.errors import Mistake
from raysft.json_types import JsonObject

# Which keys of `peft` a method reads; `path` and `method` go with every one.
_TARGETS = ("target_modules", "exclude_modules", "modules_to_save")
_LORA = ("r", "alpha", "dropout", *_TARGETS)
PEFT_KEYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": (*_LORA, "rslora", "dora", "experts"),
    "qlora": (*_LORA, "rslora", "dora", "experts"),
    "adalora": (*_LORA, "init_r", "tinit", "tfinal", "every"),
    "ia3": _TARGETS,
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
}
RANKS = 8  # of experts' adapters: numbers of bfloat16 in 16 bytes
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


class _Found(list[Mistake]):
    def add(self, key: str, why: str) -> None:
        """One more: what is wrong with `key`, and the remedy."""
        self.append(Mistake.of(key, why))


def contradictions(config: Config) -> list[Mistake]:
    """One for each contradiction, with the remedy."""
    return [
        *_run(config),
        *_strategy(config),
        *check_deepspeed(config),
        *_peft(config),
        *_experts(config),
        *_optim(config),
        *check_objective(config, _row_of(config)),
        *_kinds(config),
        *_augment(config),
    ]


def _run(config: Config) -> list[Mistake]:
    found = _Found()
    name = config.run.name
    if not name or Path(name).name != name or name in (".", "..") or not name.isprintable():
        found.add(
            "run.name", f"{name!r} is not a plain folder name; folders go to run.storage_path"
        )
    if config.parallel.max_workers > config.data.lanes:
        found.add(
            "parallel.workers",
            f"{config.parallel.max_workers} workers share data.lanes: "
            f"{config.data.lanes}, so some would have nothing to do; "
            f"raise data.lanes or use at most {config.data.lanes} workers",
        )
    if (config.model.path is None) == (config.model.config is None):
        given = "both are" if config.model.path else "neither is"
        found.add(
            "model",
            f"{given} given: set model.path (a folder or hub id with weights) "
            "or model.config (random weights)",
        )
    path = config.model.path
    if config.model.revision is not None and (path is None or Path(path).is_dir()):
        given = "model.config" if path is None else f"a folder ({path})"
        found.add("model.revision", f"does nothing with {given}; remove it")
    if config.model.config is not None:
        if "model_type" not in config.model.config:
            found.add("model.config.model_type", "missing; e.g. qwen3, llama or qwen2_audio")
        row = _row_of(config)
        if config.model.tokenizer is None and (row is None or row.writes):
            found.add("model.tokenizer", "needed with model.config: a folder, a hub id or `bytes`")
    temperature = config.data.temperature
    if temperature is not None and temperature.by == "task" and config.data.mix:
        found.add(
            "data.temperature.by",
            "task beside data.mix, which says the shares of tasks: leave one of them out",
        )
    if not config.data.train:
        found.add("data.train", "empty; name at least one source, e.g. data.train: [train.jsonl]")
    if config.data.speech_tokens and config.model.speech_units:
        found.add(
            "model.speech_units",
            "contradicts data.speech_tokens, whose clusters are the units; remove one of the two",
        )
    if config.checkpoint.best and not (config.evaluate.every and config.data.eval):
        found.add(
            "checkpoint.best",
            "nothing measures it while training; set data.eval and evaluate.every",
        )
    if config.evaluate.every and not config.data.eval:
        found.add(
            "evaluate.every",
            f"{config.evaluate.every}, but data.eval names no source; name one "
            "(data.eval=[dev.jsonl]), or set evaluate.every=0",
        )
    if config.evaluate.beside and not config.evaluate.every:
        found.add(
            "evaluate.beside",
            "there is nothing to evaluate while training goes on with evaluate.every: 0; set the "
            "steps between evaluations, or leave it out",
        )
    if config.evaluate.workers != 1 and not config.evaluate.beside:
        found.add(
            "evaluate.workers",
            "only evaluate.beside has workers that evaluate; set that, or leave it out",
        )
    asked = next((key for key in ("asr", "speakers") if getattr(config.evaluate, key)), None)
    if asked and not (config.data.eval and config.evaluate.generate):
        why = "no source" if config.evaluate.generate else "sources, but evaluate.generate is false"
        found.add(
            f"evaluate.{asked}",
            f"nothing is spoken: data.eval names {why}; change that, or leave this key out",
        )
    if config.evaluate.metrics.get("tts"):
        found.add(
            "evaluate.metrics.tts",
            "answers of tts are speech, which no metric of texts can measure; leave it out",
        )
    if config.evaluate.spelling and "whisper_english" not in config.evaluate.normalize:
        found.add(
            "evaluate.spelling",
            "belongs to Whisper's English normaliser; set evaluate.normalize: "
            "[whisper_english], or leave it out",
        )
    return found


def _strategy(config: Config) -> list[Mistake]:
    found = _Found()
    parallel, strategy = config.parallel, config.parallel.strategy
    traits = traits_of(strategy)
    settings = config.model.config
    if "experts" in traits.shards and settings and not any(key in settings for key in EXPERTS):
        found.add(
            "parallel.strategy",
            f"{strategy} shares the experts of a mixture among workers, but "
            f"{settings.get('model_type')} has none (of {', '.join(EXPERTS)}, none is set); "
            "use fsdp or zero3",
        )
    if (size := parallel.ep_size) is not None:
        if "experts" not in traits.shards:
            able = names(lambda other: "experts" in other.shards)
            found.add(
                "parallel.ep_size",
                f"only {' or '.join(able)} shares experts, not parallel.strategy: {strategy}",
            )
        elif parallel.elastic or parallel.max_workers % size:
            found.add(
                "parallel.ep_size",
                f"{size} workers with all experts between them need a fixed number of workers that "
                f"is a multiple of it, not parallel.workers: {parallel.workers}",
            )
    if parallel.gradients != "auto" and not traits.turns:
        found.add(
            "parallel.gradients",
            f"{strategy} leaves no choice of what is held between turns, "
            f"{' and '.join(names(lambda other: other.turns))} do; leave it out",
        )
    if parallel.replicate != "auto" and parallel.replicate > 1:
        if not traits.replicates:
            able = names(lambda other: other.replicates)
            found.add(
                "parallel.replicate",
                f"only {' or '.join(able)} has copies of shards, not {strategy}",
            )
        elif parallel.elastic or parallel.max_workers % parallel.replicate:
            found.add(
                "parallel.replicate",
                f"{parallel.replicate} copies need a fixed number of workers "
                f"that is a multiple of it, not parallel.workers: {parallel.workers}",
            )
    if parallel.offload != "none" and parallel.offload not in traits.offloads:
        remedy = f"use {' or '.join(traits.offloads)}" if traits.offloads else "remove it"
        able = names(lambda other: parallel.offload in other.offloads)
        found.add(
            "parallel.offload",
            f"{parallel.offload} does not go with parallel.strategy: {strategy}; "
            f"{remedy} ({parallel.offload} goes with {', '.join(able)})",
        )
    if parallel.deepspeed is not None and traits.stage is None and not wrong_stage(config):
        found.add(
            "parallel.deepspeed",
            f"does nothing with parallel.strategy: {strategy}; "
            "use zero1, zero2 or zero3, or remove it",
        )
    if parallel.memory_gb is not None and config.data.tokens_per_batch != "auto":
        found.add(
            "parallel.memory_gb",
            "only data.tokens_per_batch: auto reads it; set that, or remove it",
        )
    for refusal in traits.refuses:
        if attrgetter(refusal.key)(config) == refusal.value:
            found.add(refusal.key, refusal.why)
    return found


def _experts(config: Config) -> list[Mistake]:
    found = _Found()
    backend = config.model.moe.experts if config.model.moe is not None else "auto"
    if backend in ("grouped_gemm", "sonicmoe"):
        if config.train.precision not in ("bf16", "auto"):
            found.add(
                "model.moe.experts",
                f"{backend} computes in bfloat16 only; set train.precision: bf16, or use torch",
            )
        if config.parallel.device == "cpu":
            found.add(
                "model.moe.experts",
                f"{backend} computes on GPUs only, and parallel.device is cpu; use torch",
            )
    peft = config.peft
    if peft.experts and backend == "sonicmoe":
        found.add(
            "model.moe.experts",
            "sonicmoe multiplies by whole matrices only, and peft.experts puts adapters beside "
            "them; use torch or grouped_gemm",
        )
    if peft.experts and peft.r % RANKS:
        below, above = peft.r // RANKS * RANKS, (peft.r // RANKS + 1) * RANKS
        found.add(
            "peft.r",
            f"{peft.r}, but with peft.experts a multiple of {RANKS}: grouped products take rows of "
            f"16 bytes; use {f'{below} or ' if below else ''}{above}",
        )
    if peft.experts and peft.dora:
        found.add(
            "peft.dora",
            "does not go with peft.experts: peft knows no magnitudes of experts; leave one out",
        )
    return found


def _peft(config: Config) -> list[Mistake]:
    peft, method = config.peft, config.peft.method
    found = _Found()
    used = ("method", *PEFT_KEYS[method], *(("path",) if method != "none" else ()))
    for key in _set_keys(peft, Peft()):
        if key not in used:
            readers = [m for m, keys in PEFT_KEYS.items() if key in keys or key == "path"]
            readers = [m for m in readers if m != "none"]
            found.add(
                f"peft.{key}",
                f"does nothing with peft.method: {method}; "
                f"{', '.join(readers)} read{'s' if len(readers) == 1 else ''} it",
            )
    if method == "none":
        return found
    if config.train.freeze:
        found.add(
            "train.freeze",
            f"with peft.method: {method} the model is frozen already; keep adapters "
            "off layers with peft.exclude_modules",
        )
    if method in ("prefix", "prompt") and config.data.mode == "packed":
        found.add(
            "peft.method",
            f"{method} would reach the first document of a packed row only; use data.mode: padded",
        )
    found += _family_refusal(config)
    if method == "prefix" and config.train.gradient_checkpointing:
        found.add(
            "train.gradient_checkpointing",
            "peft.method: prefix hands keys to every layer, which "
            "recomputation would lose; set it to false",
        )
    if method == "qlora" and config.model.path is None:
        found.add("peft.method", "qlora quantises weights that are there: set model.path")
    return found


def _row_of(config: Config) -> Family | None:
    """The row of the model's family, as far as the config alone tells it."""
    kind = (config.model.config or {}).get("model_type")
    row = None if config.model.family == AUTO else named(config.model.family)
    if row is None or (row.every_causal_lm and kind not in row.types):
        row = owner(kind) or row
    return row


def _family_refusal(config: Config) -> list[Mistake]:
    """That the method cannot train the model's family, as far as the config alone tells it."""
    row = _row_of(config)
    why = None if row is None else row.refusal(config.peft.method)
    return [] if why is None else [Mistake.of("peft.method", why)]


def _kinds(config: Config) -> list[Mistake]:
    moe, method = config.model.moe, config.peft.method
    found = _Found()
    if moe is None:
        return found
    if moe.balance_over != "batch" and not moe.balance:
        found.add("model.moe.balance_over", "does nothing without model.moe.balance; set that too")
    if moe.modality is None:
        return found
    found += read_groups(moe.modality)[1]
    if method == "prompt":
        found.add(
            "peft.method",
            "prompt puts positions in front that are of no kind of model.moe.modality; use lora",
        )
    if moe.modality.several and method != "none" and not config.peft.modules_to_save:
        found.add(
            "model.moe.modality.from",
            f"one_router, but with peft.method: {method} routers do not train, so they would stay "
            "copies of one; name them in peft.modules_to_save (gate), or train all weights",
        )
    return found


def _augment(config: Config) -> list[Mistake]:
    """What varies clips that a model is not given, as far as the config alone tells it."""
    augment, found = config.data.augment, _Found()
    if augment is None or not augment.given:
        return found
    kind = (config.model.config or {}).get("model_type")
    row = None if config.model.family == AUTO else named(config.model.family)
    if row is None and kind is not None:
        row = owner(kind) or any_text()
    if row is None or row.hears:
        pass  # which features it reads, its encoder knows
    elif config.data.speech_tokens is None:
        found.add(
            "data.augment",
            f"{', '.join(augment.given)}: {row.name} is given no clips to vary; set "
            "data.speech_tokens, use a model that hears, or leave it out",
        )
    elif augment.spec is not None:
        found.add(
            "data.augment.spec", f"masks a spectrogram, and {row.name} reads units; leave it out"
        )
    band = augment.band
    if band is not None and band.low_hz is not None and band.low_hz[1] >= band.high_hz[0]:
        found.add(
            "data.augment.band.low_hz",
            f"up to {band.low_hz[1]:g} Hz, but high_hz begins at {band.high_hz[0]:g}: nothing "
            "would pass; keep them apart",
        )
    return found


def _optim(config: Config) -> list[Mistake]:
    optim, train = config.optim, config.train
    found = _Found()
    if train.tf32 and (config.parallel.device == "cpu" or train.precision in ("bf16", "fp16")):
        where = "on CPUs" if config.parallel.device == "cpu" else f"in {train.precision}"
        found.add(
            "train.tf32",
            f"does nothing {where}: it is of products in fp32 on GPUs; set train.precision: fp32 "
            "there, or leave it out",
        )
    if optim.schedule != "wsd" and optim.decay != Optim().decay:
        found.add("optim.decay", f"does nothing with optim.schedule: {optim.schedule}; it is wsd's")
    if train.static_shapes and config.data.mode == "padded":
        found.add(
            "train.static_shapes",
            "true, but with data.mode: padded a row is as long as its longest sequence; use "
            "data.mode: packed, or leave it out",
        )
    unlimited = config.parallel.device == "cpu" and config.parallel.memory_gb is None
    if config.data.tokens_per_batch == "auto" and unlimited:
        found.add("data.tokens_per_batch", "auto on CPU needs a limit: set parallel.memory_gb")
    return found


def _set_keys(section: Section, default: Section) -> list[str]:
    """Keys whose value is not the default one. Not those that were written out: a run's own
    config has every key."""
    values: JsonObject = section.model_dump()
    return [key for key, value in values.items() if value != getattr(default, key)]
