"""Kept outputs of frozen layers: the same numbers as with all layers, and the frozen ones run once per rollout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_ppo import BACKBONES, Letters, fit, iterated, prompts, rolled_out
from torch import Tensor, nn

from rlchat.models.adapters import frozen_layers
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.models.networks import RewardModel
from rlchat.ppo import frozen_layers as tested
from rlchat.ppo.module import PPOModule
from rlchat.ppo.rollouts import Rollout, TokenEvaluation
from rlchat.rewards import Reward

LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
BLOOM = {"n_layer": 2, "hidden_size": 16, "n_head": 2}  # its layers return tuples
ROWS = torch.tensor([5, 1, 2])


def ppo(encoding: str, family: str = "llama", layers: int = 4, **options: Any) -> PPOModule:
    """A tiny PPO with more layers than that of the helpers."""
    torch.manual_seed(0)
    shape = {"bloom": BLOOM, **BACKBONES}[family]
    module = PPOModule(
        base_model={"model_type": family, **shape, **{name: layers for name in LAYERS if name in shape}},
        tiktoken_encoding=encoding,
        max_length=48,
        reward=Reward([Letters()]),
        **{"max_new_tokens": 8, "schedule": "constant", "learning_rate": 1e-2, "train_layers": 2, **options},
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name or "value_head" in name:  # zero at first
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2 and not name.startswith("reference"):
                parameter.mul_(2)  # so that every layer matters; shared weights once
    return module


def all_layers(module: PPOModule) -> PPOModule:
    """``module`` without kept outputs."""
    module.frozen_layers.can_skip = False
    return module


def evaluated(module: PPOModule, rollout: Rollout, rows: Tensor, keeps: bool) -> TokenEvaluation:
    parts = [rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask]
    return module.evaluate_tokens(
        module.model, *(part[rows] for part in parts), rollout.kept.rows(rows) if keeps else None
    )


def gradients(module: PPOModule, new: TokenEvaluation) -> dict[str, Tensor]:
    module.zero_grad()
    (new.logprobs.sum() + new.values.square().sum() + new.entropy.sum()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@contextmanager
def counted(network: Any, module: PPOModule) -> Iterator[list[int]]:
    """The number of each layer of ``network`` whose weights are used, in order."""
    ran: list[int] = []
    layers = frozen_layers(network.backbone, module.options.trained_part)
    handles = [
        next(part for part in layer.modules() if not list(part.children())).register_forward_hook(
            lambda *_, number=number: ran.append(number)
        )
        for number, layer in enumerate(layers)
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", [*BACKBONES, "bloom"])
def test_logprobs_values_and_gradients_are_those_of_all_layers(encoding: str, family: str) -> None:
    module = ppo(encoding, family)
    rollout = rolled_out(module)
    with counted(module.model, module) as ran:
        short = evaluated(module, rollout, ROWS, keeps=True)
    assert ran == []
    full = evaluated(module, rollout, ROWS, keeps=False)
    for one, other in zip(short, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    found, expected = gradients(module, short), gradients(module, full)
    assert found.keys() == expected.keys()
    assert len(found) > 4
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * max(largest, 1), msg=name)


@pytest.mark.parametrize("packs", [True, False])
def test_rows_that_are_packed_or_padded_start_from_packed_or_padded_states(encoding: str, packs: bool) -> None:
    module = ppo(encoding)
    rolled_out(module)  # it finds that the family packs
    module.model.backbone._packs = packs
    rollout = rolled_out(module)
    assert rollout.kept.states is not None
    tokens = int(rollout.attention_mask.sum())
    assert len(rollout.kept.states) < tokens if packs else len(rollout.kept.states) == rollout.ids.numel()
    for packs_rows in (True, False):
        module.model.backbone._packs = packs_rows
        short, full = (evaluated(module, rollout, ROWS, keeps) for keeps in (True, False))
        torch.testing.assert_close(short.logprobs, full.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"advantage": "rloo", "group_size": 2},
        pytest.param({"adapter": "lora", "critic": "separate"}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "micro_batch_size": 3, "turns": 2}, marks=pytest.mark.slow),
    ],
    ids=["gae", "rloo", "lora-critic", "checkpointing"],
)
def test_ppo_takes_the_same_steps_as_with_all_layers(encoding: str, options: dict[str, Any]) -> None:
    kept, plain = ppo(encoding, **options), all_layers(ppo(encoding, **options))
    rows, expected = (fit(module, 2) for module in (kept, plain))
    assert kept.frozen_layers.can_skip
    assert rows[0]["train/ratio_residual"] == pytest.approx(expected[0]["train/ratio_residual"], abs=1e-4)
    moved = 0.0
    start = ppo(encoding, **options)
    for (name, p), q, before in zip(kept.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=name)
        moved = max(moved, float((p - before).detach().abs().max()))
    assert moved > 0.02


def test_the_first_ratio_is_1(encoding: str) -> None:
    module = ppo(encoding)
    rollout = rolled_out(module)
    iteration = iterated(module, rollout, torch.arange(8.0))
    _, metrics = module.minibatch_loss(iteration, torch.arange(8), rollout.response_mask.sum())
    assert float(metrics["ratio_residual"]) <= 1e-5


def test_the_frozen_layers_run_once_per_rollout(encoding: str) -> None:
    module = ppo(encoding, critic="separate", ppo_epochs=3, minibatches=2)
    rolled_out(module)  # the check of the family runs them too
    transcript = module.sample_transcript(prompts(module.tokenizer), torch.arange(8), 0)
    with (
        counted(module.model, module) as of_policy,
        counted(module.reference, module) as of_reference,
        counted(module.critic, module) as of_critic,
    ):
        rollout = module.evaluate_transcript(transcript)
        iteration = iterated(module, rollout, torch.arange(8.0))
        for part in module.minibatches(8, 0):
            module.minibatch_loss(iteration, part[0], torch.tensor(8.0))
    assert of_policy == [0, 1, 0, 1]  # the rollout is evaluated in as many parts as a pass of the update has
    assert of_reference == []
    assert of_critic == [0, 1, 0, 1]  # with the policy's passes that record them


@pytest.mark.parametrize("packs", [True, False])
def test_states_of_several_passes_are_those_of_one(encoding: str, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ppo(encoding, minibatches=3)
    rolled_out(module)
    module.model.backbone._packs = packs
    transcript = module.sample_transcript(prompts(module.tokenizer), torch.arange(8), 0)
    parts = module.evaluate_transcript(transcript).kept
    monkeypatch.setattr(module, "rows_per_pass", lambda rows: rows)
    whole = module.evaluate_transcript(transcript).kept
    mask = transcript.attention_mask
    assert parts.states is not None
    assert whole.states is not None
    torch.testing.assert_close(parts.states[parts.source[mask]], whole.states[whole.source[mask]])


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_policy_from_a_model_file(encoding: str, tmp_path: Path, critic: Any) -> None:
    """Its networks have not run before, so that their first pass checks whether they take packed batches."""
    module = ppo(encoding)
    save_bundle(tmp_path / "model.pt", PolicyBundle(module.model, module.tokenizer, module.max_length))
    again = PPOModule(init_from=str(tmp_path / "model.pt"), max_new_tokens=8, train_layers=2, critic=critic)
    rollout = rolled_out(again)
    assert again.frozen_layers.can_skip
    assert all(network.backbone._packs for network in (again.model, again.reference, again.critic) if network)
    assert torch.equal(rollout.ref_logprobs, rollout.old_logprobs)


def test_a_critic_with_other_frozen_weights_runs_all_its_layers(encoding: str, tmp_path: Path) -> None:
    first = ppo(encoding)
    reward_model = RewardModel(ppo(encoding, train_layers=None, layers=3).model.backbone)
    save_bundle(tmp_path / "reward.pt", RewardBundle(reward_model, first.tokenizer, first.max_length, {}))
    module = ppo(encoding, critic="separate", critic_init=str(tmp_path / "reward.pt"))
    rollout = rolled_out(module)
    with counted(module.critic, module) as ran:
        short = evaluated(module, rollout, ROWS, keeps=True)
    assert ran == [0]
    torch.testing.assert_close(short.values, evaluated(module, rollout, ROWS, keeps=False).values)


def test_states_above_the_limit_are_not_kept(
    encoding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ppo(encoding)
    rolled_out(module)
    monkeypatch.setattr(tested, "MAX_BYTES", 1000)
    with caplog.at_level(logging.INFO, "rlchat"):
        rollouts = [rolled_out(module) for _ in range(2)]
    assert [rollout.kept.states for rollout in rollouts] == [None, None]
    assert len([r for r in caplog.records if "needs more than 1 GiB" in r.message]) == 1
    with counted(module.model, module) as ran:
        evaluated(module, rollouts[0], ROWS, keeps=True)
    assert ran == [0, 1]


def test_a_family_whose_trained_layers_see_other_layers_runs_all_of_them(
    encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = ppo(encoding)
    first, *_, last = module.model.backbone.transformer.layers
    seen: list[Tensor] = []

    def remember(layer: nn.Module, args: Any, output: Tensor) -> None:
        seen[:] = [output]

    def add(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + seen[0]

    first.register_forward_hook(remember)
    last.register_forward_hook(add)
    with caplog.at_level(logging.INFO, "rlchat"):
        rollout = rolled_out(module)
    assert rollout.kept.states is None
    assert "the frozen layers of llama run in every pass: its trained layers depend on more" in caplog.text


def test_without_frozen_layers_nothing_is_kept(encoding: str) -> None:
    for options in ({"train_layers": None}, {"train_layers": None, "adapter": "lora"}, {"train_layers": 4}):
        module = ppo(encoding, **options)
        assert rolled_out(module).kept.states is None
        assert module.frozen_layers.can_skip is False


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_layers_run_again_after_a_failure(encoding: str, checkpointing: bool) -> None:
    module = ppo(encoding, gradient_checkpointing=checkpointing)
    rollout = rolled_out(module)
    before = evaluated(module, rollout, ROWS, keeps=False)
    layers = frozen_layers(module.model.backbone, module.options.trained_part)
    forwards = [vars(layer).get("forward") for layer in layers]
    assert (forwards != [None, None]) is checkpointing
    with pytest.raises(KeyError), module.frozen_layers.skipped(module.model, rollout.kept):
        raise KeyError
    with counted(module.model, module) as ran:
        after = evaluated(module, rollout, ROWS, keeps=False)
    assert ran == [0, 1]
    assert [vars(layer).get("forward") for layer in layers] == forwards
    assert torch.equal(after.logprobs, before.logprobs)


def test_a_copy_of_the_module_skips_its_own_layers(encoding: str) -> None:
    module = ppo(encoding)
    rollout = rolled_out(module)
    other = copy.deepcopy(module)
    with counted(other.model, other) as of_copy, counted(module.model, module) as of_module:
        evaluated(other, rollout, ROWS, keeps=True)
        evaluated(module, rollout, ROWS, keeps=False)
    assert of_copy == []
    assert of_module == [0, 1]


def test_the_memory_is_freed_after_the_update(encoding: str) -> None:
    module = ppo(encoding, ppo_epochs=1, minibatches=1)
    fit(module, 1)
    assert module.last_iteration is not None
    assert module.frozen_layers.can_skip
    assert module.last_iteration.rollout.kept.states is None
