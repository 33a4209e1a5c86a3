"""Rollouts: sampled responses, with the log-probs and values of policy, reference model and critic.

Shapes: B rows, N responses (one per row, or more if the policy answers several turns of a conversation), T tokens in
the longest row, R columns from the first to the last sampled token of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.data.datamodule import PromptBatch
from rlchat.distributed.collectives import anywhere, is_sharded, raise_everywhere
from rlchat.distributed.sharding import weights_on_first, will_be_sharded
from rlchat.errors import UserError
from rlchat.models.adapters import copy_sharing_frozen, freeze
from rlchat.models.model_file import PolicyBundle, load_reward_model
from rlchat.models.networks import Critic, RLChatModel
from rlchat.models.sampling import Sampling, addressed_uniforms
from rlchat.ppo.config import CriticKind, PPOConfig
from rlchat.ppo.dialogues import NOT_SAMPLED, Transcript, start_dialogues, to_transcript
from rlchat.ppo.engines import make_engine
from rlchat.ppo.frozen_layers import FrozenLayers, KeptStates
from rlchat.rewards import Reply, Reward
from rlchat.training.base import PolicyModule
from rlchat.training.parts import prepare_backbone
from rlchat.utils.padding import pad

# The most logits in a forward pass of an update on a CPU: 48 MiB.
_CPU_LOGITS = 3 * 2**22


@dataclass(frozen=True, slots=True)
class Rollout:
    """The responses of one iteration, evaluated before the first update.

    ``sampled`` [B, T] and ``response_mask`` [B, R] mark the same tokens in two layouts; see :func:`pack`.
    """

    conversations: Sequence[Conversation]  # [N] the prompt of each response
    replies: Sequence[Reply]  # [N] the responses as text
    ids: Tensor  # Long [B, T]
    attention_mask: Tensor  # Bool [B, T]
    sampled: Tensor  # Bool [B, T] True where the token in ids was sampled
    response_index: Tensor  # Long [B, R] the number (0 to N - 1) of the response that a token belongs to, or -1
    response_mask: Tensor  # Bool [B, R] True where a token was sampled; False on user turns between responses
    old_logprobs: Tensor  # [B, R] of the policy that sampled, computed in the same way as in the update
    ref_logprobs: Tensor  # [B, R] of the reference model
    values: Tensor  # [B, R] of the critic, before each token; 0 without a critic
    entropy: Tensor  # [B, R] of the same policy's distribution over each token, in nats
    sampling_logprobs: Tensor  # [B, R] of the same policy, as computed during sampling
    kept: KeptStates  # the output of the frozen layers for ids, from which the passes of the update start

    @property
    def kl(self) -> Tensor:
        """[N] the KL to the reference model in nats per response: the sum of k1 over its tokens."""
        kl, mask = self.old_logprobs.new_zeros(len(self.replies)), self.response_mask
        return kl.index_add(0, self.response_index[mask], (self.old_logprobs - self.ref_logprobs)[mask])

    def rows(self, factors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """One row of plain values per response: prompt, text, why it ended, reward by factor, KL, first value."""
        columns = {name: factor.tolist() for name, factor in factors.items()}
        numbers, values = (x[self.response_mask].tolist() for x in (self.response_index, self.values))
        first_value = dict(zip(reversed(numbers), reversed(values), strict=True))  # the first token overwrites the rest
        return [
            {
                "prompt": [{"role": message.role, "content": message.text} for message in prompt.messages],
                "reply": reply.text,
                "tokens": reply.tokens,
                "ended_by": "end of turn" if reply.ended else "token limit",
                "reward": sum(column[row] for column in columns.values()),
                "factors": {name: column[row] for name, column in columns.items()},
                "kl": kl,
                "value": first_value[row],
            }
            for row, (prompt, reply, kl) in enumerate(
                zip(self.conversations, self.replies, self.kl.tolist(), strict=True)
            )
        ]


def pack(response_at: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of [B, T] that are kept in [B, R]: from the first to the last sampled token of each row.

    Args:
        response_at: Long [B, T], -1 where a token was not sampled.

    Returns:
        columns: Long [B, R], for ``gather`` on a tensor [B, T].
        inside: Bool [B, R], False beyond the last sampled token of a row.

    Example: p is a prompt token, u a user turn between two responses, _ padding; digits are response numbers:

        [B, T]   p p 0 0 u 2 2        columns  2 3 4 5 6      packed [B, R]   0 0 u 2 2
                 p p p 1 1 _ _                 3 4 5 6 6                      1 1
    """
    sampled = response_at >= 0
    width = response_at.shape[1]
    columns = torch.arange(width, device=response_at.device).expand_as(response_at)
    first = torch.where(sampled, columns, width).amin(1, keepdim=True)
    last = torch.where(sampled, columns, -1).amax(1, keepdim=True)
    span = first + torch.arange(int((last - first).max()) + 1, device=response_at.device)
    return span.clamp(max=width - 1), span <= last


class TokenEvaluation(NamedTuple):
    """The outputs of the networks for sampled tokens; [B, R], 0 where no token was sampled."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class RolloutModule(PolicyModule):
    """A policy with its reference model, critic and reward: it samples responses and evaluates them.

    Args:
        bundle: the policy to start from.
        options: the options of PPO.
        reward: scores the responses.
    """

    options: PPOConfig

    def __init__(self, bundle: PolicyBundle, options: PPOConfig, reward: Reward) -> None:
        engine = make_engine(options.rollout_engine, options.vllm_memory)
        # Before the policy gets an adapter, reference, critic and reward models are copied: all share frozen weights.
        freeze(bundle.model.backbone, options.trained_part)
        # A reward model is never sharded, so it does not share weights that will be.
        reward.share_weights(None if options.adapter is None or will_be_sharded() else bundle)
        reference = copy_sharing_frozen(bundle.model).requires_grad_(False)
        critic = _new_critic(bundle, options.critic_init) if options.critic_kind == "separate" else None
        super().__init__(bundle, options, Sampling(options.max_new_tokens, options.temperature), options.seed)
        self.rollout_engine = engine
        self.reward = reward
        self.critic_kind: CriticKind = options.critic_kind
        self.reference: RLChatModel = reference.train()
        self.critic: Critic | None = None
        if critic is not None:
            prepare_backbone(critic.backbone, options)
            self.critic = critic.train()
            self.partly.include(critic)
        others = [network for network in (self.reference, self.critic) if network is not None]
        self.frozen_layers = FrozenLayers(options.trained_part, self.model, others)
        if self.critic_kind != "shared":
            # DDP fails if a parameter requires a gradient and no loss depends on it.
            self.model.value_head.requires_grad_(False)

    def score_responses(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        """The weighted score [N] of each factor. A collective: if a factor fails on one process, all stop."""
        factors: dict[str, Tensor] = {}
        failure: Exception | None = None
        try:
            factors = self.reward.to(self.device).breakdown(prompts, replies)
        except Exception as error:
            failure = error
        raise_everywhere(self, failure)
        return factors

    @torch.no_grad()
    def roll_out(self, batch: PromptBatch, rows: Tensor, stream: int) -> Rollout:
        """Samples responses to the prompts of ``batch``, with a synchronized rollout engine, and evaluates them.

        Args:
            batch: B prompts.
            rows: Long [B], the global row numbers, which address the random numbers together with ``stream``.
            stream: the iteration, or a separate stream for an evaluation.
        """
        return self.evaluate_transcript(self.sample_transcript(batch, rows, stream))

    def sample_transcript(
        self, batch: PromptBatch, rows: Tensor, stream: int, sampling: Sampling | None = None
    ) -> Transcript:
        """The policy responds to each prompt and to up to ``turns - 1`` later user turns of the data.

        ``sampling`` replaces that of training; the other arguments are those of :meth:`roll_out`.
        """
        sampling = sampling or self.sampling
        dialogues = start_dialogues(batch)
        most_ids = self.max_length - self.sampling.max_new_tokens
        prompts: list[Conversation] = []
        replies: list[Reply] = []
        active = list(range(len(dialogues)))
        for turn in range(self.options.turns):
            if turn:
                active = [row for row in active if dialogues[row].add_user_turn(self.tokenizer, most_ids)]
                if not anywhere(self, bool(active)):
                    break
            # A process without active dialogues generates a dummy row, because a sharded model needs all processes.
            ids, mask = pad(
                [dialogues[row].ids for row in active] or [[self.tokenizer.end_id]], self.tokenizer.pad_id, "left"
            )
            start = -turn * sampling.max_new_tokens  # each turn has its own random numbers
            uniforms = addressed_uniforms(self.options.seed, stream, rows.cpu()[active or [0]], start)
            inputs = (ids.to(self.device), mask.to(self.device), sampling, uniforms)
            generated = self.rollout_engine.generate(self, *inputs)
            for row, reply, tokens, logprobs in zip(
                active, self.decode(generated), generated.ids.tolist(), generated.logprobs.tolist(), strict=False
            ):
                dialogues[row].add_response(reply, len(replies), tokens[: reply.tokens], logprobs[: reply.tokens])
                prompts.append(dialogues[row].prompt)
                replies.append(reply)
        return to_transcript(dialogues, prompts, replies, self.tokenizer.pad_id, self.device)

    def evaluate_transcript(self, transcript: Transcript) -> Rollout:
        """Log-probs and values of ``transcript``, from the same forward pass that an update uses.

        The old log-probs are not those of sampling: these differ in low precision, and the first ratio would not
        be 1.
        """
        ids, attention_mask = transcript.ids, transcript.attention_mask
        sampled = transcript.response_at >= 0
        columns, inside = pack(transcript.response_at)
        response_index = torch.where(inside, transcript.response_at.gather(1, columns), NOT_SAMPLED)
        mask = response_index >= 0
        for network in filter(None, (self.model, self.reference, self.critic)):
            network.eval()  # also during the update: dropout would change the policy
        with self.frozen_layers.recorded() as kept:
            policy = self.evaluate_in_parts(self.model, ids, attention_mask, sampled, mask)
        reference = self.evaluate_in_parts(self.reference, ids, attention_mask, sampled, mask, kept=kept)
        return Rollout(
            conversations=transcript.conversations,
            replies=transcript.replies,
            ids=ids,
            attention_mask=attention_mask,
            sampled=sampled,
            response_index=response_index,
            response_mask=mask,
            old_logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            values=policy.values,
            entropy=policy.entropy,
            sampling_logprobs=torch.where(mask, transcript.sampling_logprobs.gather(1, columns), 0.0),
            kept=kept,
        )

    def evaluate_in_parts(
        self,
        model: RLChatModel,
        ids: Tensor,
        attention_mask: Tensor,
        sampled: Tensor,
        response_mask: Tensor,
        kept: KeptStates | None = None,
    ) -> TokenEvaluation:
        """:meth:`evaluate_tokens` of a whole rollout, in passes no larger than those of the update."""
        parts = [
            self.evaluate_tokens(
                model, ids[rows], attention_mask[rows], sampled[rows], response_mask[rows], kept and kept.rows(rows)
            )
            for rows in torch.arange(len(ids), device=ids.device).split(self.rows_per_pass(len(ids)))
        ]
        return TokenEvaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @property
    def micro_batch_size(self) -> int | None:
        """Rows per forward pass of an update, the same on all processes; None: all rows of a minibatch.

        On a CPU, the passes of a large vocabulary are bounded, which saves memory for logits and activations.
        """
        o = self.options
        if o.micro_batch_size is not None or self.device.type != "cpu":
            return o.micro_batch_size
        longest = min(o.turns * o.max_new_tokens, self.max_length)
        return max(1, _CPU_LOGITS // (longest * self.model.backbone.vocab_size))

    def rows_per_pass(self, rows: int) -> int:
        """How many of ``rows`` are evaluated together: a microbatch; on a CPU, at most a minibatch.

        Then activations stay in the caches of a CPU: 1.1 to 1.2 times as fast with 64 rows of 96 tokens. The responses
        to a prompt are not separated, because they share its computation.
        """
        o = self.options
        if is_sharded(self.model):  # each pass is a collective, and processes may have different numbers of rows
            return rows
        most = -(-rows // o.minibatches) if self.device.type == "cpu" else rows
        return -(-min(self.micro_batch_size or rows, most) // o.group_size) * o.group_size

    def evaluate_tokens(
        self,
        model: RLChatModel,
        ids: Tensor,
        attention_mask: Tensor,
        sampled: Tensor,
        response_mask: Tensor,
        kept: KeptStates | None = None,
    ) -> TokenEvaluation:
        """Log-probs, entropies and values [B, R] of the sampled tokens; values only if ``model`` is the policy.

        Logits are computed for these tokens only, because the vocabulary is by far the widest layer.

        Args:
            model: the policy or the reference model.
            ids: Long [B, T].
            attention_mask: Bool [B, T].
            sampled: Bool [B, T].
            response_mask: Bool [B, R], with as many True entries in each row as ``sampled`` has.
            kept: the output of the frozen layers for ``ids``; None: they run.
        """
        with self.frozen_layers.skipped(model, kept):
            hidden = model(ids, attention_mask)
        before = hidden[:, :-1][sampled[:, 1:]]  # [tokens, hidden]: the state that each token was sampled from
        stats = model.token_stats(before, ids[sampled], self.sampling.temperature)
        if model is self.reference or self.critic_kind == "none":
            values = torch.zeros_like(stats.logprobs)
        elif self.critic is not None:
            with self.frozen_layers.skipped(self.critic, kept):
                values = self.critic(ids, attention_mask)[:, :-1][sampled[:, 1:]]
        else:
            values = model.values(before)
        zeros = stats.logprobs.new_zeros(response_mask.shape)
        # Row by row, the n-th sampled token of [B, T] is the n-th True entry of the response mask [B, R].
        return TokenEvaluation(
            *(zeros.masked_scatter(response_mask, x) for x in (stats.logprobs, stats.entropy, values))
        )


def _new_critic(bundle: PolicyBundle, critic_init: str | None) -> Critic:
    """A separate critic, initialized from the reward model ``critic_init``, the model file, or the policy's backbone.

    Raises:
        UserError: the reward model has a different encoding, or a smaller ``max_length`` than the policy.
    """
    if critic_init is None:
        return bundle.critic or Critic(copy_sharing_frozen(bundle.model.backbone), bundle.model.hidden_dim)
    with weights_on_first() as weights:
        reward_model = load_reward_model(critic_init, weights=weights)
        if reward_model.tokenizer.fingerprint != bundle.tokenizer.fingerprint:
            raise UserError(
                f"critic_init {critic_init} and the policy have different encodings; use a reward model that was "
                f"trained with the policy's encoding, or leave out --model.critic_init"
            )
        if reward_model.max_length < bundle.max_length:
            raise UserError(
                f"critic_init {critic_init} has max_length {reward_model.max_length}, less than the policy's "
                f"{bundle.max_length}; lower --model.max_length, or leave out --model.critic_init"
            )
        return Critic.from_reward_model(reward_model.model)
