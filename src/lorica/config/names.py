"""Names that other tools use for the settings here. Every mapping is printed, none is silent."""

import re

_SAME = {
    # run
    "model": "model_name_or_path base_model base_model_name_or_path pretrained_model_name_or_path "
    "model_name model_id model_path checkpoint_dir",
    "data": "dataset dataset_name dataset_path data_path train_data train_file training_file",
    "eval_data": "eval_dataset eval_file val_data val_dataset valid_data validation_data "
    "validation_file",
    "test_data": "test_dataset test_file",
    "eval_size": "val_size val_set_size validation_split test_size",
    "output_dir": "out_dir adapter_path output_path",
    "quantize": "load_in_4bit load_in_8bit",
    "system": "system_prompt default_system",
    "num_samples": "num_examples",
    "max_new_tokens": "max_completion_length",
    "threads": "num_threads",
    # training
    "learning_rate": "lr",
    "batch_size": "micro_batch_size per_device_train_batch_size train_batch_size device_batch_size",
    "eval_batch_size": "per_device_eval_batch_size val_batch_size",
    "gradient_accumulation_steps": "grad_accumulation_steps grad_accum gradient_accumulation "
    "accumulation_steps",
    "epochs": "num_train_epochs num_epochs n_epochs max_train_epochs max_epochs",
    "max_steps": "iters steps num_steps max_train_steps train_steps num_train_steps max_iters",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len sequence_length seq_len "
    "seq_length block_size",
    "optim": "optimizer",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "clip_grad_norm gradient_clipping gradient_clip_val grad_clip max_norm",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
    "seed": "random_state random_seed",
    "dtype": "torch_dtype",
    "packing": "sample_packing",
    "gradient_checkpointing": "use_gradient_checkpointing grad_checkpoint",
    "early_stopping_patience": "patience",
    "keep_best": "load_best_model_at_end",
    "eval_steps": "eval_every eval_interval steps_per_eval val_interval",
    "save_steps": "save_every save_interval checkpoint_every",
    "logging_steps": "log_every log_interval steps_per_report",
    "save_total_limit": "save_limit",
    # LoRA
    "r": "lora_r lora_rank rank network_dim",
    "lora_alpha": "alpha network_alpha",
    "lora_dropout": "dropout network_dropout",
    "target_modules": "lora_target lora_target_modules target targets",
    "exclude_modules": "lora_exclude_modules",
    "use_rslora": "rslora",
    "modules_to_save": "lora_modules_to_save",
    # AdaLoRA and LISA
    "delta_t": "deltaT",
    "lisa_activated_layers": "lisa_n_layers",
    "lisa_interval_steps": "lisa_interval lisa_step_interval",
}

ALIASES: dict[str, str] = {
    alias: key for key, aliases in _SAME.items() for alias in aliases.split()
}
"""Another tool's name -> the name here."""

MEANT: dict[str, dict[str, str]] = {"load_in_8bit": {"true": "int8"}}
"""Another tool's name -> value there -> value here, where it is another one."""

NO_TWIN: dict[str, str] = {
    "beta1": "write adam_beta1 for AdamW, sensitivity_beta for AdaLoRA",
    "beta2": "write adam_beta2 for AdamW, uncertainty_beta for AdaLoRA",
    "bf16": "write dtype: bfloat16",
    "fp16": "there is dtype: bfloat16 or float32; half precision would need loss scaling",
    "fp32": "write dtype: float32",
    "completion_only_loss": "write train_on: completion, or train_on: all",
    "train_on_inputs": "write train_on: completion, or train_on: all",
    "train_on_prompt": "write train_on: completion, or train_on: all",
    "assistant_only_loss": "write train_on: completion, or train_on: all",
    "global_batch_size": "records per step are batch_size times gradient_accumulation_steps",
    "keys": "name the layers in target_modules",
    "local_files_only": "nothing is fetched where the environment variable HF_HUB_OFFLINE is 1",
    "lora_target_linear": "write target_modules: all-linear",
    "report_to": "every run writes metrics.jsonl and report.html",
    "resume_from_checkpoint": "resuming is an option of the command: --resume",
    "scale": "set lora_alpha to scale times r",
}
"""Settings of other tools that have no counterpart of the same meaning -> what to write instead."""

SECRET_KEY = re.compile(r"token$|secret|api_?key|passw|credential", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-(?:proj-|ant-)?|AKIA)[A-Za-z0-9]{16,}|://[^/\s:@]+:[^/\s@]+@"
)
"""Tokens by the beginnings that their issuers give them, and a password inside an address."""
