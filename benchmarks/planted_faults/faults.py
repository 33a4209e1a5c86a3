"""The faults: what each does, where it was reported, and how it is planted in rlchat's code at run time.

A fault is a context manager that takes the module of a run. Inside, rlchat's functions are replaced by faulty ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rlchat.models.sampling
import rlchat.ppo.advantages
import rlchat.ppo.module
import rlchat.ppo.rollouts
from rlchat.models.networks import RLChatModel
from rlchat.models.sampling import Drawn, Generated, Sampling
from rlchat.ppo.dialogues import NOT_SAMPLED, Dialogue, Transcript
from rlchat.ppo.losses import AdaptiveKL, PolicyLoss, masked_mean
from rlchat.ppo.module import PPOModule
from rlchat.ppo.rollouts import Rollout, TokenEvaluation

Plant = Callable[[PPOModule], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A fault of RLHF code."""

    name: str
    what: str
    """One sentence."""
    source: str
    """The address of a public report of this fault, or of one like it."""
    plant: Plant
    options: dict[str, Any] = field(default_factory=dict)
    """The options of PPOModule in which its run differs from the others."""


FAULTS: dict[str, Fault] = {}
"""All faults, by name."""

GITHUB = "https://github.com/"


def fault(what: str, source: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function, whose name is that of the fault. A generator becomes a context manager."""

    def register(plant: Callable[..., Any]) -> Callable[..., Any]:
        name = plant.__name__.replace("_", " ")
        as_context = contextmanager(plant) if inspect.isgeneratorfunction(plant) else plant
        FAULTS[name] = Fault(name, what, source, as_context, options)
        return plant

    return register


@contextmanager
def replaced(owner: Any, name: str, faulty: Callable[..., Any]) -> Iterator[None]:
    """In the context, the function ``name`` of ``owner`` is ``faulty``, called with the original as first argument."""
    original = getattr(owner, name)
    with patch.object(owner, name, lambda *args, **options: faulty(original, *args, **options)):
        yield


# ---- tokens and masks ------------------------------------------------------------------------------------------------


@fault("The end token is cut off the response.", GITHUB + "karpathy/nanochat/issues/810")
def end_token_off_by_one(module: PPOModule) -> Any:
    def add(original: Any, self: Dialogue, reply: Any, number: int, ids: Any, logprobs: Any) -> None:
        keep = len(ids) - (reply.ended and len(ids) > 1)
        original(self, reply, number, ids[:keep], logprobs[:keep])

    return replaced(Dialogue, "add_response", add)


@fault("The end token is masked, because it is also the padding.", GITHUB + "huggingface/trl/pull/5303")
def end_token_as_padding(module: PPOModule) -> Any:
    def transcript(original: Any, *args: Any) -> Transcript:
        found: Transcript = original(*args)
        first = torch.nn.functional.pad(found.response_at[:, :-1], (1, 0), value=NOT_SAMPLED) < 0
        masked = (found.ids == module.tokenizer.end_id) & ~first  # a response keeps at least one token
        return replace(found, response_at=found.response_at.masked_fill(masked, NOT_SAMPLED))

    return replaced(rlchat.ppo.rollouts, "to_transcript", transcript)


@fault("The mask of the response starts at the last token of the prompt.", GITHUB + "jingyaogong/minimind/issues/533")
def mask_includes_prompt(module: PPOModule) -> Any:
    def transcript(original: Any, *args: Any) -> Transcript:
        found: Transcript = original(*args)
        following = torch.nn.functional.pad(found.response_at[:, 1:], (0, 1), value=NOT_SAMPLED)
        return replace(found, response_at=torch.where(found.response_at < 0, following, found.response_at))

    return replaced(rlchat.ppo.rollouts, "to_transcript", transcript)


@fault("Long prompts are cut at their end.", GITHUB + "verl-project/verl/pull/6313")
def prompts_cut_at_the_end(module: PPOModule) -> Any:
    def start(original: Any, batch: Any) -> list[Dialogue]:
        dialogues: list[Dialogue] = original(batch)
        for dialogue in dialogues:
            dialogue.ids = dialogue.ids[:16]
            dialogue.response_at, dialogue.logprobs = dialogue.response_at[:16], dialogue.logprobs[:16]
        return dialogues

    return replaced(rlchat.ppo.rollouts, "start_dialogues", start)


# ---- log-probs -------------------------------------------------------------------------------------------------------


@fault("Positions count the padding on the left.", GITHUB + "CarperAI/trlx/pull/509")
def left_padded_positions(module: PPOModule) -> Any:
    transformer = module.model.backbone.transformer

    def forward(original: Any, ids: Tensor, **options: Any) -> Any:
        if options.get("position_ids") is not None:
            end = options["attention_mask"].shape[1]
            options["position_ids"] = torch.arange(end - ids.shape[1], end).expand_as(ids)
        return original(ids, **options)

    return replaced(transformer, "forward", forward)


@fault("Dropout is on while old log-probs are computed.", GITHUB + "huggingface/trl/issues/4")
def dropout_in_old_logprobs(module: PPOModule) -> Any:
    return _dropout_while_evaluating(module.model)


@fault("Dropout is on in the reference model.", GITHUB + "huggingface/trl/issues/744")
def dropout_in_reference(module: PPOModule) -> Any:
    return _dropout_while_evaluating(module.reference)


def _dropout_while_evaluating(network: RLChatModel) -> AbstractContextManager[None]:
    def evaluate(original: Any, self: PPOModule, model: RLChatModel, *args: Any, **options: Any) -> TokenEvaluation:
        model.train(model is network)
        found: TokenEvaluation = original(self, model, *args, **options)
        model.eval()
        return found

    return replaced(PPOModule, "evaluate_in_parts", evaluate)


@fault(
    "Log-probs are computed without the temperature of sampling.",
    GITHUB + "huggingface/trl/pull/3029",
    temperature=0.7,
)
def temperature_left_out(module: PPOModule) -> Any:
    return replaced(
        RLChatModel, "token_stats", lambda original, self, hidden, targets, _=1.0: original(self, hidden, targets)
    )


@fault("Log-probs are those of the token after next.", GITHUB + "lucidrains/PaLM-rlhf-pytorch/issues/31")
def logits_not_shifted(module: PPOModule) -> Any:
    def evaluate(original: Any, self: PPOModule, model: RLChatModel, *args: Any, **options: Any) -> TokenEvaluation:
        with replaced(model, "forward", lambda forward, *inputs: forward(*inputs).roll(-1, 1)):
            found: TokenEvaluation = original(self, model, *args, **options)
        return found

    return replaced(PPOModule, "evaluate_tokens", evaluate)


@fault(
    "Old log-probs are computed again in each step, so the ratio is 1.", GITHUB + "tensorforce/tensorforce/issues/312"
)
def old_logprobs_recomputed(module: PPOModule) -> Any:
    def loss(original: Any, logprobs: Tensor, old: Tensor, *args: Any, **options: Any) -> PolicyLoss:
        found: PolicyLoss = original(logprobs, logprobs.detach(), *args, **options)
        return found

    return replaced(rlchat.ppo.module, "policy_loss", loss)


# ---- sampling --------------------------------------------------------------------------------------------------------


@fault("Responses are sampled with top-k.", GITHUB + "huggingface/trl/issues/235")
def top_k_while_sampling(module: PPOModule) -> Iterator[None]:
    module.sampling = replace(module.sampling, top_k=10)
    yield


@fault(
    "Responses are sampled with top-k, and the sampler reports the log-probs without it.",
    GITHUB + "thinking-machines-lab/tinker-feedback/issues/148",
)
def top_k_with_raw_logprobs(module: PPOModule) -> Any:
    def draw(original: Any, logits: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
        drawn: Drawn = original(logits, replace(sampling, top_k=10), uniform)
        logprobs = (logits / sampling.temperature).log_softmax(-1).gather(-1, drawn.tokens[:, None]).squeeze(-1)
        return drawn._replace(logprobs=logprobs)

    return replaced(rlchat.models.sampling, "choose", draw)


@fault("Each iteration samples with the same random numbers.", GITHUB + "vllm-project/vllm/issues/11953")
def sampling_seed_repeated(module: PPOModule) -> Any:
    def uniforms(original: Any, seed: int, stream: int, *args: Any) -> Any:
        return original(seed, 0, *args)

    return replaced(rlchat.ppo.rollouts, "addressed_uniforms", uniforms)


@fault(
    "All responses to a prompt get the same random numbers.",
    GITHUB + "vllm-project/vllm/issues/7808",
    advantage="rloo",
    group_size=2,
)
def sampling_seed_shared_in_a_group(module: PPOModule) -> Any:
    def uniforms(original: Any, seed: int, stream: int, rows: Tensor, *args: Any) -> Any:
        return original(seed, stream, rows // module.options.group_size, *args)

    return replaced(rlchat.ppo.rollouts, "addressed_uniforms", uniforms)


@fault("The sampler keeps the initial weights.", GITHUB + "huggingface/trl/issues/5312")
def sampler_with_stale_weights(module: PPOModule) -> Any:
    initial = copy.deepcopy(module.model).eval()

    def generate(original: Any, self: PPOModule, *args: Any) -> Generated:
        current, self.model = self.model, initial
        try:
            found: Generated = original(self, *args)
        finally:
            self.model = current
        return found

    return replaced(PPOModule, "generate", generate)


# ---- the reference model ---------------------------------------------------------------------------------------------


@fault("The reference model is the policy itself.", GITHUB + "huggingface/trl/issues/2046")
def reference_is_the_policy(module: PPOModule) -> Iterator[None]:
    module.reference = module.model
    yield


@fault("The reference model shares the policy's embedding.", GITHUB + "huggingface/trl/issues/2046")
def reference_shares_the_embedding(module: PPOModule) -> Iterator[None]:
    module.reference.backbone.transformer.wte = module.model.backbone.transformer.wte
    yield


@fault("The reference model follows the policy slowly.", GITHUB + "irom-princeton/dppo/issues/47")
def reference_drifts(module: PPOModule) -> Any:
    def step(original: Any, self: PPOModule, *args: Any) -> None:
        original(self, *args)
        with torch.no_grad():
            for reference, policy in zip(self.reference.parameters(), self.model.parameters(), strict=True):
                reference.lerp_(policy, 0.01)

    return replaced(PPOModule, "training_step", step)


# ---- rewards and advantages ------------------------------------------------------------------------------------------


@fault("The score is placed after the last token.", GITHUB + "huggingface/trl/issues/1893")
def score_after_the_last_token(module: PPOModule) -> Any:
    def place(original: Any, scores: Tensor, index: Tensor) -> Tensor:
        placed: Tensor = original(scores, index)
        last = placed.shape[1] - 1
        moved = torch.nn.functional.pad(placed[:, :-1], (1, 0))
        moved[:, last] += placed[:, last]  # a response without padding keeps its score
        return moved

    return replaced(rlchat.ppo.module, "place_scores", place)


@fault("The KL penalty in the reward has the wrong sign.", GITHUB + "Unakar/Logic-RL/issues/58")
def kl_sign_in_the_reward(module: PPOModule) -> Any:
    def shape(original: Any, scores: Tensor, old: Tensor, ref: Tensor, mask: Tensor, coef: float, kind: Any) -> Tensor:
        shaped: Tensor = original(scores, old, ref, mask, -coef, kind)
        return shaped

    return replaced(rlchat.ppo.module, "shape_rewards", shape)


@fault(
    "The KL penalty in the loss has the wrong sign.",
    GITHUB + "qiancheng0/ToolRL/issues/52",
    kl_in="loss",
)
def kl_sign_in_the_loss(module: PPOModule) -> Any:
    return replaced(rlchat.ppo.module, "kl_estimate", lambda original, *args: -original(*args))


@fault("The score is divided by the length of the response.", GITHUB + "sail-sg/understand-r1-zero/issues/10")
def reward_scaled_by_length(module: PPOModule) -> Any:
    def place(original: Any, scores: Tensor, index: Tensor) -> Tensor:
        lengths = index[index >= 0].bincount(minlength=len(scores))
        placed: Tensor = original(scores / lengths, index)
        return placed

    return replaced(rlchat.ppo.module, "place_scores", place)


@fault("The sign of the score is flipped on its way to the advantages.", GITHUB + "huggingface/trl/pull/2777")
def reward_sign_flipped(module: PPOModule) -> Any:
    return replaced(rlchat.ppo.module, "place_scores", lambda original, scores, index: original(-scores, index))


@fault(
    "The scores of the responses to a prompt are exchanged.",
    GITHUB + "huggingface/trl/pull/6673",
    advantage="rloo",
    group_size=2,
)
def scores_exchanged_in_a_group(module: PPOModule) -> Any:
    def place(original: Any, scores: Tensor, index: Tensor) -> Tensor:
        placed: Tensor = original(scores.view(-1, 2).flip(1).flatten(), index)
        return placed

    return replaced(rlchat.ppo.module, "place_scores", place)


@fault("The reward is given the response of another prompt.", GITHUB + "huggingface/trl/pull/6673")
def reward_of_another_response(module: PPOModule) -> Any:
    def score(original: Any, self: PPOModule, prompts: Any, replies: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = original(self, prompts, [*replies[1:], replies[0]])
        return found

    return replaced(PPOModule, "score_responses", score)


@fault("GAE continues with the value after the end of a response.", GITHUB + "alibaba/ROLL/pull/447")
def gae_across_the_end(module: PPOModule) -> Any:
    def gae(original: Any, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        return original(rewards + gamma * values * last, values, mask, gamma, lam)

    return replaced(rlchat.ppo.advantages, "gae", gae)


@fault("Advantages are whitened over padding too.", GITHUB + "areal-project/AReaL/pull/1346")
def whitening_over_padding(module: PPOModule) -> Any:
    def whiten(original: Any, x: Tensor, mask: Tensor, *args: Any, **options: Any) -> Tensor:
        white: Tensor = original(x, torch.ones_like(mask), *args, **options)
        return white * mask

    return replaced(rlchat.ppo.advantages, "masked_whiten", whiten)


@fault("The values are those of other rows.", GITHUB + "verl-project/verl/pull/1440")
def values_of_another_minibatch(module: PPOModule) -> Any:
    def evaluate(original: Any, self: PPOModule, *args: Any) -> Rollout:
        rollout: Rollout = original(self, *args)
        return replace(rollout, values=torch.where(rollout.response_mask, rollout.values.roll(1, 0), 0.0))

    return replaced(PPOModule, "evaluate_transcript", evaluate)


# ---- the loss --------------------------------------------------------------------------------------------------------


@contextmanager
def last_evaluation() -> Iterator[list[TokenEvaluation]]:
    """A list whose only element is the latest result of ``evaluate_tokens``."""
    latest: list[TokenEvaluation] = []

    def evaluate(original: Any, *args: Any, **options: Any) -> TokenEvaluation:
        latest[:] = [original(*args, **options)]
        return latest[0]

    with replaced(PPOModule, "evaluate_tokens", evaluate):
        yield latest


@fault("Advantages are not detached from the values.", GITHUB + "astariul/encode-attend-navigate-pytorch/pull/3")
def advantage_not_detached(module: PPOModule) -> Iterator[None]:
    def loss(original: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, *args: Any, **options: Any) -> Any:
        values = latest[0].values
        return original(logprobs, old, advantages - (values - values.detach()), *args, **options)

    with last_evaluation() as latest, replaced(rlchat.ppo.module, "policy_loss", loss):
        yield


@fault("The targets of the critic are not detached.", GITHUB + "lcswillems/rl-starter-files/issues/6")
def critic_targets_not_detached(module: PPOModule) -> Any:
    def loss(original: Any, values: Tensor, old: Tensor, returns: Tensor, *args: Any) -> Any:
        return original(values, old, returns + 0.5 * (values - values.detach()), *args)

    return replaced(rlchat.ppo.module, "value_loss", loss)


@fault("The policy loss has the wrong sign.", GITHUB + "fla-org/flash-linear-attention/issues/1073")
def policy_loss_sign(module: PPOModule) -> Any:
    def loss(original: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, *args: Any, **options: Any) -> Any:
        return original(logprobs, old, -advantages, *args, **options)

    return replaced(rlchat.ppo.module, "policy_loss", loss)


@fault("The clipped loss is the smaller of both, not the larger.", GITHUB + "yandexdataschool/Practical_RL/issues/248")
def clip_on_the_wrong_side(module: PPOModule) -> Any:
    def loss(original: Any, *args: Any, **options: Any) -> Any:
        with patch.object(torch, "maximum", torch.minimum):
            return original(*args, **options)

    return replaced(rlchat.ppo.module, "policy_loss", loss)


@fault("The entropy bonus has the wrong sign.", GITHUB + "PKU-Alignment/omnisafe/pull/133")
def entropy_sign(module: PPOModule) -> Iterator[None]:
    def loss(original: Any, self: PPOModule, iteration: Any, rows: Tensor, tokens: Tensor) -> Any:
        total, metrics = original(self, iteration, rows, tokens)
        mask = iteration.rollout.response_mask[rows]
        return total + 2 * self.options.entropy_coef * masked_mean(latest[0].entropy, mask, tokens), metrics

    with last_evaluation() as latest, replaced(PPOModule, "minibatch_loss", loss):
        yield


@fault(
    "Each microbatch is averaged over its own tokens.",
    GITHUB + "huggingface/transformers/pull/34191",
    micro_batch_size=4,
)
def mean_of_microbatch_means(module: PPOModule) -> Any:
    def loss(original: Any, *args: Any, **options: Any) -> PolicyLoss:
        *first, mask, clip_eps, _ = args
        microbatches = 2  # of each minibatch
        found: PolicyLoss = original(*first, mask, clip_eps, mask.sum() * microbatches, **options)
        return found

    return replaced(rlchat.ppo.module, "policy_loss", loss)


# ---- optimization ----------------------------------------------------------------------------------------------------


@fault(
    "The learning rate is 100 times too high.", GITHUB + "Unity-Technologies/ml-agents/issues/1237", learning_rate=0.05
)
def learning_rate_100_times_too_high(module: PPOModule) -> Iterator[None]:
    yield


@fault("The value head starts with large random weights.", GITHUB + "huggingface/trl/issues/1783")
def value_head_starts_large(module: PPOModule) -> Iterator[None]:
    torch.nn.init.normal_(module.model.value_head.weight, std=10.0)  # type: ignore[arg-type]
    yield


@fault("The optimizer does not step.", GITHUB + "LeslieTrue/SFTvsRL/issues/8")
def optimizer_steps_skipped(module: PPOModule) -> Any:
    def configure(original: Any, self: PPOModule) -> Any:
        configured = original(self)
        configured["optimizer"].step = lambda closure=None: closure() if closure else None
        return configured

    return replaced(PPOModule, "configure_optimizers", configure)


@fault("Gradients are clipped to 0.", GITHUB + "modelscope/ms-swift/issues/5571")
def gradients_clipped_to_0(module: PPOModule) -> Iterator[None]:
    module.options.max_grad_norm = 0.0
    yield


@fault("The adaptive KL coefficient moves the wrong way.", GITHUB + "CarperAI/trlx/pull/361")
def kl_controller_sign(module: PPOModule) -> Any:
    return replaced(
        AdaptiveKL, "update", lambda original, self, kl, n: original(self, max(2 * self.target - kl, 0.0), n)
    )
