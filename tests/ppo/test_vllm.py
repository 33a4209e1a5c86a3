"""Rollouts with a stand-in for vLLM: synchronized weights, the options of each request, and what is not supported.

vLLM itself needs a GPU. ``docs/ppo.md`` says what was checked with it.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import fake_vllm
from helpers.small_ppo import ONE_STEP, alone, fit, ppo, prompts, serve, trainer
from torch import Tensor

from rlchat.errors import NonFiniteError, UserError
from rlchat.models.adapters import merged_state
from rlchat.models.sampling import addressed_uniforms
from rlchat.ppo.engines import vllm as engine
from rlchat.ppo.module import PPOModule


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[fake_vllm.LLM]:
    """The instances of a stand-in for vLLM, which runs on a CPU."""
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(engine, "_check_place", lambda module: None)
    return fake_vllm.INSTANCES


def weights(module: PPOModule) -> dict[str, Tensor]:
    """The policy's weights, with adapters merged, by their names in the backbone."""
    return {name: value.clone() for name, value in merged_state(module.model.backbone).items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {"group_size": 2, "advantage": "rloo", "temperature": 0.7}),
        ("llama", {"adapter": "lora", "lora_rank": 2}),
        ("llama", {"train_layers": 1, "turns": 2}),
    ],
)
def test_rollouts_are_those_of_the_present_weights(
    encoding: str, vllm: list[fake_vllm.LLM], family: str, options: dict[str, Any]
) -> None:
    module = ppo(encoding, family, rollout_engine="vllm", **options)
    rows = fit(module, 2)
    (llm,) = vllm
    assert len(llm.versions) == 2
    for row in rows:  # log-probs of the sampling are those of the policy, in both iterations
        assert row["train/ratio_residual"] <= 1e-5
        assert row["train/sampling_residual"] <= 1e-4
    first, second = llm.versions
    assert first.keys() == second.keys()
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert changed
    if "adapter" in options:
        assert all("proj" in name for name in changed)


def test_the_folder_s_names_are_those_of_the_policy_s_weights(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = ppo(encoding, rollout_engine="vllm", adapter="lora")
    fit(module, 1)
    module.rollout_engine.synchronize(module)
    (llm,) = vllm
    names, expected = module.rollout_engine._names, weights(module)  # type: ignore[attr-defined]
    assert names["transformer.layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    assert names["head.weight"] == "lm_head.weight"
    assert names.keys() == expected.keys()
    assert all(torch.equal(llm.versions[-1][names[name]], value) for name, value in expected.items())
    assert set(llm.network.state_dict()) == set(names.values())


def test_a_tied_head_is_not_sent(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    fit(ppo(encoding, "gpt2", rollout_engine="vllm", **ONE_STEP), 1)
    assert "transformer.wte.weight" in vllm[0].versions[0]
    assert "lm_head.weight" not in vllm[0].versions[0]


def test_the_options_of_a_request(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = ppo(encoding, rollout_engine="vllm", temperature=0.7, group_size=2, advantage="rloo", seed=3, **ONE_STEP)
    fit(module, 2)
    (llm,) = vllm
    assert (llm.dtype, llm.max_model_len, llm.gpu_memory_utilization) == ("float32", 48, 0.3)
    first, second = llm.requests
    ids = [tokens for tokens, _ in first]
    assert ids[:2] == [module.tokenizer.render_prompt(prompts(module.tokenizer).conversations[0]).ids] * 2
    params = first[0][1]
    assert (params.temperature, params.max_tokens, params.stop_token_ids) == (0.7, 8, [module.tokenizer.end_id])
    assert params.logit_bias == dict.fromkeys(module.tokenizer.unsayable_ids, -math.inf)
    seeds = [[params.seed for _, params in requests] for requests in (first, second)]
    assert len({*seeds[0], *seeds[1]}) == 32  # one for each row of each iteration, also within a group
    for iteration, found in enumerate(seeds):
        assert found == engine.row_seeds(addressed_uniforms(3, iteration, torch.arange(16)))


def test_a_seed_is_made_of_two_uniform_numbers() -> None:
    uniforms = {0: torch.tensor([0.0, 0.5]), 1: torch.tensor([2.0**-24, 0.75])}
    assert engine.row_seeds(uniforms.__getitem__) == [1, 2**47 + 3 * 2**22]


def test_responses_keep_their_ends_and_log_probs(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = ppo(encoding, rollout_engine="vllm")
    end, pad = module.tokenizer.end_id, module.tokenizer.pad_id
    completions = [
        SimpleNamespace(token_ids=[65, end], logprobs=[{65: SimpleNamespace(logprob=-1.0)}, {end: _logprob(-2.0)}]),
        SimpleNamespace(
            token_ids=[66, 67, 68], logprobs=[{66: _logprob(-3.0)}, {67: _logprob(0.0)}, {68: _logprob(-4)}]
        ),
    ]
    found = engine._collected(completions, module, torch.device("cpu"))
    assert found.ids.tolist() == [[65, end, pad], [66, 67, 68]]
    assert found.mask.tolist() == [[True, True, False], [True, True, True]]
    assert found.ended.tolist() == [True, False]
    assert found.logprobs.tolist() == [[-1.0, -2.0, 0.0], [-3.0, 0.0, -4.0]]
    completions[0].logprobs[0][65].logprob = math.nan
    with pytest.raises(NonFiniteError, match="the model's logits are NaN or infinite"):
        engine._collected(completions, module, torch.device("cpu"))


def _logprob(value: float) -> SimpleNamespace:
    return SimpleNamespace(logprob=value)


def test_vllm_sleeps_between_rollouts(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = alone(ppo(encoding, rollout_engine="vllm"))
    module.trainer.precision = "32-true"
    batch, rows = prompts(module.tokenizer), torch.arange(8)
    module.rollout_engine.synchronize(module)
    one = module.roll_out(batch, rows, stream=0)
    assert vllm[0].asleep == {"weights", "kv_cache"}
    two = module.roll_out(batch, rows, stream=0)  # the weights are those of the last synchronization
    assert torch.equal(one.ids, two.ids)
    module.rollout_engine.synchronize(module)
    assert vllm[0].asleep == {"kv_cache"}
    assert torch.equal(module.roll_out(batch, rows, stream=0).ids, one.ids)
    assert not torch.equal(module.roll_out(batch, rows, stream=1).ids, one.ids)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16")])
def test_vllm_computes_in_the_precision_of_the_training(
    encoding: str, vllm: list[fake_vllm.LLM], precision: str, dtype: str
) -> None:
    (row,) = fit(ppo(encoding, rollout_engine="vllm", **ONE_STEP), 1, precision=precision)
    assert vllm[0].dtype == dtype
    assert row["train/sampling_residual"] < 0.05


def test_validation_samples_from_the_weights_that_it_validates(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = ppo(encoding, rollout_engine="vllm")
    trainer().fit(module, serve([prompts(module.tokenizer)]), serve([prompts(module.tokenizer)]))
    (llm,) = vllm
    assert len(llm.versions) == 2  # before the iteration, and before the validation
    names, expected = module.rollout_engine._names, weights(module)  # type: ignore[attr-defined]
    assert all(torch.equal(llm.versions[-1][names[name]], value) for name, value in expected.items())


def test_random_numbers_of_the_training_are_not_used_up(encoding: str, vllm: list[fake_vllm.LLM]) -> None:
    module = alone(ppo(encoding, rollout_engine="vllm"))
    module.trainer.precision = "32-true"
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module.rollout_engine.synchronize(module)
    assert torch.equal(torch.rand(3), expected)


# ---- what is not supported -------------------------------------------------------------------------------------------


def test_vllm_is_not_installed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"rollout_engine vllm requires vLLM: install it with .*-m pip install .*vllm"):
        ppo(encoding, rollout_engine="vllm")


def test_an_architecture_that_vllm_does_not_have(encoding: str, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(
        UserError, match=r"vLLM 0\.0 does not have the architecture LlamaForCausalLM; set --model\.roll"
    ):
        fit(ppo(encoding, rollout_engine="vllm"), 1)


def test_the_run_is_not_on_one_gpu(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    with pytest.raises(
        UserError, match="rollout_engine vllm requires a CUDA GPU; use a machine with one, or set --mod"
    ):
        fit(ppo(encoding, rollout_engine="vllm"), 1)
    with pytest.raises(UserError, match=r"does not support several processes; set --trainer\.devices 1, or set --mod"):
        engine._check_place(alone(ppo(encoding, rollout_engine="vllm"), world=2))


def place(module: PPOModule, device: str) -> Any:
    """What is checked of ``module``, as if it were on ``device``."""
    return SimpleNamespace(trainer=SimpleNamespace(world_size=1), device=torch.device(device), model=module.model)


def test_the_model_cannot_be_sampled_from(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ppo(encoding)
    engine._check_place(place(module, "cuda:0"))
    with pytest.raises(UserError, match="vLLM uses the first GPU, and this run cuda:1; set CUDA_VISIBLE_DEVICES"):
        engine._check_place(place(module, "cuda:1"))
    with pytest.raises(UserError, match="vLLM cannot run distilbert, an encoder, with causal attention; use a decoder"):
        engine._check_place(place(ppo(encoding, "distilbert"), "cuda:0"))
    module.model.unsayable = torch.ones(1025)
    with pytest.raises(
        UserError, match="cannot exclude the 1025 ids of this vocabulary that a response may not contain"
    ):
        engine._check_place(place(module, "cuda:0"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rollout_engine": "sglang"}, "'sglang' for rollout_engine: expected one of rlchat, vllm"),
        ({"vllm_memory": 1.5}, "1.5 for vllm_memory: expected a number above 0 and at most 1"),
        ({"rollout_engine": "vllm", "temperature": 1e-3}, "0.001 for temperature: rollout_engine vllm does not sample"),
    ],
)
def test_invalid_options(encoding: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        ppo(encoding, **options)
