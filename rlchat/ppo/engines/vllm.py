"""Rollouts with vLLM, in the process and on the GPU of the training.

At the first rollout, the policy is exported to a temporary folder that vLLM loads. Before every rollout, vLLM gets the
present weights under the names of that folder, with adapters merged. Between rollouts it sleeps: its weights are in the
memory of the CPU, and its cache is given up, so that the update has the memory of the GPU.

This code uses vLLM's documented interface alone: ``LLM`` with its methods ``generate``, ``collective_rpc``,
``reset_prefix_cache``, ``sleep`` and ``wake_up``, ``SamplingParams``, ``TokensPrompt`` and ``ModelRegistry``.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from rlchat.errors import NonFiniteError, UserError
from rlchat.export.weights import causal_lm, save_model, saved_names
from rlchat.models.adapters import merged_weights
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import NOT_FINITE, Generated, Sampling, Uniforms
from rlchat.utils.imports import install_command
from rlchat.utils.padding import pad

if TYPE_CHECKING:
    from rlchat.ppo.rollouts import RolloutModule

_MOST_BIASES = 1024  # logit biases of a request in vLLM
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}  # by the first part of Lightning's precision; others: float32


class VLLMEngine:
    """Samples with vLLM.

    Args:
        memory: the share of the GPU's memory that vLLM may use for weights and cache during a rollout.

    Raises:
        UserError: if vLLM is not installed.
    """

    def __init__(self, memory: float) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            command = install_command("vllm")
            raise UserError(f"--model.rollout_engine vllm requires vLLM: install it with {command}") from error
        self._memory = memory
        self._llm: Any = None  # vllm.LLM, from the first rollout
        self._names: dict[str, str] = {}  # of the weights in vLLM, by their names in the backbone
        self._asleep: set[str] = set()  # the parts of vLLM's memory that are given up now

    @torch.no_grad()
    def synchronize(self, module: RolloutModule) -> None:
        """Loads the present weights of ``module.model``; the first call starts vLLM.

        Raises:
            UserError: if vLLM cannot sample from this model, or not on this machine.
        """
        with _apart(module.device):
            if self._llm is None:
                self._start(module)
            self._wake("weights")
            weights = merged_weights(module.model.backbone)
            named = ((self._names[name], value) for name, value in weights if name in self._names)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            self._llm.reset_prefix_cache()  # its keys and values are those of the previous weights

    @torch.no_grad()
    def generate(
        self, module: RolloutModule, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms
    ) -> Generated:
        """As in :meth:`rlchat.ppo.engines.RolloutEngine.generate`, after :meth:`synchronize`.

        Each row has its own seed, made of its first two uniform numbers. Log-probs are those that vLLM sampled with.

        Raises:
            NonFiniteError: if a log-prob is NaN or infinite.
        """
        from vllm import TokensPrompt

        prompts = [
            TokensPrompt(prompt_token_ids=row[mask].tolist())
            for row, mask in zip(ids.cpu(), attention_mask.cpu(), strict=True)
        ]
        requests = _requests(module, sampling, row_seeds(uniforms))
        with _apart(module.device):
            self._wake("weights", "kv_cache")
            outputs = self._llm.generate(prompts, requests, use_tqdm=False)
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}
        return _collected([output.outputs[0] for output in outputs], module, ids.device)

    def _start(self, module: RolloutModule) -> None:
        import vllm

        _check_place(module)
        dtype = _DTYPES.get(str(module.trainer.precision).partition("-")[0], torch.float32)
        with _naming_the_engine():  # the reference model has the shape of the policy, and no adapter
            model = causal_lm(PolicyBundle(module.reference, module.tokenizer, module.max_length))
        architecture = type(model).__name__
        if architecture not in vllm.ModelRegistry.get_supported_archs():
            raise UserError(
                f"vLLM {vllm.__version__} does not have the architecture {architecture}; set --model.rollout_engine "
                f"rlchat, or choose another base model"
            )
        with tempfile.TemporaryDirectory(prefix="rlchat-vllm-") as folder, _in_this_process():
            save_model(model, Path(folder), dtype)
            with _naming_the_engine():
                self._names = saved_names(module.reference.backbone, model, Path(folder))
            del model
            self._llm = vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                generation_config="vllm",  # no options of sampling from the folder
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=module.max_length,
                gpu_memory_utilization=self._memory,
                enable_sleep_mode=True,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            )

    def _wake(self, *parts: str) -> None:
        if asleep := [part for part in parts if part in self._asleep]:
            torch.cuda.empty_cache()  # vLLM's memory does not come from PyTorch's cache
            self._llm.wake_up(tags=asleep)
            self._asleep -= set(asleep)


def row_seeds(uniforms: Uniforms) -> list[int]:
    """A seed of 48 bits for each row, from the 24 bits of each of its first two uniform numbers."""
    first, second = (uniforms(position).double() for position in (0, 1))
    return [int(seed) for seed in (first * 2.0**48 + second * 2.0**24).tolist()]


def _requests(module: RolloutModule, sampling: Sampling, seeds: Sequence[int]) -> list[Any]:
    """vLLM's options for each row. The bias -∞ gives unsayable ids the probability 0.

    The documented ``allowed_token_ids`` is not used: vLLM limits its length to less than most vocabularies.
    """
    from vllm import SamplingParams

    unsayable = module.model.unsayable.nonzero().flatten().tolist()
    end_id = module.tokenizer.end_id
    return [
        SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=[end_id],
            logit_bias=dict.fromkeys(unsayable, -math.inf),
            seed=seed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        for seed in seeds
    ]


def _collected(completions: Sequence[Any], module: RolloutModule, device: torch.device) -> Generated:
    """The responses of vLLM as tensors on ``device``."""
    tokens = [list(completion.token_ids) for completion in completions]
    logprobs = [
        [step[token].logprob for token, step in zip(row, completion.logprobs, strict=True)]
        for row, completion in zip(tokens, completions, strict=True)
    ]
    if not all(map(math.isfinite, (value for row in logprobs for value in row))):
        raise NonFiniteError(NOT_FINITE)
    ids, mask = pad(tokens, module.tokenizer.pad_id, "right")
    values = torch.zeros(ids.shape, dtype=torch.float32)
    values[mask] = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32)
    ended = (ids == module.tokenizer.end_id).any(1)
    return Generated(ids.to(device), mask.to(device), ended.to(device), values.to(device))


def _check_place(module: RolloutModule) -> None:
    """Raises :class:`UserError` unless vLLM can sample from the model of ``module`` in this process."""
    device, backbone = module.device, module.model.backbone
    otherwise = "or set --model.rollout_engine rlchat"
    if module.trainer.world_size > 1:
        raise UserError(f"rollout_engine vllm does not support several processes; set --trainer.devices 1, {otherwise}")
    if device.type != "cuda":
        raise UserError(f"rollout_engine vllm requires a CUDA GPU; use a machine with one, {otherwise}")
    if device.index:
        raise UserError(
            f"vLLM uses the first GPU, and this run {device}; set CUDA_VISIBLE_DEVICES to one GPU, {otherwise}"
        )
    if backbone.is_encoder:
        family = backbone.transformer.config.model_type
        raise UserError(
            f"vLLM cannot run {family}, an encoder, with causal attention; use a decoder such as llama, {otherwise}"
        )
    if (count := int(module.model.unsayable.sum())) > _MOST_BIASES:
        raise UserError(
            f"vLLM cannot exclude the {count} ids of this vocabulary that a response may not contain: its limit is "
            f"{_MOST_BIASES}; use another encoding, {otherwise}"
        )


@contextmanager
def _naming_the_engine() -> Iterator[None]:
    """Errors of the export say what needs it."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"rollout_engine vllm needs an export of the model; set --model.rollout_engine rlchat, or choose another "
            f"base model: {error}"
        ) from error


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """A context for calls of vLLM that keeps the training's precision away from it, and it from the random numbers."""
    default = torch.get_default_dtype()
    with isolate_rng(), torch.autocast(device.type, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """vLLM starts in this process, where weights need no copies between processes; documented by vLLM."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
