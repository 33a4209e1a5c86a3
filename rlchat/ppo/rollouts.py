"""Rollouts: what a policy says to prompts, and what policy, reference and critic think of each token of it.

Shapes: B rows, N replies (as many as rows, or more where the policy answers several turns of a conversation), T tokens
of the longest row, R from the first to the last sampled token of the longest row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import PromptBatch, SequenceBatch
from rlchat.distributed.collectives import anywhere, gather_objects, global_sum
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle, load_reward_model
from rlchat.models.networks import Critic, RLChatModel
from rlchat.models.sampling import Sampling, addressed_uniforms
from rlchat.rewards import Reply, Reward, distinct_n
from rlchat.training.base import VALIDATION_STREAM, PolicyModule
from rlchat.utils.padding import pad

CriticKind = Literal["shared", "separate", "none"]


@dataclass(frozen=True, slots=True)
class Transcript:
    """Conversations as they went, token by token."""

    conversations: Sequence[Conversation]  # [N] what each reply was said to
    replies: Sequence[Reply]  # [N]
    ids: Tensor  # Long [B, T] prompts, replies and what users said in between, padded on the right
    attention_mask: Tensor  # Bool [B, T]
    reply_of: Tensor  # Long [B, T] the number of the reply that a token was sampled for; -1 where it was given
    sampling_logprobs: Tensor  # [B, T] of the distributions that tokens were drawn from; 0 where given


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was said in one iteration, and what everybody thought of it before anything was learnt."""

    conversations: Sequence[Conversation]  # [N] the prompts
    replies: Sequence[Reply]  # [N] what was said to them
    ids: Tensor  # Long [B, T]
    attention_mask: Tensor  # Bool [B, T]
    said: Tensor  # Bool [B, T] True where ids holds a sampled token
    reply_of: Tensor  # Long [B, R] counted from the first sampled token: whose reply it belongs to; -1 elsewhere
    mask: Tensor  # Bool [B, R] True where a token was sampled; the user's words between two replies are holes
    logprobs: Tensor  # [B, R] of the policy that sampled
    ref_logprobs: Tensor  # [B, R] of the frozen reference
    values: Tensor  # [B, R] the critic's, before each token; 0 without a critic
    sampling_logprobs: Tensor  # [B, R] of the policy, as the token loop computed them

    @property
    def kl(self) -> Tensor:
        """[N] nats between policy and reference, summed over each reply."""
        nats = torch.zeros(len(self.replies), dtype=torch.float32, device=self.ids.device)
        return nats.index_add(0, self.reply_of[self.mask], (self.logprobs - self.ref_logprobs)[self.mask].float())

    def rows(self, factors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """One plain row a reply: what was asked and said, why it ended, what it earned and cost, what was expected."""
        columns = {name: factor.tolist() for name, factor in factors.items()}
        expected = dict(
            zip(self.reply_of[self.mask].tolist()[::-1], self.values[self.mask].tolist()[::-1], strict=True)
        )
        return [
            {
                "prompt": [{"role": message.role, "content": message.text} for message in prompt.messages],
                "reply": reply.text,
                "tokens": reply.tokens,
                "ended_by": "end of turn" if reply.ended else "token limit",
                "reward": sum(column[row] for column in columns.values()),
                "factors": {name: column[row] for name, column in columns.items()},
                "kl": kl,
                "value": expected[row],  # before its first token
            }
            for row, (prompt, reply, kl) in enumerate(
                zip(self.conversations, self.replies, self.kl.tolist(), strict=True)
            )
        ]


class Readings(NamedTuple):
    """What networks say of sampled tokens; [B, R], 0 where none was sampled."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class RolloutModule(PolicyModule):
    """A policy with a frozen reference, a critic and a reward: it can talk, and measure how well it does.

    Args:
        bundle: the policy to begin with.
        reward: judges the replies.
        critic: whether values come from a head on the policy's trunk, from a network of its own, or are not needed.
        critic_init: the bundle of a reward model as which a critic of its own begins; else it begins as a copy of the
            policy's trunk, or as the critic that the bundle brings.
        sampling: how training and evaluation draw tokens.
        turns: user turns of a conversation that are answered at most.
        seed: of all noise.
    """

    def __init__(
        self,
        bundle: PolicyBundle,
        reward: Reward,
        critic: CriticKind,
        critic_init: str | None,
        sampling: Sampling,
        turns: int,
        seed: int,
    ) -> None:
        super().__init__(bundle)
        self.reward = reward
        self.sampling = sampling
        self.turns = turns
        self.noise_seed = seed
        self.critic_kind = critic
        self.reference: RLChatModel = copy.deepcopy(self.model).requires_grad_(False)
        self.critic: Critic | None = None
        if critic == "separate":
            self.critic = _new_critic(bundle, critic_init).train()
        elif critic_init is not None:
            raise UserError(f"critic_init {critic_init}: only a network of its own begins so; set critic to separate")
        if critic != "shared":
            self.model.value_head.requires_grad_(False)  # it has no part in any loss, which DDP does not forgive

    # Talking --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, batch: PromptBatch, rows: Tensor, stream: int) -> Rollout:
        """Conversations from the prompts of ``batch`` on, with the log-probs and values that an update starts from.

        ``rows`` Long [B] are the global numbers of the rows, which together with ``stream`` address their noise.
        """
        return self.recall(self.converse(batch, rows, stream))

    def converse(self, batch: PromptBatch, rows: Tensor, stream: int, sampling: Sampling | None = None) -> Transcript:
        """The policy replies to each prompt, and to what the user says next, for so many ``turns``.

        What the user says next is what the user of the data said, though it was said to another reply. ``sampling`` is
        another than that of training.
        """
        sampling = sampling or self.sampling
        talks = [
            _Talk(replace(conversation, later=()), conversation.later, ids[mask].tolist())
            for ids, mask, conversation in zip(
                batch.ids.cpu(), batch.attention_mask.cpu(), batch.conversations, strict=True
            )
        ]
        conversations: list[Conversation] = []
        replies: list[Reply] = []
        speaking = list(range(len(talks)))
        for turn in range(self.turns):
            if turn:
                speaking = [row for row in speaking if self._user_speaks(talks[row])]
                if not anywhere(self, bool(speaking)):
                    break
            # A process that has nobody left takes part all the same: a model that lies in shards needs everybody.
            waiting = [talks[row].ids for row in speaking] or [[self.tokenizer.end_id]]
            ids, mask = pad(waiting, self.tokenizer.pad_id, "left")
            start = -turn * sampling.max_new_tokens  # each turn has noise of its own
            noise = addressed_uniforms(self.noise_seed, stream, rows.cpu()[speaking or [0]], start)
            said = self.generate(ids.to(self.device), mask.to(self.device), sampling, noise)
            for row, reply, tokens, logprobs in zip(
                speaking, self.read(said), said.ids.tolist(), said.logprobs.tolist(), strict=False
            ):
                talks[row].hear(reply, len(replies), tokens[: reply.tokens], logprobs[: reply.tokens])
                conversations.append(talks[row].conversation)
                replies.append(reply)
        ids, attention_mask = pad([talk.ids for talk in talks], self.tokenizer.pad_id, "right")
        reply_of, _ = pad([talk.reply_of for talk in talks], -1, "right")
        # float32 by name: under bf16-true it is not what PyTorch makes when nothing is said.
        logprobs = torch.zeros(ids.shape, dtype=torch.float32).masked_scatter(
            attention_mask, torch.tensor([number for talk in talks for number in talk.logprobs], dtype=torch.float32)
        )
        tensors = (tensor.to(self.device) for tensor in (ids, attention_mask, reply_of, logprobs))
        return Transcript(conversations, replies, *tensors)

    def _user_speaks(self, talk: _Talk) -> bool:
        """Adds to ``talk`` what the user of the data says next; False where that is nothing, or does not fit."""
        if not talk.later:
            return False
        following, *later = talk.later
        words = tuple(message for message in following.messages[talk.heard :] if message.role != "assistant")
        # A reply that ran out of tokens did not close its turn: that is done for it, and it did not say so.
        given = [] if talk.reply is None or talk.reply.ended else [self.tokenizer.end_id]
        given += self.tokenizer.render_prompt(Conversation(words)).ids
        if len(talk.ids) + len(given) + self.sampling.max_new_tokens > self.max_length:
            return False
        talk.listen(words, given, following, tuple(later))
        return True

    def recall(self, transcript: Transcript) -> Rollout:
        """What policy, reference and critic think of ``transcript``, by the same forward pass that an update uses.

        Not the log-probs that sampling saw: in low precision they differ, and the first ratio would not be 1.
        """
        ids, attention_mask = transcript.ids, transcript.attention_mask
        said = transcript.reply_of >= 0
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        first = torch.where(said, columns, ids.shape[1]).amin(1, keepdim=True)
        last = torch.where(said, columns, -1).amax(1, keepdim=True)
        span = first + torch.arange(int((last - first).max()) + 1, device=ids.device)  # [B, R] columns of [B, T]
        inside, span = span <= last, span.clamp(max=ids.shape[1] - 1)
        reply_of = torch.where(inside, transcript.reply_of.gather(1, span), -1)
        mask = reply_of >= 0
        for network in filter(None, (self.model, self.reference, self.critic)):
            network.eval()  # and so it stays for the update: dropout would be another policy
        policy = self.read_replies(self.model, ids, attention_mask, said, mask)
        reference = self.read_replies(self.reference, ids, attention_mask, said, mask)
        return Rollout(
            conversations=transcript.conversations,
            replies=transcript.replies,
            ids=ids,
            attention_mask=attention_mask,
            said=said,
            reply_of=reply_of,
            mask=mask,
            logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            values=policy.values,
            sampling_logprobs=torch.where(mask, transcript.sampling_logprobs.gather(1, span), 0.0),
        )

    def read_replies(
        self,
        model: RLChatModel,
        ids: Tensor,
        attention_mask: Tensor,
        said: Tensor,
        mask: Tensor,
        critic_alone: bool = False,
    ) -> Readings:
        """Of the ``said`` tokens of ``ids`` [B, T], packed as ``mask`` [B, R] has them; values for the policy only.

        Logits are made for these tokens alone: the vocabulary is by far the widest layer. With ``critic_alone``, no
        value sends a gradient into the policy's trunk.
        """
        hidden = model(ids, attention_mask)
        before = hidden[:, :-1][said[:, 1:]]  # [tokens, hidden]: what each sampled token was drawn from
        stats = model.token_stats(before, ids[said], self.sampling.temperature)
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=ids.device)
        if model is self.reference or self.critic_kind == "none":
            values = torch.zeros_like(stats.logprobs)
        elif self.critic is not None:
            values = self.critic(ids, attention_mask)[:, :-1][said[:, 1:]]
        else:
            values = model.values(before.detach() if critic_alone else before)
        return Readings(*(blank.masked_scatter(mask, x) for x in (stats.logprobs, stats.entropy, values)))

    # Held-out conversations -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts to collect replies."""
        self.held_out_replies: list[str] = []
        self.held_out_rows = 0

    def validation_step(self, batch: PromptBatch | SequenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Conversations give accuracy and perplexity; prompts are replied to and judged."""
        if isinstance(batch, SequenceBatch):
            self.tally_sequences(batch)
            return
        # Always the same noise, so that two validations differ by the model alone.
        rows = self.noise_rows(len(batch.ids), self.held_out_rows)
        self.held_out_rows += len(batch.ids)
        rollout = self.roll_out(batch, rows, stream=VALIDATION_STREAM)
        self.held_out_replies += [reply.text for reply in rollout.replies]
        factors = self.reward.breakdown(rollout.conversations, rollout.replies)
        self.tally.add("reward", torch.stack(list(factors.values())).sum(0))
        for name, value in factors.items():
            self.tally.add(f"reward_{name}", value)
        self.tally.add("kl", rollout.kl)
        self.tally.add("response_length", torch.tensor([reply.tokens for reply in rollout.replies]))
        self.tally.add("truncated_fraction", torch.tensor([not reply.ended for reply in rollout.replies]))
        self.tally_answers("answer_accuracy", rollout.conversations, rollout.replies)
        if not self.trainer.training and anywhere(self, any(c.check for c in batch.conversations)):
            greedy = Sampling(self.sampling.max_new_tokens, temperature=0.0)
            said = self.converse(batch, rows, VALIDATION_STREAM, greedy)
            self.tally_answers("answer_accuracy_greedy", said.conversations, said.replies)

    def tally_answers(self, name: str, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> None:
        """Share of right replies among the prompts that can be checked."""
        right = [float(p.check.passes(r.text)) for p, r in zip(prompts, replies, strict=True) if p.check]
        if right:
            self.tally.add(name, torch.tensor(right))

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures, over all processes."""
        self.log_held_out("val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PromptBatch | SequenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As for validation, on the conversations that chose nothing."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the test figures, over all processes."""
        self.log_held_out("test")

    def log_held_out(self, stage: str) -> None:
        """Means over every reply of every process."""
        values = self.tally.means(self.device)
        replies = [reply for part in gather_objects(self.held_out_replies) for reply in part]
        if replies:
            values["distinct_2"] = distinct_n(replies, 2)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    def judgements(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
        """The reward of each predicted reply, whole and by factor."""
        factors = self.reward.breakdown(prompts, replies)
        rows = [{name: float(value[i]) for name, value in factors.items()} for i in range(len(replies))]
        return [{"reward": sum(row.values()), "factors": row} for row in rows]

    def bundle(self) -> PolicyBundle:
        """As for every stage, and with it the critic and what the reward consists of."""
        bundle = super().bundle()
        bundle.critic = self.critic
        bundle.about |= {"critic": self.critic_kind, "reward": self.reward.describe()}
        return bundle

    # All processes --------------------------------------------------------------------------------------------------

    def global_sum(self, value: Tensor | float) -> Tensor:
        """``value`` summed over all processes."""
        return global_sum(self, value)

    def global_mean(self, values: Tensor) -> float:
        """Mean of the rows [N] of all processes."""
        total = torch.stack(
            [values.float().sum().to(self.device), torch.tensor(float(len(values)), device=self.device)]
        )
        total = self.global_sum(total)
        return float(total[0] / total[1])


@dataclass(slots=True)
class _Talk:
    """A conversation while it goes on."""

    conversation: Conversation  # so far; in it waits a user for a reply
    later: tuple[Conversation, ...]  # what the data holds of the rest
    ids: list[int]
    heard: int = 0  # messages of the data's own conversation that have come up
    reply_of: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reply: Reply | None = None  # the last

    def __post_init__(self) -> None:
        self.heard = len(self.conversation.messages)
        self.reply_of = [-1] * len(self.ids)
        self.logprobs = [0.0] * len(self.ids)

    def hear(self, reply: Reply, number: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """The policy speaks: its reply has this ``number`` among all."""
        self.reply = reply
        self.ids += ids
        self.reply_of += [number] * len(ids)
        self.logprobs += logprobs

    def listen(
        self, words: tuple[Message, ...], ids: Sequence[int], following: Conversation, later: tuple[Conversation, ...]
    ) -> None:
        """The user speaks: ``words``, as they stood at the end of the data's ``following`` prompt."""
        assert self.reply is not None
        said = (*self.conversation.messages, Message("assistant", self.reply.text), *words)
        self.conversation = replace(following, messages=said, later=())
        self.later, self.heard = later, len(following.messages)
        self.ids += ids
        self.reply_of += [-1] * len(ids)
        self.logprobs += [0.0] * len(ids)


def _new_critic(bundle: PolicyBundle, critic_init: str | None) -> Critic:
    """The critic that begins: the reward model in ``critic_init``, the bundle's own, or a copy of the policy's trunk.

    Raises :class:`UserError` for a reward model that cannot read all that the policy can say.
    """
    if critic_init is not None:
        judge = load_reward_model(critic_init)
        if judge.tokenizer.fingerprint != bundle.tokenizer.fingerprint or judge.max_length < bundle.max_length:
            raise UserError(
                f"critic_init {critic_init}: its encoding, or its max_length of {judge.max_length}, does not serve "
                f"this policy; give a reward model that was trained like it, or leave critic_init out"
            )
        return Critic.from_reward_model(judge.model)
    return bundle.critic or Critic(copy.deepcopy(bundle.model.backbone), bundle.model.hidden_dim)
