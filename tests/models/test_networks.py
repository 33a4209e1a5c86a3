"""The heads: unsayable tokens have probability 0, log-probs by hand, chunks without effect, a critic of zeros."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlchat.models.backbones import Backbone
from rlchat.models.base_models import LogitsForm
from rlchat.models.networks import RewardModel, RLChatModel, value_head
from rlchat.models.token_stats import Head, cuda_products, is_lower_precision, token_stats

VOCABULARY = 12
UNSAYABLE = [0, 7, 11]
SAYABLE = [i for i in range(VOCABULARY) if i not in UNSAYABLE]


def backbone(**more: Any) -> Backbone:
    torch.manual_seed(0)
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Backbone({**config, "intermediate_size": 16, "initializer_range": 0.3, **more}, VOCABULARY, 16)


def policy(hidden_dim: int = 0, **more: Any) -> RLChatModel:
    return RLChatModel(backbone(**more), UNSAYABLE, hidden_dim).eval()


def hidden_states(rows: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
def test_what_is_unsayable_has_probability_0_and_the_entropy_stays_finite(temperature: float) -> None:
    model, hidden = policy(), hidden_states(5)
    probabilities = (model.logits(hidden) / temperature).softmax(-1)
    assert (probabilities[:, UNSAYABLE] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5))
    stats = model.token_stats(hidden, torch.tensor(SAYABLE[:5]), temperature)
    assert (stats.entropy >= -1e-6).all()
    assert (stats.entropy <= math.log(len(SAYABLE)) + 1e-6).all()
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    head = model.backbone.head_weight
    assert head.grad is not None
    assert head.grad.isfinite().all()
    assert (head.grad[UNSAYABLE] == 0).all()  # unsayable tokens get no gradient


def test_an_unsayable_target_has_probability_0() -> None:
    assert policy().token_stats(hidden_states(1), torch.tensor([7])).logprobs.item() < -1e6


def test_a_distribution_by_hand() -> None:
    """One hidden unit: logits 0, ln 2 and ln 5 give probabilities 1/8, 2/8 and 5/8."""
    model = RLChatModel(backbone(), [i for i in range(VOCABULARY) if i > 2])
    with torch.no_grad():
        model.backbone.head_weight.zero_()
        model.backbone.head_weight[:3, 0] = torch.tensor([1.0, 2.0, 5.0]).log()
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = 1
    stats = model.token_stats(hidden, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(stats.logprobs.exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    entropy = 1 / 8 * math.log(8) + 2 / 8 * math.log(4) + 5 / 8 * math.log(8 / 5)
    torch.testing.assert_close(stats.entropy, torch.full((3,), entropy))
    assert stats.correct.tolist() == [0.0, 0.0, 1.0]
    # At temperature 1/2 the weights are squared: 1, 4 and 25 of 30.
    cold = model.token_stats(hidden, torch.tensor([0, 1, 2]), temperature=0.5)
    torch.testing.assert_close(cold.logprobs.exp(), torch.tensor([1 / 30, 4 / 30, 25 / 30]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_stats_equal_a_plain_softmax_over_sayable_tokens(temperature: float) -> None:
    model, hidden = policy(), hidden_states(4)
    targets = torch.tensor([1, 6, 10, 2])
    said = (hidden @ model.backbone.head_weight.T)[:, SAYABLE] / temperature
    logprobs = said.log_softmax(-1)
    stats = model.token_stats(hidden, targets, temperature)
    places = torch.tensor([SAYABLE.index(t) for t in targets.tolist()])
    torch.testing.assert_close(stats.logprobs, logprobs[torch.arange(4), places])
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=said).entropy())
    assert stats.correct.tolist() == [float(a == b) for a, b in zip(logprobs.argmax(-1), places, strict=True)]


@pytest.mark.parametrize("width", [1, 4, VOCABULARY])  # with 4, the last block is narrower
@pytest.mark.parametrize("kept", [0, 7 * 9, 7 * VOCABULARY])  # none, the first blocks, all
def test_blocks_do_not_change_the_result(width: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, targets = policy(), torch.tensor([1, 2, 3, 4, 5, 6, 8])

    def run() -> tuple[Tensor, ...]:
        model.zero_grad()
        hidden = hidden_states(7)
        stats = model.token_stats(hidden, targets, 0.8)
        (2 * stats.logprobs.sum() - stats.entropy.square().sum()).backward()
        assert hidden.grad is not None
        assert model.backbone.head_weight.grad is not None
        return (*(part.detach() for part in stats), hidden.grad, model.backbone.head_weight.grad.clone())

    whole = run()
    monkeypatch.setattr("rlchat.models.token_stats._CPU_BLOCK", 7 * width)
    monkeypatch.setattr("rlchat.models.token_stats._MIN_BLOCK_WIDTH", 1)
    monkeypatch.setattr("rlchat.models.token_stats._CPU_KEPT_LOGITS", kept)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [LogitsForm(), LogitsForm(scale=0.5, cap=2.0, bias=True), LogitsForm(scale=1.6)])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.7])
@pytest.mark.parametrize("kept", [0, 2**25])
def test_gradients_equal_those_of_plain_operations(
    form: LogitsForm, entropy_coef: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlchat.models.token_stats._CPU_KEPT_LOGITS", kept)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((6, 8), (VOCABULARY, 8), (VOCABULARY,))
    )
    targets, coefs = torch.tensor([1, 2, 3, 4, 5, 10]), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -1.0])
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), *([bias.requires_grad_()] if form.bias else [])]

    def plain() -> tuple[Tensor, Tensor]:
        logits = form(torch.nn.functional.linear(hidden, weight, bias if form.bias else None)) / 0.8
        logprobs = logits[:, SAYABLE].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor([[SAYABLE.index(i)] for i in targets.tolist()])).squeeze(1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    head = Head(
        weight, bias if form.bias else None, form, torch.tensor([i in UNSAYABLE for i in range(VOCABULARY)]), 0.8
    )
    stats = token_stats(hidden, targets, head)
    expected = plain()
    torch.testing.assert_close((stats.logprobs, stats.entropy), expected, atol=1e-6, rtol=1e-6)
    found, wanted = (
        torch.autograd.grad((coefs * logprobs).sum() + entropy_coef * (coefs * entropy).sum(), inputs)
        for logprobs, entropy in ((stats.logprobs, stats.entropy), expected)
    )
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_the_entropy_alone() -> None:
    model, hidden = policy(), hidden_states(3)
    said = (hidden @ model.backbone.head_weight.T)[:, SAYABLE]
    plain = torch.distributions.Categorical(logits=said).entropy()
    stats = model.token_stats(hidden, torch.tensor([1, 2, 3]))
    found, wanted = (torch.autograd.grad(entropy.sum(), hidden) for entropy in (stats.entropy, plain))
    torch.testing.assert_close(found, wanted)


def test_an_unsayable_target_has_only_the_gradient_of_the_others() -> None:
    """Its own logit is a constant, so that d log p / d l_i = -p_i, as with plain operations on a filled tensor."""
    model, hidden, targets = policy(), hidden_states(3), torch.tensor([7, 2, 0])
    weight = model.backbone.head_weight
    coefs = torch.tensor([1.0, 2.0, -3.0])
    logits = (hidden @ weight.T).masked_fill(model.unsayable.bool(), -1e30) / 0.8
    plain = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    stats = model.token_stats(hidden, targets, 0.8)
    torch.testing.assert_close(stats.logprobs, plain)
    found, wanted = (torch.autograd.grad((coefs * x).sum(), [hidden, weight]) for x in (stats.logprobs, plain))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_each_of_the_most_likely_tokens_is_correct() -> None:
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [9.0]])
    head = Head(weight, None, LogitsForm(), torch.tensor([False] * 4 + [True]), 1.0)  # token 4 is unsayable
    stats = token_stats(torch.ones(4, 1, requires_grad=True), torch.arange(4), head)
    assert stats.correct.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert not stats.correct.requires_grad


def test_gradients_in_bfloat16_are_computed_in_float32() -> None:
    """They equal float32 gradients of the same numbers, rounded once."""
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(*size, generator=generator).bfloat16() for size in ((40, 8), (VOCABULARY, 8), (VOCABULARY,))]
    unsayable = torch.tensor([i in UNSAYABLE for i in range(VOCABULARY)])
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in rounded)
        stats = token_stats(hidden, torch.full((40,), 3), Head(weight, bias, LogitsForm(bias=True), unsayable, 1.0))
        gradients.append(torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), [hidden, weight, bias]))
    for full, half in zip(*gradients, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half, full.bfloat16(), atol=0, rtol=2**-8)


class Records(LogitsForm):
    """Keeps the shapes of the blocks."""

    shapes: list[tuple[int, ...]]

    def apply_(self, logits: Tensor) -> Tensor:
        Records.shapes.append(tuple(logits.shape))
        return logits


@pytest.mark.parametrize(
    ("tokens", "least", "widths"),
    [(4, 1, [5, 5, 2]), (7, 1, [2] * 6), (7, 4, [4, 4, 4]), (21, 1, [1] * 12), (0, 1, [12])],
)
def test_a_block_has_a_limited_number_of_logits(
    tokens: int, least: int, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 logits here: 4 tokens times 5 columns; it is not narrower than the least width."""
    monkeypatch.setattr("rlchat.models.token_stats._CPU_BLOCK", 20)
    monkeypatch.setattr("rlchat.models.token_stats._MIN_BLOCK_WIDTH", least)
    Records.shapes = []
    head = Head(torch.ones(VOCABULARY, 3), None, Records(), torch.zeros(VOCABULARY, dtype=torch.bool), 1.0)
    token_stats(torch.ones(tokens, 3), torch.zeros(tokens, dtype=torch.long), head)
    assert Records.shapes == [(tokens, width) for width in widths]


@pytest.mark.parametrize(("kept", "computed"), [(7 * VOCABULARY, 1), (7 * VOCABULARY - 1, 2)])
def test_logits_are_computed_again_only_if_they_were_not_kept(
    kept: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlchat.models.token_stats._CPU_KEPT_LOGITS", kept)
    Records.shapes = []
    hidden = torch.ones(7, 3, requires_grad=True)
    head = Head(torch.ones(VOCABULARY, 3), None, Records(), torch.zeros(VOCABULARY, dtype=torch.bool), 1.0)
    token_stats(hidden, torch.zeros(7, dtype=torch.long), head).logprobs.sum().backward()
    assert Records.shapes == [(7, VOCABULARY)] * computed


def test_the_blocks_that_were_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 ids for 2 tokens; 13 numbers are kept, which are 2 blocks of 6 numbers."""
    monkeypatch.setattr("rlchat.models.token_stats._CPU_BLOCK", 6)
    monkeypatch.setattr("rlchat.models.token_stats._MIN_BLOCK_WIDTH", 1)
    monkeypatch.setattr("rlchat.models.token_stats._CPU_KEPT_LOGITS", 13)
    Records.shapes = []
    head = Head(torch.ones(10, 3), None, Records(), torch.zeros(10, dtype=torch.bool), 1.0)
    loss = token_stats(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 9]), head).logprobs.sum()
    assert Records.shapes == [(2, 3), (2, 3), (2, 3), (2, 1)]
    loss.backward()
    assert Records.shapes[4:] == [(2, 3), (2, 1)]


@pytest.mark.parametrize(("precision", "newer"), [("high", "tf32"), ("highest", "ieee")])
def test_the_precision_of_products_on_cuda(precision: Literal["high", "highest"], newer: str) -> None:
    """Set in the context and restored after it, with PyTorch's older switch and its newer one."""
    for before in ("highest", "medium"):
        torch.set_float32_matmul_precision(before)
        try:
            with suppress(KeyError), cuda_products(precision):
                assert torch.get_float32_matmul_precision() == precision
                raise KeyError
            assert torch.get_float32_matmul_precision() == before
        finally:
            torch.set_float32_matmul_precision("highest")
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return
    default = matmul.fp32_precision
    try:
        for before in ("tf32", "ieee"):
            matmul.fp32_precision = before
            with suppress(KeyError), cuda_products(precision):
                assert matmul.fp32_precision == newer
                raise KeyError
            assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = default


def test_where_the_backbone_computes_in_lower_precision() -> None:
    weight = torch.ones(1)
    assert not is_lower_precision(weight)
    assert is_lower_precision(weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_lower_precision(weight)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_the_gradients_that_are_needed_are_computed(trained: int) -> None:
    """The product of hidden states and weights, one product for a gradient of either, and a sum for the bias."""
    inputs = [torch.ones(4, 8), torch.ones(VOCABULARY, 8), torch.zeros(VOCABULARY)]
    inputs[trained].requires_grad_()
    hidden, weight, bias = inputs
    head = Head(weight, bias, LogitsForm(bias=True), torch.zeros(VOCABULARY, dtype=torch.bool), 1.0)
    stats = token_stats(hidden, torch.zeros(4, dtype=torch.long), head)

    operations: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Operations():
        stats.logprobs.backward(torch.ones(4))
    expected = ["addmm_", "mm", "sum"]
    assert [name for name in operations if name in expected] == [expected[trained]]


def test_no_gradient_for_a_frozen_head() -> None:
    model, hidden = policy(), hidden_states(2)
    model.backbone.head_weight.requires_grad_(False)
    model.token_stats(hidden, torch.tensor([1, 2])).logprobs.sum().backward()
    assert model.backbone.head_weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_no_tokens_give_empty_stats() -> None:
    stats = policy().token_stats(hidden_states(0), torch.zeros(0, dtype=torch.long))
    assert [len(part) for part in stats] == [0, 0, 0]


@pytest.mark.parametrize("hidden_dim", [0, 4])
def test_the_critic_starts_at_zero_and_learns(hidden_dim: int) -> None:
    model, hidden = policy(hidden_dim), hidden_states(6)
    values = model.values(hidden.reshape(2, 3, 8))
    assert values.shape == (2, 3)
    assert (values == 0).all()
    (values - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.value_head.parameters())


def test_a_hidden_layer_in_the_critic() -> None:
    head = value_head(8, 4)
    assert sorted(tuple(p.shape) for p in head.parameters()) == [(1,), (1, 4), (4,), (4, 8)]
    assert policy(4).hidden_dim == 4


def test_outputs_are_float32_for_any_precision_of_the_backbone() -> None:
    model = policy().to(torch.bfloat16)
    hidden = hidden_states(2).to(torch.bfloat16)
    stats = model.token_stats(hidden, torch.tensor([1, 2]))
    assert {part.dtype for part in (*stats, model.values(hidden))} == {torch.float32}


@torch.no_grad()
def test_a_reward_is_read_at_the_last_real_token() -> None:
    model = RewardModel(backbone()).eval()
    torch.nn.init.normal_(model.score_head.weight)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 8, 9, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    scores = model(ids, mask)
    hidden = model.backbone(ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(scores[1], model.score_head(hidden[0, 2])[0])
    more = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(model(*more), scores, atol=1e-6, rtol=0)
    model.mean.fill_(2.0)
    model.std.fill_(4.0)
    assert model.standardised(torch.tensor([2.0, 10.0, -2.0])).tolist() == [0.0, 2.0, -1.0]


@torch.no_grad()
def test_heads_are_computed_in_float32_under_autocast() -> None:
    """In bfloat16 (8 bits of precision) log-probs would be off by more than 1e-3 and most scores would coincide."""
    model = policy(4)
    for parameter in model.value_head.parameters():
        torch.nn.init.normal_(parameter)
    hidden, targets = hidden_states(300).detach(), torch.full((300,), 5)
    reward_model = RewardModel(backbone()).eval()
    torch.nn.init.normal_(reward_model.score_head.weight)  # type: ignore[arg-type]
    expected, values = model.token_stats(hidden, targets), model.values(hidden)
    ids = torch.stack([torch.tensor([i % VOCABULARY, i // VOCABULARY, 3]) for i in range(100)])
    with torch.autocast("cpu", torch.bfloat16):
        stats = model.token_stats(hidden, targets)
        torch.testing.assert_close(stats.logprobs, expected.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(stats.entropy, expected.entropy, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.values(hidden), values, atol=1e-6, rtol=0)
        scores = reward_model(ids, torch.ones_like(ids, dtype=torch.bool))
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 80
