"""Stage 1, supervised fine-tuning (SFT): next-token prediction on the assistant's messages in human conversations.

rlchat fit --config demo/sft
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlchat.data.datamodule import DataNeeds, SequenceBatch
from rlchat.models.adapters import AdapterKind
from rlchat.training.base import PolicyModule
from rlchat.training.initial_model import base_options, open_policy
from rlchat.training.optimizers import OptimizerName
from rlchat.training.options import ChatFormatName, Schedule, SupervisedOptions, check_sampling, sampling_within


class SFTModule(PolicyModule):
    """Next-token prediction on the assistant's messages in human conversations.

    Args:
        base_model: a transformers model by name or path, a GGUF file, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, the path of a rank file, or a folder or model whose
            tokenizer is converted exactly; by default the base model's own.
        max_length: the maximum number of tokens in a conversation.
        hidden_dim: units in the hidden layer of the value head, which PPO trains; 0 for a linear head.
        init_from: a model file to start from instead of base_model.
        learning_rate: the peak learning rate of AdamW.
        schedule: the learning rate schedule after the warm-up.
        warmup: the fraction of the steps in which the learning rate rises from 0.
        weight_decay: the weight decay of AdamW, on matrices only.
        optimizer: adamw, or adamw_8bit or paged_adamw_8bit of bitsandbytes, whose state needs a quarter of the memory;
            the paged one moves it to the CPU's memory if the GPU has none left.
        max_new_tokens: the maximum number of tokens in a response of `rlchat predict` or a sample; by default 100,
            or half of max_length if that is less. Training does not sample.
        temperature: the sampling temperature of these responses; 0 selects the most likely token.
        seed: the seed of sampling.
        adapter: lora trains low-rank adapters of the linear layers and freezes the backbone's weights; by default, all
            weights are trained.
        lora_rank: the rank of the adapters.
        lora_alpha: the outputs of the adapters are scaled by lora_alpha / lora_rank.
        lora_targets: the linear layers that get an adapter, such as [q_proj, v_proj]; by default all.
        lora_dropout: the dropout probability of the adapters' inputs in training.
        train_layers: train the last N layers of the backbone only, or their adapters; by default all layers.
        merge_adapter: merge the adapter into the weights of model files; false: model files contain the adapter alone,
            and are loaded together with base_model or init_from.
        gradient_checkpointing: compute activations again in the backward pass, which needs less memory and more time.
        chat_format: own for the chat template of the base model, rlchat for rlchat's markers; by default own where the
            base model has a template.
        new_embeddings: start every row of the embedding from random values, not from the base model's tokens.
        attn_implementation: an attention implementation of transformers, such as eager or sdpa; by default sdpa where
            the model family has it.
    """

    stage = "sft"
    bundle_name = "sft_model.pt"
    monitor = ("val/perplexity", "min")

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        hidden_dim: int | None = None,
        init_from: str | None = None,
        learning_rate: float = 1e-4,
        schedule: Schedule = "cosine",
        warmup: float = 0.02,
        weight_decay: float = 0.01,
        optimizer: OptimizerName = "adamw",
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        adapter: AdapterKind | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_targets: list[str] | None = None,
        lora_dropout: float = 0.0,
        train_layers: int | None = None,
        merge_adapter: bool = True,
        gradient_checkpointing: bool = False,
        chat_format: ChatFormatName | None = None,
        new_embeddings: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        options = SupervisedOptions.of(locals())
        check_sampling(max_new_tokens, temperature)
        bundle = open_policy(base_model, tiktoken_encoding, max_length, hidden_dim, init_from, **base_options(options))
        super().__init__(bundle, options, sampling_within(bundle.max_length, max_new_tokens, temperature), seed)
        self.save_hyperparameters()
        # SFT does not train the value head. DDP fails on a parameter that requires a gradient and gets none.
        self.model.value_head.requires_grad_(False)

    @property
    def data_needs(self) -> DataNeeds:
        """Whole conversations; for predictions, prompts truncated to leave room for a response."""
        room = self.sampling.max_new_tokens if getattr(self._trainer, "predicting", False) else 0
        return DataNeeds(task="sft", tokenizer=self.tokenizer, max_length=self.max_length, max_new_tokens=room)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Mean negative log-prob of the assistant's tokens, over all processes."""
        stats = self.token_stats(batch)
        tokens = self.global_sum(len(stats.logprobs))
        loss = self.mean_loss("train/loss", -stats.logprobs.sum(), tokens)
        if self.logs_this_step:
            nll, correct = (self.global_mean(x) for x in (-stats.logprobs, stats.correct))
            self.log_dict({"train/accuracy": correct, "train/perplexity": nll.exp()})
            self.log("train/learning_rate", self.current_learning_rate())
        return loss

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Accuracy and perplexity on held-out conversations."""
        self.tally_sequences(batch)

    def validation_loss(self) -> float | None:
        """The mean negative log-prob of held-out tokens: the logarithm of the perplexity."""
        perplexity = self.trainer.callback_metrics.get("val/perplexity")
        return None if perplexity is None else float(perplexity.log())
