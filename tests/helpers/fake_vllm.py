"""A stand-in for vLLM with the calls that rlchat makes, and a model of transformers behind it.

Signatures are those of vLLM 0.29 to 0.32, reduced to what rlchat passes: another argument fails. What vLLM only logs or
gets wrong silently, such as a use of memory that sleeps, fails here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    stop_token_ids: list[int]
    logit_bias: dict[int, float]
    seed: int
    logprobs: int
    detokenize: bool

    def __post_init__(self) -> None:
        assert self.logprobs == 0
        assert not self.detokenize
        assert len(self.logit_bias) <= 1024
        assert (self.top_k, self.top_p) == (0, 1.0)


@dataclass
class LLM:
    model: str
    skip_tokenizer_init: bool
    generation_config: str
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    enable_sleep_mode: bool
    logprobs_mode: str
    asleep: set[str] = field(default_factory=set)
    versions: list[dict[str, Tensor]] = field(default_factory=list)
    """The weights after each call of reload_weights, by their names in the folder."""
    requests: list[list[tuple[list[int], SamplingParams]]] = field(default_factory=list)
    """The prompts and options of each call of generate."""
    cached: bool = False

    def __post_init__(self) -> None:
        _check_context()
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert self.enable_sleep_mode
        assert self.logprobs_mode == "processed_logprobs"
        self.network = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).eval()
        assert self.max_model_len <= self.network.config.max_position_embeddings
        torch.manual_seed(0)  # as vLLM does
        INSTANCES.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Iterable[tuple[str, Tensor]]]) -> None:
        _check_context()
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        state = self.network.state_dict()
        loaded = {}
        for name, value in kwargs["weights_iterator"]:
            assert state[name].shape == value.shape
            state[name].copy_(value)
            loaded[name] = value.clone()
        self.versions.append(loaded)

    def reset_prefix_cache(self) -> bool:
        self.cached = False
        return True

    def sleep(self, level: int) -> None:
        assert level == 1
        assert not self.asleep
        self.asleep = {"weights", "kv_cache"}
        self.cached = False

    def wake_up(self, tags: list[str]) -> bool:
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)
        return not self.asleep

    def generate(
        self, prompts: Sequence[TokensPrompt], sampling_params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[Any]:
        _check_context()
        assert not self.asleep
        assert not self.cached, "the prefix cache is that of other weights"
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        self.requests.append(list(zip(rows, sampling_params, strict=True)))
        return [SimpleNamespace(outputs=[self._respond(ids, params)]) for ids, params in self.requests[-1]]

    def _respond(self, prompt: list[int], params: SamplingParams) -> Any:
        generator = torch.Generator().manual_seed(params.seed)
        ids, steps = list(prompt), []
        while len(steps) < params.max_tokens:
            logits = self.network(torch.tensor([ids])).logits[0, -1].float()
            for token, bias in params.logit_bias.items():
                logits[token] += bias
            logprobs = (logits / (params.temperature or 1e-6)).log_softmax(0)
            token = int(logprobs.exp().multinomial(1, generator=generator))
            ids.append(token)
            steps.append({token: SimpleNamespace(logprob=float(logprobs[token]))})
            if token in params.stop_token_ids:
                break
        return SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=steps)


INSTANCES: list[LLM] = []


def _check_context() -> None:
    """The precision of the training does not reach vLLM, which runs in the same process."""
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_grad_enabled()


def install(patch: pytest.MonkeyPatch, architectures: Iterable[str] = ("LlamaForCausalLM", "GPT2LMHeadModel")) -> None:
    """Makes ``import vllm`` import this stand-in, whose instances are appended to the now empty ``INSTANCES``."""
    module = ModuleType("vllm")
    registry = SimpleNamespace(get_supported_archs=lambda: set(architectures))
    names = {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": TokensPrompt, "ModelRegistry": registry}
    module.__dict__.update(names, __version__="0.0")
    patch.setitem(sys.modules, "vllm", module)
    INSTANCES.clear()
