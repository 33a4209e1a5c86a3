"""Networks that will be sharded: weights on the first process only, and the same weights as on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_tokenizers import LLAMA3, tokenizer_folder, tokenizer_json
from helpers.small_ppo import ppo
from prove.runs import complete
from transformers import LlamaConfig, LlamaForCausalLM

from rlchat import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlchat.distributed.sharding import has_weights, to_be_sharded, weights_on_first, will_be_sharded
from rlchat.distributed.strategies import FSDP2Strategy
from rlchat.errors import UserError
from rlchat.models.model_file import load_policy, save_bundle

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
NEW: dict[str, Any] = {"tiktoken_encoding": "rlchat_1k", "max_length": 48}
PPO = {"max_new_tokens": 4, "minibatches": 1, "ppo_epochs": 1}
STAGES = {
    "sft": SFTModule,
    "reward": RewardModelModule,
    "dpo": DPOModule,
    "critic": PPOModule,
    "critic_init": PPOModule,
    "lora": PPOModule,
}


def options(folder: Path) -> dict[str, dict[str, Any]]:
    """The arguments of a stage of each name: from a base model, from model files, and from random weights."""
    init = {"init_from": str(folder / "policy.pt")}
    base = {"base_model": str(folder / "base"), "max_length": 48}
    return {
        "sft": {**NEW, **base},
        "reward": {**NEW, "base_model": {"model_type": "llama", **SHAPE}},
        "dpo": init,
        "critic": {**init, **PPO, "critic": "separate"},
        "critic_init": {**init, **PPO, "critic": "separate", "critic_init": str(folder / "reward.pt")},
        "lora": {**base, **PPO, "critic": "separate", "adapter": "lora", "lora_rank": 2, "hidden_dim": 4},
    }


def built(name: str, folder: Path) -> Any:
    torch.manual_seed(3)
    return STAGES[name](**options(folder)[name])


def prepare(folder: Path) -> Path:
    """The files that the stages start from. The base model's output layer is not tied to its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=450, max_position_embeddings=48, tie_word_embeddings=False, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer_folder(folder / "base", tokenizer_json(LLAMA3))
    for stage, name in ((SFTModule(**options(folder)["sft"]), "policy"), (built("reward", folder), "reward")):
        stage.about = lambda: {}  # type: ignore[method-assign]  # otherwise it describes the run
        for parameter in stage.parameters():  # also heads, which are zero before training
            torch.nn.init.normal_(parameter.data, std=0.2)
        save_bundle(folder / f"{name}.pt", stage.bundle())
    return folder


def held(module: torch.nn.Module) -> dict[int, int]:
    """The memory of the unsharded weights of all backbones, adapters apart: address → bytes."""
    found = {}
    for name, weight in module.named_parameters():
        if "backbone." in name and "lora_" not in name and not weight.is_meta and not hasattr(weight, "full_tensor"):
            found[weight.data_ptr()] = weight.numel() * weight.element_size()
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("files"))


# ---- one process -----------------------------------------------------------------------------------------------------


def test_every_process_has_weights_by_default() -> None:
    assert (will_be_sharded(), has_weights()) == (False, True)
    with weights_on_first() as weights:
        assert weights
        assert not torch.nn.Linear(2, 2).weight.is_meta


def test_the_first_process_has_weights() -> None:
    with to_be_sharded(first=True), weights_on_first() as weights:
        assert (will_be_sharded(), has_weights(), weights) == (True, True, True)
        assert not torch.nn.Linear(2, 2).weight.is_meta


def test_another_process_has_buffers_and_no_parameters() -> None:
    with to_be_sharded(first=False), weights_on_first() as weights:
        assert (will_be_sharded(), has_weights(), weights) == (True, False, False)
        network = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False), torch.nn.PReLU())
        network[1].weight = network[0].weight  # tied
        network.register_buffer("table", torch.arange(3))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network[1].weight is network[0].weight
    assert network.get_buffer("table").tolist() == [0, 1, 2]
    assert not torch.nn.Linear(2, 2).weight.is_meta  # outside


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_same_shape_without_weights(name: str, files: Path) -> None:
    whole = built(name, files)
    with to_be_sharded(first=False):
        shape = built(name, files)
    assert held(shape) == {}

    def described(stage: torch.nn.Module) -> list[Any]:
        return [(n, p.shape, p.dtype, p.requires_grad) for n, p in stage.named_parameters()]

    assert described(shape) == described(whole)
    for (one, buffer), (other, expected) in zip(shape.named_buffers(), whole.named_buffers(), strict=True):
        assert one == other
        assert torch.equal(buffer, expected)
    assert shape.max_length == whole.max_length
    assert shape.tokenizer.fingerprint == whole.tokenizer.fingerprint
    assert shape.partly._digest == ""  # it comes from the first process


def test_a_model_file_is_not_read_without_weights(files: Path, tmp_path: Path) -> None:
    """Values that are not finite are found by the first process only."""
    content = torch.load(files / "policy.pt", weights_only=True)
    next(iter(content["state"].values()))[:] = torch.nan
    torch.save(content, tmp_path / "broken.pt")
    with to_be_sharded(first=False), weights_on_first() as weights:
        bundle = load_policy(tmp_path / "broken.pt", weights=weights)
    assert all(parameter.is_meta for parameter in bundle.model.parameters())
    with pytest.raises(UserError, match=r"broken\.pt: weight .* has NaN"):
        load_policy(tmp_path / "broken.pt")


@pytest.mark.parametrize("name", ["critic", "lora"])
def test_the_first_process_holds_one_network(name: str, files: Path) -> None:
    """The reference model and the critic are in the memory of the policy until they are sharded."""
    with to_be_sharded(first=True):
        stage = built(name, files)
    assert isinstance(stage, PPOModule)
    assert held(stage) == held(stage.model)
    assert not any(weight.requires_grad for weight in stage.reference.parameters())
    trained = [weight for weight in stage.model.parameters() if weight.requires_grad]
    assert trained
    alone = built(name, files)
    copies = 3 if name == "critic" else 1  # weights that an adapter freezes are always shared
    assert sum(held(alone).values()) == pytest.approx(copies * sum(held(stage).values()), rel=0.2)


def test_a_stage_that_is_not_sharded_cannot_be_used() -> None:
    with to_be_sharded(first=True):
        stage = ppo("rlchat_1k")
    with pytest.raises(UserError, match="with the strategy fsdp2, and is used with another"):
        stage.configure_model()
    with pytest.raises(UserError, match="pass ckpt_path to the trainer"):
        stage.load_state_dict(stage.state_dict())
    whole = ppo("rlchat_1k")
    whole.configure_model()
    whole.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(("empty_init", "expected"), [(None, True), (True, True), (False, False)])
def test_the_strategy_decides_in_init_module(empty_init: bool | None, expected: bool) -> None:
    strategy = FSDP2Strategy()
    with strategy.tensor_init_context(empty_init):
        assert (will_be_sharded(), has_weights()) == (expected, True)
        assert not torch.empty(1).is_meta
    assert not will_be_sharded()


# ---- two processes ---------------------------------------------------------------------------------------------------

# Builds each stage in `trainer.init_module()` and starts to train it. Each process writes the bytes of weights that it
# held when the stage was built, and those of the sharded stage; the first one also writes all weights.
SCRIPT = """
import json, sys, warnings
from pathlib import Path

import lightning as L
import torch

from distributed.test_sharding import STAGES, built, held
from rlchat.distributed.collectives import is_sharded, whole_state
from rlchat.distributed.strategies import FSDP2Strategy
from rlchat.models.backbones import Backbone

here = Path.cwd()


class Stop(Exception):
    pass


class Watch(L.Callback):
    def __init__(self, name):
        self.name = name

    def setup(self, trainer, module, stage):
        self.before = sum(held(module).values())

    def on_fit_start(self, trainer, module):
        assert all(is_sharded(network) for network in module.children() if list(network.parameters()))
        state = whole_state(module)
        if trainer.is_global_zero:
            torch.save(state, here / f"{self.name}.state.pt")
        found = {
            "before": self.before,
            "after": sum(held(module).values()),
            "frozen": module.partly._digest,
            "packs": [part._packs for part in module.modules() if isinstance(part, Backbone)],
            "tables": {name: float(table.double().sum()) for name, table in module.named_buffers()},
        }
        (here / f"{self.name}.{trainer.global_rank}.json").write_text(json.dumps(found))
        raise Stop


for name in STAGES:
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=FSDP2Strategy(), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch(name)],
    )
    with trainer.init_module():
        module = built(name, here)
    try:
        trainer.fit(module, torch.utils.data.DataLoader([0]))
    except Stop:
        pass
"""


@pytest.fixture(scope="module")
def sharded(files: Path) -> Path:
    """The folder ``files``, in which two processes have built and sharded every stage."""
    (files / "build.py").write_text(SCRIPT)
    complete(files, [], module="build")
    return files


@pytest.mark.parametrize("name", STAGES)
def test_only_the_first_of_two_processes_holds_whole_weights(name: str, sharded: Path) -> None:
    first, second = (json.loads((sharded / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
    assert second["before"] == second["after"] == first["after"] == 0
    alone = built(name, sharded)
    whole_networks = [alone.model, alone.critic] if name == "critic_init" else [alone.model]
    assert first["before"] == sum(sum(held(network).values()) for network in whole_networks)


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_start_from_the_weights_of_one(name: str, sharded: Path) -> None:
    """Bit for bit, also random ones. What the first process has measured holds for all."""
    expected = built(name, sharded)
    found = torch.load(sharded / f"{name}.state.pt", weights_only=True)
    assert found.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found[key], value), key
    first, second = (json.loads((sharded / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
    for key in ("frozen", "packs", "tables"):
        assert first[key] == second[key]
    assert (first["frozen"] != "") == (name in ("lora", "dpo"))
    assert first["frozen"] == expected.partly._digest
