"""Names that other trainers use, and what ours are: for the messages about unknown keys.

Those of transformers' TrainingArguments, peft, DeepSpeed, LLaMA-Factory, ms-swift, NeMo, and of
the published recipes for speech models. Looked up without case, with - as _; nothing is accepted
under these names, for few of them mean exactly the same.
"""

from __future__ import annotations

from collections.abc import Iterable

# Our key, what to say of it, and their names.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("optim.lr", "", "learning_rate base_lr peak_lr max_lr"),
    ("optim.betas", "[beta1, beta2]", "adam_beta1 adam_beta2 adam_betas beta1 beta2"),
    ("optim.eps", "", "adam_epsilon adam_eps epsilon"),
    ("optim.clip", "", "max_grad_norm gradient_clipping clip_grad_norm grad_clip clip_grad"),
    ("optim.clip", "", "gradient_clip_val max_norm grad_clip_norm"),
    ("optim.warmup", "a share of all steps if below 1", "warmup_ratio warmup_fraction"),
    ("optim.warmup", "steps if 1 or more", "warmup_steps num_warmup_steps lr_warmup_iters"),
    ("optim.schedule", "constant, linear, cosine or wsd", "lr_scheduler_type lr_scheduler"),
    ("optim.schedule", "constant, linear, cosine or wsd", "lr_schedule scheduler scheduler_type"),
    ("optim.schedule", "constant, linear, cosine or wsd", "lr_decay_style scheduler_name"),
    ("optim.optimizer", "adamw or adamw8bit", "optim_type optimizer_type optimizer_name"),
    ("train.epochs", "", "num_train_epochs num_epochs max_epochs n_epochs max_epoch"),
    ("train.max_steps", "", "max_train_steps num_steps total_steps max_iters train_iters"),
    ("train.max_steps", "", "num_train_steps max_updates total_training_steps"),
    ("train.precision", "bf16", "bf16 bfloat16 use_bf16"),
    ("train.precision", "fp16", "fp16 half use_fp16"),
    ("train.precision", "auto, bf16, fp16 or fp32", "mixed_precision precision dtype amp"),
    ("train.precision", "auto, bf16, fp16 or fp32", "fp32 precision_type model_dtype torch_dtype"),
    ("train.gradient_checkpointing", "", "activation_checkpointing checkpoint_activations"),
    ("train.gradient_checkpointing", "", "use_gradient_checkpointing recompute_granularity"),
    ("train.compile", "", "torch_compile use_compile"),
    ("train.freeze", "name patterns", "freeze_encoder freeze_vision_tower freeze_parameters"),
    (
        "train.freeze",
        "name patterns",
        "freeze_llm freeze_vit freeze_aligner",
    ),
    (
        "data.tokens_per_batch",
        "a budget of positions a micro-batch, not a number of examples",
        "per_device_train_batch_size per_gpu_train_batch_size train_batch_size batch_size "
        "micro_batch_size train_micro_batch_size_per_gpu max_frames_in_batch max_tokens "
        "batch_bins max_batch_tokens batch_duration max_tokens_in_batch global_batch_size",
    ),
    (
        "data.tokens_per_batch",
        "what is longer is named in quarantine.jsonl",
        "max_seq_length cutoff_len model_max_length max_length max_seq_len max_input_length",
    ),
    (
        "data.lanes",
        "micro-batches a step, shared by however many workers there are",
        "gradient_accumulation_steps accumulate_grad_batches accum_grad gradient_accumulation "
        "grad_accum accumulation_steps",
    ),
    ("data.mix", "{asr: 0.5, tts: 0.5}, a share for each task", "asr_tts_mix_ratio mix_ratio"),
    ("data.mix", "a share for each task", "interleave_probs mix_strategy mixing_ratio"),
    ("data.mode", "packed or padded", "packing sample_packing neat_packing group_by_length"),
    ("data.order", "shuffled or sequential", "shuffle train_dataloader_shuffle dataset_shuffle"),
    ("data.max_seconds", "", "max_duration max_audio_length max_audio_len max_audio_seconds"),
    ("data.min_seconds", "", "min_duration min_audio_length min_audio_len min_audio_seconds"),
    ("data.cpus", "", "dataloader_num_workers num_workers preprocessing_num_workers"),
    ("data.prefetch", "", "dataloader_prefetch_factor prefetch_factor"),
    ("data.template", "", "chat_template prompt_template template_type"),
    (
        "data.train",
        "a list of files, [train.jsonl]",
        "dataset datasets train_file train_files data_path train_data train_manifest train_dirs "
        "train_asr_dirs train_tts_dirs train_text_only_dirs train_ds data_dir dataset_name "
        "dataset_dir dataset_path train_dataset train_path manifest_filepath train_list",
    ),
    (
        "data.eval",
        "a list of files, [dev.jsonl]",
        "val_file validation_file eval_file val_dataset eval_dataset val_asr_dirs val_tts_dirs "
        "val_text_only_dirs validation_ds val_data dev_data valid_data eval_data eval_files",
    ),
    ("model.path", "", "model_name_or_path model_name model_id pretrained_model_name_or_path"),
    ("model.path", "", "model_id_or_path model_path base_model pretrained_model checkpoint_path"),
    ("model.tokenizer", "", "tokenizer_name tokenizer_path tokenizer_name_or_path"),
    ("peft.r", "", "lora_r lora_rank target_r"),
    ("peft.alpha", "", "lora_alpha"),
    ("peft.dropout", "", "lora_dropout"),
    ("peft.target_modules", "", "lora_target_modules lora_target lora_modules target_module"),
    ("peft.rslora", "", "use_rslora"),
    ("peft.dora", "", "use_dora"),
    ("peft.every", "", "deltat delta_t"),
    ("peft.virtual_tokens", "", "num_virtual_tokens prompt_length"),
    ("peft.path", "", "adapter_name_or_path adapter_path adapters peft_path"),
    ("peft.method", "lora", "use_lora lora enable_lora use_peft finetuning_type train_type"),
    ("peft.method", "none, lora, qlora, ...", "tuner_type peft_type peft_method peft_config"),
    ("peft.method", "qlora", "load_in_4bit quantization_bit quant_bits use_qlora qlora"),
    (
        "parallel.strategy",
        "zero1, zero2 or zero3; a JSON of your own goes to parallel.deepspeed",
        "deepspeed deepspeed_config ds_config deepspeed_config_file zero_stage zero_optimization",
    ),
    ("parallel.strategy", "fsdp", "fsdp fsdp_config use_fsdp fsdp2 sharding_strategy"),
    ("parallel.strategy", "ddp", "ddp ddp_config distributed_type"),
    ("parallel.strategy", "ep", "ep_size expert_model_parallel_size expert_parallel_size"),
    ("parallel.workers", "", "nproc_per_node num_gpus n_gpus ngpus gpus num_processes world_size"),
    ("parallel.workers", "", "num_nodes nnodes devices gpus_per_node"),
    ("parallel.offload", "", "cpu_offload offload_optimizer offload_param"),
    (
        "run.storage_path",
        "a run's folder is run.storage_path/run.name",
        "output_dir out_dir logging_dir save_dir output_path work_dir exp_dir outdir save_path",
    ),
    ("run.name", "", "run_name exp_name experiment_name wandb_run_name project_name"),
    ("run.seed", "", "data_seed random_seed manual_seed"),
    ("checkpoint.every", "steps", "save_steps checkpointing_steps save_interval save_every"),
    ("checkpoint.every", "steps", "save_freq save_strategy save_step ckpt_interval"),
    ("checkpoint.keep", "", "save_total_limit max_checkpoints keep_last_n save_top_k"),
    ("checkpoint.best", "", "load_best_model_at_end metric_for_best_model save_best"),
    ("checkpoint.best_mode", "max", "greater_is_better"),
    (
        "checkpoint.resume",
        "auto: the same command continues the run",
        "resume_from_checkpoint resume resume_training auto_resume overwrite_output_dir",
    ),
    ("checkpoint.resume", "weights_only", "ignore_optimizer_state save_only_model init_from"),
    ("evaluate.every", "steps", "eval_steps evaluate_every eval_interval evaluation_strategy"),
    ("evaluate.every", "steps", "eval_strategy val_check_interval eval_every valid_interval"),
    ("evaluate.at_end", "", "do_eval do_predict skip_eval"),
    ("evaluate.tokens_per_batch", "", "per_device_eval_batch_size eval_batch_size val_batch_size"),
    ("evaluate.max_examples", "", "max_eval_samples eval_max_samples max_val_samples"),
    ("evaluate.generate", "", "predict_with_generate"),
    ("evaluate.max_new_tokens", "", "generation_max_length max_generate_length gen_max_length"),
    ("log.every", "steps", "logging_steps log_interval logging_interval log_every_n_steps"),
    ("log.every", "steps", "log_steps print_interval log_every"),
    ("log.tensorboard", "beside it log.wandb, log.mlflow", "report_to with_tracking logger"),
    ("log.tensorboard", "", "use_tensorboard"),
    ("log.wandb.project", "", "wandb_project use_wandb wandb"),
    ("log.wandb.entity", "", "wandb_entity"),
    ("log.mlflow.tracking_uri", "", "mlflow_tracking_uri use_mlflow mlflow"),
    ("log.mlflow.experiment", "", "mlflow_experiment_name"),
)
_KEYS = {name: (key, note) for key, note, names in _TABLE for name in names.split()}

# key -> their value -> what to write.
_VALUES: dict[str, dict[str, str]] = {
    "optim.schedule": {
        "constant_with_warmup": "constant, with optim.warmup",
        "linear_with_warmup": "linear, with optim.warmup",
        "cosine_with_warmup": "cosine, with optim.warmup",
        "cosine_with_restarts": "cosine, or wsd",
        "cosine_with_min_lr": "cosine, or wsd",
        "cosine_annealing": "cosine",
        "cosineannealing": "cosine",
        "inverse_sqrt": "wsd",
        "polynomial": "linear",
        "warmup_stable_decay": "wsd",
        "warmuplr": "constant, with optim.warmup",
        "warmupdecaylr": "linear, with optim.warmup",
        "none": "constant",
    },
    "optim.optimizer": {
        **dict.fromkeys(
            ("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fusedadam", "fused_adam"),
            "adamw",
        ),
        **dict.fromkeys(("paged_adamw_32bit", "paged_adamw", "adamw_apex_fused"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "adamw8bit"),
    },
    "train.precision": {
        **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true", "torch.bfloat16"), "bf16"),
        **dict.fromkeys(("float16", "half", "16", "16-mixed", "torch.float16"), "fp16"),
        **dict.fromkeys(("float32", "float", "32", "no", "tf32", "32-true"), "fp32"),
    },
    "parallel.strategy": {
        **dict.fromkeys(("zero", "deepspeed", "zero-2", "zero_2", "stage2", "stage_2"), "zero2"),
        **dict.fromkeys(("zero-1", "zero_1", "stage1", "deepspeed_stage_1"), "zero1"),
        **dict.fromkeys(("zero-3", "zero_3", "stage3", "stage_3", "deepspeed_stage_3"), "zero3"),
        **dict.fromkeys(("fsdp2", "full_shard", "full_sharded", "hsdp"), "fsdp"),
        **dict.fromkeys(("dp", "none", "ddp_find_unused_parameters_true", "single"), "ddp"),
    },
    "peft.method": dict.fromkeys(("full", "all", "sft", "full_finetune"), "none"),
    "data.mode": {
        **dict.fromkeys(("packing", "pack", "true"), "packed"),
        **dict.fromkeys(("padding", "pad", "false", "bucketed", "bucket"), "padded"),
    },
    "data.order": {"random": "shuffled", "shuffle": "shuffled", "true": "shuffled"},
    "checkpoint.resume": {"true": "auto", "false": "never", "latest": "auto", "last": "auto"},
}


def our_key(name: str, known: Iterable[str]) -> tuple[str, str] | None:
    """Our key for another trainer's `name`, and a note; None where there is none.

    known: the keys there are; a name among their last parts is found too (`lr`: optim.lr).
    """
    plain = name.strip().lower().replace("-", "_").rsplit(".", 1)[-1]
    known = list(known)
    if plain in _KEYS:
        ours = _KEYS[plain][0]
        if any(key == ours or key.startswith(f"{ours}[]") for key in known):
            return _KEYS[plain]
    same = [key for key in known if key.rsplit(".", 1)[-1] == plain]
    return (same[0], "") if same else None


def our_value(key: str, value: object) -> str | None:
    """What to write instead of another trainer's value for `key`."""
    return _VALUES.get(key, {}).get(str(value).strip().lower())


def names() -> dict[str, str]:
    """Every foreign name and the key it is answered with."""
    return {name: key for name, (key, _) in _KEYS.items()}
