"""Names of rlchat's options in other RLHF libraries, so that an error can say "did you mean --model.clip_eps?".

The names come from TRL, OpenRLHF, verl, cleanrl, Stable Baselines 3, RLlib and the Hugging Face Trainer.
"""

from __future__ import annotations

from collections import defaultdict

_OPTIONS = {
    "model.base_model": "model_name model_name_or_path model_path pretrain pretrained pretrained_model_name_or_path",
    "model.tiktoken_encoding": "tokenizer tokenizer_name tokenizer_name_or_path encoding",
    "model.max_length": "max_seq_length max_seq_len max_len block_size context_length model_max_length seq_len",
    "model.init_from": "sft_model_path ref_model ref_model_path",
    "model.reward": "reward_fn reward_func reward_funcs reward_function reward_model reward_model_path",
    "model.max_new_tokens": "response_length max_response_length max_completion_length max_tokens generate_max_len "
    "max_gen_len gen_len max_new_token",
    "model.group_size": "num_generations num_return_sequences n_samples_per_prompt num_responses_per_prompt rloo_k",
    "model.temperature": "sampling_temperature",
    "model.learning_rate": "lr actor_lr lr_actor actor_learning_rate",
    "model.schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "model.warmup": "warmup_ratio warmup_steps lr_warmup_ratio lr_warmup_steps num_warmup_steps",
    "model.weight_decay": "wd l2",
    "model.adam_eps": "adam_epsilon",
    "model.adam_beta2": "beta2",
    "model.optimizer": "optim optimizer_type",
    "model.merge_adapter": "merge_lora merge_and_unload save_merged save_merged_model",
    "model.ppo_epochs": "ppo_epoch num_ppo_epochs update_epochs n_epochs noptepochs",
    "model.minibatches": "num_minibatches num_mini_batches num_mini_batch n_minibatches nminibatches",
    "model.micro_batch_size": "mini_batch_size micro_batch_size_per_gpu ppo_micro_batch_size local_mini_batch_size",
    "model.advantage": "adv_estimator advantage_estimator",
    "model.critic_warmup": "num_critic_warmup_steps freezing_actor_steps",
    "model.clip_eps": "cliprange clip_range clip_coef clip_ratio clip_param clip_epsilon eps_clip epsilon",
    "model.clip_eps_high": "epsilon_high clip_ratio_high cliprange_high clip_eps_higher",
    "model.value_clip": "cliprange_value clip_range_vf value_clip_range vf_clip_param clip_vloss",
    "model.value_coef": "vf_coef vf_loss_coeff value_loss_coef critic_coef",
    "model.entropy_coef": "ent_coef entropy_coeff entropy_beta",
    "model.kl_coef": "kl_ctl init_kl_coef init_kl_coeff kl_beta kl_loss_coef beta",
    "model.kl_kind": "kl_estimator kl_penalty",
    "model.kl_horizon": "horizon",
    "model.target_kl": "desired_kl kl_early_stop",
    "model.gamma": "discount discount_factor",
    "model.lam": "gae_lambda lambda lambda_ lambd lam_policy lam_actor",
    "model.lam_critic": "critic_lam lambda_critic critic_lambda",
    "model.beta": "dpo_beta",
    "model.loss_type": "loss preference_loss pref_loss",
    "model.whiten_rewards": "normalize_rewards normalize_reward",
    "model.max_grad_norm": "clip_grad_norm grad_norm_clip grad_clip clip_grad gradient_clip",
    "data.path": "dataset dataset_name data_path train_file train_files prompt_data",
    "data.batch_size": "per_device_train_batch_size train_batch_size rollout_batch_size micro_train_batch_size bs",
    "data.val_batch_size": "per_device_eval_batch_size eval_batch_size",
    "trainer.max_epochs": "num_train_epochs num_epochs epochs",
    "trainer.gradient_clip_val": "max_grad_norm clip_grad_norm grad_norm_clip grad_clip clip_grad gradient_clip",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps grad_accum_steps",
    "trainer.precision": "bf16 fp16 dtype torch_dtype mixed_precision",
    "trainer.devices": "num_gpus n_gpus n_gpus_per_node gpus num_processes",
    "trainer.num_nodes": "nnodes",
    "trainer.strategy": "deepspeed fsdp",
    "trainer.log_every_n_steps": "logging_steps log_freq",
    "trainer.val_check_interval": "eval_steps eval_interval test_freq",
    "best_model.folder": "output_dir save_dir",
    "best_model.save_last_every": "save_steps save_freq save_interval",
    "ckpt_path": "resume_from_checkpoint resume resume_from",
    "seed_everything": "random_seed",
}


def _by_alias() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for option, names in _OPTIONS.items():
        for name in names.split():
            found[name] += (option,)
    return dict(found)


ALIASES = _by_alias()
"""Another library's name → the equivalent options here, the most likely first; without the leading ``--``."""
