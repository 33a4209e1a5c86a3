"""Rollout engines: what samples the responses of PPO. The policy computes their log-probs again, whatever the engine.

rlchat's own engine needs nothing else. :mod:`rlchat.ppo.engines.vllm` samples with vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from rlchat.models.sampling import Generated, Sampling, Uniforms

if TYPE_CHECKING:
    from rlchat.ppo.rollouts import RolloutModule

EngineName = Literal["rlchat", "vllm"]


class RolloutEngine(Protocol):
    """Samples responses from the policy of a module."""

    def synchronize(self, module: RolloutModule) -> None:
        """From now on, responses are sampled from the present weights of ``module.model``."""

    def generate(
        self, module: RolloutModule, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms
    ) -> Generated:
        """Responses to left-padded prompts ``ids`` Long [B, P], with ``attention_mask`` Bool [B, P].

        ``uniforms`` are the only source of randomness, as in :func:`rlchat.models.sampling.sample`.
        """


class OwnEngine:
    """:func:`rlchat.models.sampling.generate` with the policy itself, whose weights need no synchronization."""

    def synchronize(self, module: RolloutModule) -> None:
        """Does nothing."""

    def generate(
        self, module: RolloutModule, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms
    ) -> Generated:
        """As in :meth:`RolloutEngine.generate`."""
        return module.generate(ids, attention_mask, sampling, uniforms)


def make_engine(name: EngineName, vllm_memory: float) -> RolloutEngine:
    """The engine ``name``; ``vllm_memory`` is the share of the GPU's memory that vLLM may use.

    Raises:
        UserError: for vllm, if it is not installed.
    """
    if name == "rlchat":
        return OwnEngine()
    from rlchat.ppo.engines.vllm import VLLMEngine

    return VLLMEngine(vllm_memory)
