"""What only a GPU can show. Skipped without one; `make test` on a machine with a GPU runs these tests."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.small_ppo import BACKBONES, ppo, prompts
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.distributed.sharding import to_be_sharded
from rlchat.distributed.strategies import FSDP2Strategy
from rlchat.models.backbones import Backbone
from rlchat.models.decoding import FixedDecoder, can_decode_fixed
from rlchat.models.networks import RLChatModel
from rlchat.models.sampling import Generated, Sampling, addressed_uniforms, generate, inverse_cdf, sample
from rlchat.ppo.module import PPOModule
from rlchat.training.optimizers import OptimizerName
from rlchat.utils.padding import pad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")

VOCABULARY, PAD, END = 24, 23, 22
ENDS: dict[str, Any] = {"end_id": END, "pad_id": PAD}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 0], [11, 12, 13, 14]]


def policy(family: str) -> RLChatModel:
    torch.manual_seed(0)
    config = {"model_type": family, **BACKBONES[family], "initializer_range": 0.3}
    return RLChatModel(Backbone(config, VOCABULARY, 40), unsayable=[PAD]).eval()


def generated(model: RLChatModel) -> Generated:
    ids, mask = (x.to(model.backbone.device) for x in pad(PROMPTS, PAD, "left"))
    noise = addressed_uniforms(3, 0, torch.arange(len(PROMPTS)))
    return generate(model, ids, mask, Sampling(20, temperature=1.0), noise, **ENDS)


@pytest.mark.parametrize("family", BACKBONES)
def test_a_gpu_samples_the_tokens_that_a_cpu_samples(family: str) -> None:
    expected = generated(policy(family))
    found = generated(policy(family).cuda())
    assert torch.equal(found.ids.cpu(), expected.ids)
    assert torch.equal(found.mask.cpu(), expected.mask)
    assert torch.equal(found.ended.cpu(), expected.ended)
    torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_decodes_and_follows_the_weights(family: str, autocast: bool) -> None:
    model = policy(family).cuda()
    assert can_decode_fixed(model)
    ids, mask = (x.cuda() for x in pad(PROMPTS, PAD, "left"))
    noise = addressed_uniforms(3, 0, torch.arange(len(PROMPTS)))
    sampling = Sampling(20, temperature=1.0)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            decoder = FixedDecoder(model, ids.shape[1] + 20)
            with_graph = list(sample(model, ids, mask, sampling, noise, **ENDS, decode=decoder))
            plain = list(sample(model, ids, mask, sampling, noise, **ENDS))
            cast_once = generate(model, ids, mask, sampling, noise, **ENDS)
        assert decoder._graph is not None
        for one, other in zip(with_graph, plain, strict=False):
            assert torch.equal(one.tokens, other.tokens)
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=5e-2 if autocast else 1e-5, rtol=0)
        width = min(len(plain), cast_once.ids.shape[1])
        assert torch.equal(cast_once.ids[:, :width], torch.stack([s.tokens for s in plain[:width]], 1))
        with torch.no_grad():  # as an optimizer does, in place
            for weight in model.parameters():
                weight.mul_(1.1)


def test_a_token_without_probability_is_never_drawn_from_a_parallel_sum() -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(4096, 5000, device="cuda") * (torch.rand(4096, 5000, device="cuda") < 0.01)
    probabilities /= probabilities.sum(-1, keepdim=True)
    for uniform in (torch.rand(4096, device="cuda"), torch.full((4096,), 1 - 2**-24, device="cuda")):
        tokens = inverse_cdf(probabilities, uniform)
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("lower", [False, True])
def test_token_stats_and_their_gradient(lower: bool) -> None:
    torch.manual_seed(0)
    model = policy("llama")
    hidden, targets = torch.randn(300, model.backbone.hidden_size), torch.randint(0, PAD, (300,))
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        h = hidden.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=lower and device == "cuda"):
            stats = model.token_stats(h, targets.to(device))
            (stats.logprobs.sum() + stats.entropy.sum()).backward()
        assert h.grad is not None
        assert model.backbone.head_weight.grad is not None
        found.append(
            [x.cpu() for x in (stats.logprobs, stats.entropy, h.grad, model.backbone.head_weight.grad.clone())]
        )
    for one, other in zip(*found, strict=True):
        scale = float(one.detach().abs().max())
        torch.testing.assert_close(one, other, atol=(3e-3 if lower else 2e-5) * scale, rtol=0)
    assert torch.get_float32_matmul_precision() == "highest"


class Residuals(L.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module: PPOModule, batches: int = 3, **options: Any) -> list[dict[str, float]]:
    seen = Residuals()
    data = DataLoader([prompts(module.tokenizer)] * batches, batch_size=None)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=[seen],
        **options,
    )
    trainer.fit(module, data)
    return seen.metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo_in_every_precision(encoding: str, precision: Any, critic: str) -> None:
    metrics = fit(ppo(encoding, critic=critic, learning_rate=1e-3), precision=precision)
    assert len(metrics) == 3
    for row in metrics:
        assert row["train/ratio_residual"] <= 1e-6  # the first ratio is 1, up to the sums of other batch sizes
        assert row["train/skipped_steps"] == 0
        assert row["train/entropy"] > 0
    assert metrics[-1]["train/kl"] != 0


def test_deterministic_runs_are_equal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        weights = []
        for _ in range(2):
            module = ppo(encoding, critic="separate", family="qwen3")
            fit(module, precision="bf16-mixed", deterministic=True)
            weights.append([x.detach().cpu() for x in module.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("strategy", ["ddp", FSDP2Strategy], ids=["ddp", "fsdp2"])
def test_one_process_over_nccl(encoding: str, strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    alone = fit(ppo(encoding), batches=2)
    found = fit(ppo(encoding), batches=2, strategy=strategy if strategy == "ddp" else strategy())
    for name in ("train/reward", "train/policy_loss", "train/entropy"):
        assert found[-1][name] == pytest.approx(alone[-1][name], abs=1e-4)


def test_networks_are_sharded_from_whole_weights_over_nccl(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage that is built to be sharded: the reference model and the critic share the policy's memory before."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    alone = fit(ppo(encoding, critic="separate"))
    with to_be_sharded(first=True):
        module = ppo(encoding, critic="separate")
    found = fit(module, strategy=FSDP2Strategy())
    for name in ("train/reward", "train/policy_loss", "train/value_loss", "train/kl"):
        assert found[-1][name] == pytest.approx(alone[-1][name], abs=1e-4)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_vllm_samples_from_the_present_weights(
    encoding: str, monkeypatch: pytest.MonkeyPatch, adapter: str | None
) -> None:
    """vLLM's log-probs are those of the policy after each update, and its memory is free between rollouts."""
    pytest.importorskip("vllm")
    wide = {**BACKBONES["llama"], "hidden_size": 128, "initializer_range": 0.1}  # vLLM has no heads of 8 units
    monkeypatch.setitem(BACKBONES, "llama", wide)
    module = ppo(encoding, rollout_engine="vllm", vllm_memory=0.1, adapter=adapter)
    for row in fit(module, batches=3):
        assert row["train/ratio_residual"] <= 1e-4
        assert row["train/sampling_residual"] <= 1e-2
    assert module.rollout_engine._asleep == {"weights", "kv_cache"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_steps_as_adamw_and_resumes(encoding: str, tmp_path: Path, name: OptimizerName) -> None:
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"ppo_epochs": 1, "minibatches": 1, "learning_rate": 1e-3}
    start, plain, module = ppo(encoding, **options), ppo(encoding, **options), ppo(encoding, optimizer=name, **options)
    steps = []
    for moved in (plain, module):
        fit(moved, batches=1)
        pairs = zip(moved.parameters(), start.parameters(), strict=True)
        steps.append(torch.cat([(after.cpu() - before).flatten() for after, before in pairs]))
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.98
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8, torch.float32}
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = [(state["state1"].cpu(), state["step"]) for state in optimizer.state.values()]
    resumed = ppo(encoding, optimizer=name, **options)
    trainer = L.Trainer(accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(resumed, DataLoader([prompts(module.tokenizer)], batch_size=None), ckpt_path=tmp_path / "run.ckpt")
    loaded = [(state["state1"].cpu(), state["step"]) for state in trainer.optimizers[0].state.values()]
    assert len(loaded) == len(saved) > 0
    assert all(torch.equal(one[0], other[0]) and one[1] == other[1] for one, other in zip(loaded, saved, strict=True))
