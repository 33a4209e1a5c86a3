"""Rollouts: sampled and recomputed log-probs agree; groups of responses, whole conversations, and critics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_ppo import (
    BACKBONES,
    QUESTIONS,
    LetterE,
    alone,
    fit,
    iterated,
    ppo,
    prompts,
    rolled_out,
    serve,
    trainer,
)
from torch import Tensor

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.datamodule import PromptBatch
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import RewardBundle, load_policy, save_bundle
from rlchat.models.networks import Critic, RewardModel, RLChatModel
from rlchat.models.sampling import Generated, Sampling, Uniforms, addressed_uniforms
from rlchat.ppo.frozen_layers import KeptStates
from rlchat.ppo.module import PPOModule
from rlchat.ppo.rollouts import Rollout, pack
from rlchat.rewards import Reply, ReplyFactor, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

# ---- sampled and recomputed log-probs agree --------------------------------------------------------------------------


def residuals(module: PPOModule) -> tuple[float, float]:
    """The largest distance of the ratio from 1: between sampling and evaluation, and between evaluation and update."""
    rollout = rolled_out(module)
    every_row = torch.arange(len(rollout.ids))
    parts = [rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask]
    with torch.no_grad():
        new = module.evaluate_tokens(module.model, *(part[every_row] for part in parts))

    def off(one: Tensor, other: Tensor) -> float:
        return float(((one - other).exp() - 1).abs()[rollout.response_mask].max())

    return off(rollout.sampling_logprobs, rollout.old_logprobs), off(new.logprobs, rollout.old_logprobs)


@pytest.mark.parametrize("family", BACKBONES)
def test_the_first_ratio_of_every_token_is_1_in_fp32(encoding: str, family: str) -> None:
    module = ppo(encoding, family, temperature=0.7)
    for parameter in module.parameters():
        parameter.data.mul_(2)  # a model with a less uniform distribution
    assert max(residuals(module)) <= 1e-5


def no_positions(module: PPOModule, patch: pytest.MonkeyPatch) -> None:
    """Positions count padding, as they do by default in transformers."""
    forward = module.model.backbone.transformer.forward

    def counted_from_the_left(ids: Tensor, *args: Any, **named: Any) -> Any:
        total = named["attention_mask"].shape[1] if "attention_mask" in named else ids.shape[1]
        named["position_ids"] = torch.arange(total)[total - ids.shape[1] :].expand_as(ids)
        return forward(ids, *args, **named)

    patch.setattr(module.model.backbone.transformer, "forward", counted_from_the_left)


def dropout_on(module: PPOModule, patch: pytest.MonkeyPatch) -> None:
    """The model stays in training mode."""
    module.model.train()
    patch.setattr(module.model, "eval", lambda: module.model)


def another_temperature(module: PPOModule, patch: pytest.MonkeyPatch) -> None:
    """The evaluation does not use the sampling temperature."""
    stats = module.model.token_stats
    patch.setattr(module.model, "token_stats", lambda hidden, targets, temperature: stats(hidden, targets, 1.0))


def top_k(module: PPOModule, patch: pytest.MonkeyPatch) -> None:
    """Unlikely tokens are never drawn."""
    module.sampling = Sampling(8, temperature=0.7, top_k=20)


@pytest.mark.parametrize("sabotage", [no_positions, dropout_on, another_temperature, top_k])
def test_a_wrong_ratio_is_detected(
    encoding: str, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[PPOModule, pytest.MonkeyPatch], None]
) -> None:
    torch.manual_seed(0)
    module = ppo(encoding, "gpt2", temperature=0.7)
    for parameter in module.parameters():
        parameter.data.mul_(2)
    assert max(residuals(module)) <= 1e-5
    sabotage(module, monkeypatch)
    assert max(residuals(module)) > 1e-3


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bf16_the_ratio_stays_near_1(encoding: str, family: str, precision: str) -> None:
    options: dict[str, Any] = {"ppo_epochs": 1, "minibatches": 2}
    rows = fit(ppo(encoding, family, temperature=0.7, **options), 2, precision=precision)
    for row in rows:
        assert row["train/ratio_residual"] < 0.02
        assert row["train/sampling_residual"] < 0.05
        assert all(value == value for value in row.values())


def test_the_residuals_are_logged(encoding: str) -> None:
    row = fit(ppo(encoding), 1)[0]
    assert 0 < row["train/sampling_residual"] <= 1e-5
    assert row["train/ratio_residual"] <= 1e-5


# ---- several responses per prompt ------------------------------------------------------------------------------------


def test_a_group_responds_to_one_prompt_with_different_random_numbers(encoding: str) -> None:
    module = alone(ppo(encoding, group_size=3, advantage="rloo"))
    batch = prompts(module.tokenizer, QUESTIONS[:2])
    rollout = module.roll_out(batch.repeated(3), module.global_rows(2, copies=3), stream=0)
    assert [c.messages[0].text for c in rollout.conversations] == [QUESTIONS[0]] * 3 + [QUESTIONS[1]] * 3
    assert len({reply.text for reply in rollout.replies}) == 6
    targets = module.compute_advantages(
        rollout, module.token_rewards(rollout, torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]))
    )
    lengths = rollout.response_mask.sum(1)
    for row, advantage in enumerate([-3, -1.5, 4.5, 0, 0, 0]):  # as by hand in test_advantages_and_losses.py
        expected = rollout.response_mask[row] * advantage
        torch.testing.assert_close(targets.advantages[row], expected.float(), atol=1e-5, rtol=0)
        assert int(lengths[row]) == rollout.replies[row].tokens


def test_processes_sample_the_same_groups_as_one(encoding: str) -> None:
    """Prompt i of process r is global prompt 2·i + r, and its copies are adjacent."""
    one = alone(ppo(encoding, group_size=2)).global_rows(4, copies=2)
    assert one.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    two = [alone(ppo(encoding, group_size=2), 2, rank).global_rows(2, copies=2).tolist() for rank in range(2)]
    assert two == [[0, 1, 4, 5], [2, 3, 6, 7]]
    # Each process takes its rows of the same global minibatches.
    whole = alone(ppo(encoding, group_size=2, minibatches=3)).minibatches(8, 0)
    parts = [alone(ppo(encoding, group_size=2, minibatches=3), 2, rank).minibatches(4, 0) for rank in range(2)]
    for all_rows, first, second in zip(whole, *parts, strict=True):
        mine = [two[rank][row] for rank, part in enumerate((first, second)) for row in torch.cat(part).tolist()]
        assert sorted(mine) == sorted(torch.cat(all_rows).tolist())


@pytest.mark.parametrize("advantage", ["rloo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_the_policy_learns_without_a_critic(encoding: str, advantage: str) -> None:
    options: dict[str, Any] = {"group_size": 4, "ppo_epochs": 2, "minibatches": 2, "kl_coef": 0.0}
    module = ppo(encoding, advantage=advantage, reward=Reward([LetterE()]), **options)
    rows = fit(module, 25)
    assert rows[0]["train/reward"] < 0.1
    assert rows[-1]["train/reward"] > 0.3
    assert not {"train/value_loss", "train/explained_variance"} & set(rows[0])
    assert rows[0]["train/episodes"] == 32
    assert all(not p.requires_grad for p in module.model.value_head.parameters())


# ---- whole conversations ---------------------------------------------------------------------------------------------


def talk(*texts: str) -> Conversation:
    """The first prompt of a conversation with the user messages ``texts`` and the human responses ``ok``."""
    messages: tuple[Message, ...] = ()
    turns = []
    for text in texts:
        messages = (*messages, Message("user", text))
        turns.append(Conversation(messages, references=(Message("assistant", f"to {text}"),), check=Check((text,))))
        messages = (*messages, Message("assistant", "ok"))
    return Conversation(**{**fields(turns[0]), "later": tuple(turns[1:])})


def fields(conversation: Conversation) -> dict[str, Any]:
    return {name: getattr(conversation, name) for name in ("messages", "references", "check", "tree_id")}


def talks(module: PPOModule, *conversations: Conversation) -> PromptBatch:
    rows = [module.tokenizer.render_prompt(c).ids for c in conversations]
    ids, mask = pad(rows, module.tokenizer.pad_id, "left")
    return PromptBatch(ids, mask, conversations)


class Says:
    """Replaces sampling: generates the given bytes for any prompt, and keeps the prompts."""

    def __init__(self, *turns: list[list[int]]) -> None:
        self.turns = list(turns)
        self.asked: list[list[list[int]]] = []

    def __call__(self, ids: Tensor, mask: Tensor, *_: Any) -> Generated:
        self.asked.append([row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])
        rows = self.turns.pop(0)
        tokens, said = pad(rows, 256, "right")
        return Generated(tokens, said, torch.tensor([row[-1] == 260 for row in rows]), said * -0.5)


@torch.no_grad()
def test_a_conversation_continues_with_the_generated_response(encoding: str) -> None:
    """User messages come from the data; truncated responses get an end marker; the conversation ends with the data."""
    module = alone(ppo(encoding, turns=3, lam=1.0, kl_coef=0.0))
    says = Says([[97, 260], [98, 99]], [[100, 260], [101, 260]])
    module.generate = says  # type: ignore[method-assign]
    batch = talks(module, talk("u", "v"), talk("x", "y"))
    rollout = module.roll_out(batch, torch.arange(2), stream=0)
    user, assistant, end = 258, 259, 260
    first, second = [user, 117, end, assistant], [user, 120, end, assistant]
    assert says.asked[0] == [first, second]
    again = [user, 118, end, assistant], [user, 121, end, assistant]
    assert says.asked[1] == [[*first, 97, end, *again[0]], [*second, 98, 99, end, *again[1]]]

    assert [reply.text for reply in rollout.replies] == ["a", "bc", "d", "e"]
    assert [[m.text for m in c.messages] for c in rollout.conversations] == [
        ["u"], ["x"], ["u", "a", "v"], ["x", "bc", "y"]
    ]  # fmt: skip
    # The references and the check of a turn stay with that turn.
    assert [c.references[0].text for c in rollout.conversations] == ["to u", "to x", "to v", "to y"]
    assert [c.check for c in rollout.conversations] == [Check(("u",)), Check(("x",)), Check(("v",)), Check(("y",))]
    assert not any(c.later for c in rollout.conversations)

    # Columns start at the first sampled token; user turns and added end markers are gaps.
    assert rollout.response_index.tolist() == [
        [0, 0, -1, -1, -1, -1, 2, 2, -1],
        [1, 1, -1, -1, -1, -1, -1, 3, 3],
    ]
    assert torch.equal(rollout.response_mask, rollout.response_index >= 0)
    said = [row[keep].tolist() for row, keep in zip(rollout.ids, rollout.sampled, strict=True)]
    assert said == [[97, 260, 100, 260], [98, 99, 101, 260]]
    assert torch.equal(rollout.sampling_logprobs, rollout.response_mask * -0.5)

    # Each turn gets its score; with λ = γ = 1, the return of the first turn includes the later ones.
    targets = module.compute_advantages(rollout, module.token_rewards(rollout, torch.tensor([1.0, 10.0, 2.0, 20.0])))
    assert targets.returns[0].tolist() == [3, 3, 0, 0, 0, 0, 2, 2, 0]
    assert targets.returns[1].tolist() == [30, 30, 0, 0, 0, 0, 0, 20, 20]


@torch.no_grad()
def test_each_turn_is_evaluated_after_all_previous_turns(encoding: str) -> None:
    """Log-probs of both turns equal those of a plain pass over the whole conversation; the ratio is 1 after gaps."""
    module = alone(ppo(encoding, turns=2))
    rollout = module.roll_out(talks(module, talk("u", "v"), talk("long one", "y"), talk("z")), torch.arange(3), 0)
    assert len(rollout.replies) == 5
    for row in range(3):
        whole = rollout.ids[row][rollout.attention_mask[row]][None]
        logits = module.model.logits(module.model(whole, torch.ones_like(whole, dtype=torch.bool)))
        logprobs = logits.log_softmax(-1)[0, :-1].gather(-1, whole[0, 1:, None]).squeeze(-1)
        expected = logprobs[rollout.sampled[row][rollout.attention_mask[row]][1:]]
        torch.testing.assert_close(rollout.old_logprobs[row][rollout.response_mask[row]], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.sampling_logprobs, rollout.old_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.kl, torch.zeros(5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_turn_draws_its_own_random_numbers(encoding: str) -> None:
    """At most 8 tokens a turn: the second turn has the positions from 8 on, those of its row of all processes."""
    module = alone(ppo(encoding, turns=2, seed=5))
    says, drawn = Says([[97, 260], [98, 260]], [[99, 260]]), []

    def generate(ids: Tensor, mask: Tensor, sampling: Sampling, uniforms: Uniforms) -> Generated:
        drawn.append([uniforms(position).tolist() for position in range(8)])
        assert sampling == Sampling(8, temperature=1.0)
        return says(ids, mask)

    module.generate = generate  # type: ignore[method-assign]
    module.roll_out(talks(module, talk("u"), talk("x", "y")), torch.tensor([30, 40]), stream=3)
    first, second = addressed_uniforms(5, 3, torch.tensor([30, 40])), addressed_uniforms(5, 3, torch.tensor([40]))
    assert drawn == [[first(i).tolist() for i in range(8)], [second(i).tolist() for i in range(8, 16)]]


def test_columns_from_the_first_to_the_last_sampled_token() -> None:
    """The example in the docstring of pack; a row that starts later repeats its last column, which is not inside."""
    columns, inside = pack(torch.tensor([[-1, -1, 0, 0, -1, 2, 2], [-1, -1, -1, 1, 1, -1, -1], [-1] * 5 + [3, 3]]))
    assert columns.tolist() == [[2, 3, 4, 5, 6], [3, 4, 5, 6, 6], [5, 6, 6, 6, 6]]
    assert inside.tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] * 2 + [False] * 3]


def test_a_turn_that_does_not_fit_ends_the_conversation(encoding: str) -> None:
    """48 tokens: a turn of 4 + 8, the next of 30 and 8 more are 50."""
    module = alone(ppo(encoding, turns=2))
    long = "v" * 27
    rollout = module.roll_out(talks(module, talk("u", long), talk("u", "v")), torch.arange(2), stream=0)
    assert [c.messages[-1].text for c in rollout.conversations] == ["u", "u", "v"]


@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_process_with_finished_conversations_waits_for_the_others(
    encoding: str, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """It takes part with a dummy row, not with a row that has no position left."""
    module = alone(ppo(encoding, family, turns=2))
    monkeypatch.setattr("rlchat.ppo.rollouts.anywhere", lambda *_: True)  # another process continues
    rollout = module.roll_out(talks(module, talk("u" * 37)), torch.arange(1), stream=0)
    assert len(rollout.replies) == 1
    assert rollout.attention_mask.sum() <= 48


def test_answers_are_counted_in_every_turn_sampled_and_greedy(encoding: str) -> None:
    module = ppo(encoding, turns=2)
    counts: dict[str, int] = {}
    module.tally_answers = lambda name, prompts, replies: counts.update({name: len(replies)})  # type: ignore[method-assign]
    trainer().validate(module, [serve([talks(module, talk("u", "v"), talk("x"))])], verbose=False)
    assert counts == {"answer_accuracy": 3, "answer_accuracy_greedy": 3}


@pytest.mark.slow
def test_whole_conversations_are_trained_on(encoding: str) -> None:
    module = ppo(encoding, turns=2, ppo_epochs=2, minibatches=2, kl_coef=0.0, reward=Reward([LetterE()]))
    batch = talks(module, *(talk(a, b) for a in "stuvw" for b in "xyz"))
    rows = fit(module, 25, batch)
    assert rows[0]["train/episodes"] == 30  # two turns each
    assert rows[0]["train/reward"] < 0.1
    assert rows[-1]["train/reward"] > 0.3


# ---- critics ---------------------------------------------------------------------------------------------------------


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_with_a_separate_critic_only_the_policy_trains_its_backbone(encoding: str) -> None:
    """The value loss has no gradient in the policy, and the policy loss none in the critic."""
    module = ppo(encoding, critic="separate")
    assert module.critic is not None
    rollout = rolled_out(module)
    iteration = iterated(module, rollout, torch.arange(8.0))
    everyone, tokens = torch.arange(8), rollout.response_mask.sum()
    new = module.evaluate_tokens(
        module.model, rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask
    )
    new.values.square().sum().backward()
    assert all(p.grad is None for p in module.model.parameters())
    module.zero_grad()
    new = module.evaluate_tokens(
        module.model, rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask
    )
    new.logprobs.sum().backward()
    assert all(p.grad is None for p in module.critic.parameters())
    # The loss has a gradient in every parameter.
    module.zero_grad()
    loss, _ = module.minibatch_loss(iteration, everyone, tokens)
    loss.backward()
    idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


@pytest.mark.parametrize("critic", ["shared", pytest.param("separate", marks=pytest.mark.slow)])
def test_the_policy_does_not_change_during_critic_warmup(encoding: str, critic: str) -> None:
    """For two iterations; weight decay and momentum are not applied either."""
    module = ppo(encoding, critic=critic, critic_warmup=2, weight_decay=0.1, kl_coef=0.0)
    trunk, head = flat(module.model.backbone), flat(module.critic or module.model.value_head)
    fit(module, 2)
    assert torch.equal(flat(module.model.backbone), trunk)
    assert not torch.equal(flat(module.critic or module.model.value_head), head)
    later = ppo(encoding, critic=critic, critic_warmup=2, weight_decay=0.1, kl_coef=0.0)
    rows = fit(later, 3)
    assert not torch.equal(flat(later.model.backbone), trunk)
    assert [row["train/approx_kl"] > 1e-9 for row in rows] == [False, False, True]


def test_a_separate_critic_has_a_hidden_layer_like_the_policys_value_head(encoding: str) -> None:
    critic = ppo(encoding, critic="separate", hidden_dim=5).critic
    assert critic is not None
    assert sorted(tuple(p.shape) for p in critic.value_head.parameters()) == [(1,), (1, 5), (5,), (5, 16)]


@pytest.mark.parametrize("options", [{}, {"critic": "separate"}, {"advantage": "rloo", "group_size": 2}], ids=str)
def test_only_a_policy_with_a_critic_has_values(encoding: str, options: dict[str, Any]) -> None:
    """A value head may come from a model file even if this run has no critic."""
    module = ppo(encoding, **options)
    for model in (module.model, module.reference):
        torch.nn.init.ones_(model.value_head.weight)  # type: ignore[arg-type]
    if module.critic is not None:
        torch.nn.init.ones_(module.critic.value_head.weight)  # type: ignore[arg-type]
    rollout = rolled_out(module)
    assert bool(rollout.values.any()) is ("advantage" not in options)
    parts = (rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask)
    assert not module.evaluate_tokens(module.reference, *parts).values.any()


class LengthOfTheQuestion(ReplyFactor):
    """Does not depend on the response, so the critic can predict it."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return len(prompt.messages[-1].text) / 10


@pytest.mark.parametrize("critic", ["shared", pytest.param("separate", marks=pytest.mark.slow)])
def test_the_critic_learns_to_explain_returns(encoding: str, critic: str) -> None:
    options: dict[str, Any] = {"value_coef": 1.0, "value_clip": 10.0, "kl_coef": 0.0, "hidden_dim": 64}
    rows = fit(ppo(encoding, critic=critic, reward=Reward([LengthOfTheQuestion()]), **options), 6)
    assert rows[0]["train/explained_variance"] == pytest.approx(0, abs=1e-6)  # a head of zeros explains nothing
    assert rows[-1]["train/explained_variance"] > 0.5


def test_explained_variance_is_0_if_all_returns_are_equal(encoding: str) -> None:
    rows = fit(ppo(encoding, reward=Reward([Nothing()]), kl_coef=0.0), 2)
    assert [row["train/explained_variance"] for row in rows] == [0, 0]


class Nothing(ReplyFactor):
    """Scores nothing."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 0.0


def test_a_critic_initialized_from_a_reward_model(encoding: str, tmp_path: Path) -> None:
    """Its value after any token is the standardized score of the text so far."""
    torch.manual_seed(1)
    tokenizer = ChatTokenizer(encoding)
    shape = {"model_type": "llama", **BACKBONES["llama"], "hidden_size": 24, "num_attention_heads": 4}
    judge = RewardModel(Backbone(shape, tokenizer.vocab_size, 48)).eval()
    torch.nn.init.normal_(judge.score_head.weight)  # type: ignore[arg-type]
    torch.nn.init.normal_(judge.score_head.bias)  # type: ignore[arg-type]
    judge.mean.fill_(0.7)
    judge.std.fill_(2.0)
    path = tmp_path / "judge.pt"
    save_bundle(path, RewardBundle(judge, tokenizer, 48))
    module = ppo(encoding, critic="separate", critic_init=str(path))
    assert module.critic is not None
    ids = torch.tensor([tokenizer.render(Conversation((Message("user", "Hi"), Message("assistant", "Ho")))).ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        values = module.critic.eval()(ids, mask)[0]
        for end in range(1, ids.shape[1] + 1):
            score = judge.standardised(judge(ids[:, :end], mask[:, :end]))
            torch.testing.assert_close(values[end - 1], score[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"set --model\.critic separate"):
        ppo(encoding, critic_init=str(path))
    short = tmp_path / "short.pt"
    save_bundle(short, RewardBundle(judge, tokenizer, 40))
    with pytest.raises(UserError, match="has max_length 40, less than the policy's 48"):
        ppo(encoding, critic="separate", critic_init=str(short))


def test_the_critic_is_saved_with_the_model(encoding: str, tmp_path: Path) -> None:
    """In the model file, from which a later run initializes it; a shared critic is the model's value head."""
    module = ppo(encoding, critic="separate")
    fit(module, 1)
    module.save_bundle(tmp_path / "model.pt")
    bundle = load_policy(tmp_path / "model.pt")
    assert isinstance(bundle.critic, Critic)
    assert isinstance(module.critic, Critic)
    assert torch.equal(flat(bundle.critic), flat(module.critic))
    again = PPOModule(init_from=str(tmp_path / "model.pt"), max_new_tokens=8, critic="separate")
    assert again.critic is not None
    assert torch.equal(flat(again.critic), flat(module.critic))
    assert bundle.about["critic"] == "separate"
    shared = ppo(encoding)
    fit(shared, 1)
    shared.save_bundle(tmp_path / "shared.pt")
    assert load_policy(tmp_path / "shared.pt").critic is None


# ---- micro batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"critic": "separate", "sft_coef": 1.0}, {"advantage": "grpo", "group_size": 2}]
)
@pytest.mark.parametrize("size", [1, 3])
def test_accumulated_gradients_equal_those_of_the_large_batch(
    encoding: str, size: int, options: dict[str, Any]
) -> None:
    options = {**options, "entropy_coef": 0.01, "ppo_epochs": 2, "minibatches": 2, "learning_rate": 1e-3}
    whole, parts = ppo(encoding, **options), ppo(encoding, **options, micro_batch_size=size)
    rows = [fit(module, 2) for module in (whole, parts)]
    torch.testing.assert_close(flat(parts), flat(whole), atol=1e-5, rtol=0)
    for one, other in zip(*rows, strict=True):
        for name in one:
            if not name.startswith(("time/", "perf/")):
                assert other[name] == pytest.approx(one[name], abs=1e-4), name


@pytest.mark.parametrize(("per_row", "rows"), [(3.5, 3), (1.0, 1), (0.2, 1)])
def test_a_cpu_takes_as_many_rows_as_have_few_logits(
    encoding: str, monkeypatch: pytest.MonkeyPatch, per_row: float, rows: int
) -> None:
    options: dict[str, Any] = {"ppo_epochs": 2, "minibatches": 2, "learning_rate": 1e-3, "sft_coef": 0.5}
    whole = ppo(encoding, **options)
    assert whole.micro_batch_size > 1000  # of a small vocabulary, all rows
    fit(whole, 2)
    most = whole.options.max_new_tokens * whole.model.backbone.vocab_size
    monkeypatch.setattr("rlchat.ppo.rollouts._CPU_LOGITS", int(per_row * most))
    parts = ppo(encoding, **options)
    assert parts.micro_batch_size == rows
    assert ppo(encoding, **options, micro_batch_size=2).micro_batch_size == 2
    assert all(len(part) <= rows for minibatch in alone(parts, 1, 0).minibatches(8, 0) for part in minibatch)
    fit(parts, 2)
    torch.testing.assert_close(flat(parts), flat(whole), atol=1e-5, rtol=0)


def test_gradients_do_not_take_memory_during_a_rollout(encoding: str) -> None:
    module = ppo(encoding)
    fit(module, 1)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"minibatches": 1}, 8),
        ({"minibatches": 3}, 3),
        ({"minibatches": 3, "micro_batch_size": 2}, 2),
        ({"minibatches": 1, "micro_batch_size": 5}, 5),
        ({"minibatches": 3, "advantage": "rloo", "group_size": 2}, 4),  # no group is separated
    ],
)
def test_a_rollout_is_evaluated_in_parts(encoding: str, options: dict[str, Any], rows: int) -> None:
    module = ppo(encoding, **options)
    assert module.rows_per_pass(8) == rows
    transcript = module.sample_transcript(prompts(module.tokenizer), torch.arange(8), 0)
    rollout = module.evaluate_transcript(transcript)
    whole = module.evaluate_tokens(
        module.model, rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask
    )
    torch.testing.assert_close(rollout.old_logprobs, whole.logprobs)
    torch.testing.assert_close(rollout.values, whole.values)


def test_all_processes_take_the_same_number_of_microbatches(encoding: str) -> None:
    """Even if a process has fewer rows, so that no process waits for a gradient that never comes."""
    for world in (2, 3, 4):
        modules = [alone(ppo(encoding, minibatches=3, micro_batch_size=1), world, rank) for rank in range(world)]
        plans = [module.minibatches(4, 0) for module in modules]
        for minibatch in zip(*plans, strict=True):
            assert len({len(part) for part in minibatch}) == 1
        assert sum(len(torch.cat(part)) for plan in plans for part in plan) == 4 * world


# ---- rows for the rollout log ----------------------------------------------------------------------------------------


def test_a_rollout_as_rows(encoding: str) -> None:
    module = ppo(encoding)
    torch.nn.init.normal_(module.model.value_head.weight)  # type: ignore[arg-type]
    for parameter in module.reference.parameters():
        parameter.mul_(1.5)
    rollout: Rollout = rolled_out(module)
    factors = {"one": torch.arange(8.0), "two": torch.ones(8)}
    rows = rollout.rows(factors)
    for n, row in enumerate(rows):
        assert row["prompt"] == [{"role": "user", "content": QUESTIONS[n]}]
        assert row["reply"] == rollout.replies[n].text
        assert row["ended_by"] == ("end of turn" if rollout.replies[n].ended else "token limit")
        assert row["reward"] == n + 1
        assert row["factors"] == {"one": n, "two": 1}
        kl = (rollout.old_logprobs - rollout.ref_logprobs)[n][rollout.response_mask[n]].sum()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-5)
        assert row["value"] == pytest.approx(float(rollout.values[n, 0]))


def test_the_rows_of_a_conversation_of_two_turns_by_hand() -> None:
    """Response 2 follows response 0 in the same row after a gap, in which nothing counts."""
    index = torch.tensor([[0, 0, -1, 2], [1, -1, -1, -1]])
    asked = [Conversation((Message("user", text),)) for text in "abc"]
    rollout = Rollout(
        conversations=asked,
        replies=[Reply("x y", 2, True), Reply("z", 1, False), Reply("w", 1, True)],
        ids=torch.zeros(2, 6, dtype=torch.long),
        attention_mask=torch.ones(2, 6, dtype=torch.bool),
        sampled=torch.zeros(2, 6, dtype=torch.bool),
        response_index=index,
        response_mask=index >= 0,
        old_logprobs=torch.tensor([[-1.0, -2.0, 9.0, -0.5], [-4.0, 9.0, 9.0, 9.0]]),
        ref_logprobs=torch.tensor([[-1.5, -2.25, 5.0, -0.25], [-6.0, 5.0, 5.0, 5.0]]),
        values=torch.tensor([[0.1, 0.2, 7.0, 0.3], [0.4, 7.0, 7.0, 7.0]]),
        entropy=torch.zeros(2, 4),
        sampling_logprobs=torch.zeros(2, 4),
        kept=KeptStates(),
    )
    assert rollout.kl.tolist() == [0.75, 2.0, -0.25]
    rows = rollout.rows({"one": torch.tensor([1.0, 2.0, 3.0]), "two": torch.tensor([0.5, -2.0, 0.0])})
    assert [row.pop("value") for row in rows] == pytest.approx([0.1, 0.4, 0.3])
    assert rows == [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "reply": reply,
            "tokens": tokens,
            "ended_by": ended_by,
            "reward": one + two,
            "factors": {"one": one, "two": two},
            "kl": kl,
        }
        for prompt, reply, tokens, ended_by, one, two, kl in [
            ("a", "x y", 2, "end of turn", 1.0, 0.5, 0.75),
            ("b", "z", 1, "token limit", 2.0, -2.0, 2.0),
            ("c", "w", 1, "end of turn", 3.0, 0.0, -0.25),
        ]
    ]


def test_the_reference_model_is_a_copy(encoding: str) -> None:
    module = ppo(encoding)
    assert isinstance(module.reference, RLChatModel)
    before = copy.deepcopy(module.reference.state_dict())
    fit(module, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.reference.state_dict().items())
