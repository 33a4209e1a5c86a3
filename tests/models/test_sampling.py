"""The sampling loop: addressed random numbers, tokens with the right probabilities, independent rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.kv_cache import Cache
from rlchat.models.networks import RLChatModel
from rlchat.models.sampling import (
    Change,
    Generated,
    Sampling,
    Uniforms,
    addressed_uniforms,
    choose,
    generate,
    generator_uniforms,
    inverse_cdf,
    sample,
)
from rlchat.utils.padding import pad

VOCABULARY, PAD, END = 24, 23, 22
ENDS: dict[str, Any] = {"end_id": END, "pad_id": PAD}
BELOW_ONE = 1 - 2**-24
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
}
every_family = pytest.mark.parametrize("family", CONFIGS)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 0], [11, 12, 13, 14], [2, 2], [0], [21, 20, 19, 18, 17], [5, 4, 3, 2, 1]]


def policy(family: str = "llama") -> RLChatModel:
    torch.manual_seed(0)
    config = {"model_type": family, **CONFIGS[family], "initializer_range": 0.3}
    return RLChatModel(Backbone(config, VOCABULARY, 32), unsayable=[PAD]).eval()


def replies(
    model: RLChatModel, prompts: list[list[int]], noise: Uniforms, sampling: Sampling | None = None
) -> list[list[int]]:
    """The sampled tokens of each row, the end marker included."""
    said = generated(model, prompts, noise, sampling)
    return [row[mask].tolist() for row, mask in zip(said.ids, said.mask, strict=True)]


def generated(
    model: RLChatModel, prompts: list[list[int]], noise: Uniforms, sampling: Sampling | None = None
) -> Generated:
    ids, mask = pad(prompts, PAD, "left")
    return generate(model, ids, mask, sampling or Sampling(8, temperature=1.0), noise, end_id=END, pad_id=PAD)


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


# ---- the inverse of the cumulative distribution ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "uniform", "token"),
    [
        ([0.25, 0.25, 0.5], 0.0, 0),
        ([0.25, 0.25, 0.5], 0.2, 0),
        ([0.25, 0.25, 0.5], 0.25, 1),
        ([0.25, 0.25, 0.5], 0.49, 1),
        ([0.25, 0.25, 0.5], 0.5, 2),
        ([0.25, 0.25, 0.5], BELOW_ONE, 2),
        ([0.0, 0.0, 1.0, 0.0], 0.0, 2),
        ([0.0, 0.0, 1.0, 0.0], BELOW_ONE, 2),
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.5, 3),
        ([1.0], BELOW_ONE, 0),
        ([0.5, 0.25], 0.6, 0),  # shares of the sum: 0.45 and 0.525 of 0.75
        ([0.5, 0.25], 0.7, 1),
    ],
)
def test_inverse_cdf_by_hand(probabilities: list[float], uniform: float, token: int) -> None:
    assert inverse_cdf(torch.tensor([probabilities]), torch.tensor([uniform])).tolist() == [token]


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=40).filter(any),
    uniform=st.one_of(st.just(0.0), st.just(BELOW_ONE), st.integers(0, 2**24 - 1).map(lambda i: i / 2**24)),
)
@settings(deadline=None, max_examples=200)
def test_a_token_without_probability_is_never_chosen(weights: list[float], uniform: float) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float32)
    probabilities = probabilities / probabilities.sum()
    token = int(inverse_cdf(probabilities[None], torch.tensor([uniform])))
    assert probabilities[token] > 0
    # The number falls into the token's own piece of [0, 1), up to the rounding of the sum.
    before, after = float(probabilities[:token].double().sum()), float(probabilities[: token + 1].double().sum())
    assert before - 1e-5 <= uniform <= after + 1e-5


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.125, 0.25, 0.0625, 0.0625, 0.0])
    count = 2**16
    even = torch.arange(count) / count  # an even grid is not random
    counts = inverse_cdf(probabilities.expand(count, -1), even).bincount(minlength=7)
    assert counts.tolist() == [int(p * count) for p in probabilities.tolist()]
    noise = addressed_uniforms(0, 0, torch.arange(count))(0)
    observed = inverse_cdf(probabilities.expand(count, -1), noise).bincount(minlength=7).double()
    expected, likely = probabilities.double() * count, probabilities > 0
    assert observed[~likely].sum() == 0
    chi_square = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001


# ---- addressed random numbers ----------------------------------------------------------------------------------------


def splitmix64(state: int) -> int:
    """The published generator's output for one state, on Python's own integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64_of_their_address() -> None:
    assert splitmix64(1234567) == 6457827717110365317  # the published test vector
    for seed, stream, row, position in [(0, 0, 0, 0), (3, -1, 12, 5), (2**40 + 1, 10**6, 2**33, 511), (-7, 2, 1, 0)]:
        base = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ (stream % 2**64)) ^ row)
        expected = (splitmix64(base ^ position) >> 40) / 2**24
        assert addressed_uniforms(seed, stream, rows(row))(position).tolist() == [expected]


def kolmogorov_smirnov(numbers: Tensor) -> float:
    """√n times the largest distance to the uniform distribution; above 1.95 once in a thousand times."""
    ordered, n = numbers.double().sort().values, len(numbers)
    above = torch.arange(1, n + 1) / n - ordered
    below = ordered - torch.arange(n) / n
    return float(torch.maximum(above, below).max()) * math.sqrt(n)


def test_uniforms_are_uniform_along_every_axis() -> None:
    n = 2**14
    by_row = addressed_uniforms(1, 2, torch.arange(n))(3)
    noise = addressed_uniforms(1, 2, rows(5))
    by_position = torch.cat([noise(i) for i in range(n // 4)])
    by_stream = torch.cat([addressed_uniforms(1, i, rows(5))(3) for i in range(n // 8)])
    by_seed = torch.cat([addressed_uniforms(i, 2, rows(5))(3) for i in range(n // 8)])
    for numbers in (by_row, by_position, by_stream, by_seed):
        assert numbers.dtype == torch.float32
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert kolmogorov_smirnov(numbers) < 1.95
        # Neighbours on the axis are independent.
        assert abs(correlation(numbers[1:], numbers[:-1])) < 4 / math.sqrt(len(numbers))
    counts = by_row.mul(256).long().bincount(minlength=256).double()
    assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 330.5  # 255 degrees of freedom, p = 0.001


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def test_uniforms_at_different_addresses_are_independent() -> None:
    n = 2**14
    here = addressed_uniforms(1, 2, torch.arange(n))(3)
    others = {
        "position": addressed_uniforms(1, 2, torch.arange(n))(4),
        "stream": addressed_uniforms(1, 3, torch.arange(n))(3),
        "validation": addressed_uniforms(1, -1, torch.arange(n))(3),
        "seed": addressed_uniforms(2, 2, torch.arange(n))(3),
        "row": addressed_uniforms(1, 2, torch.arange(n) + n)(3),
        "swapped": addressed_uniforms(2, 1, torch.arange(n))(3),
        "offset": addressed_uniforms(1, 2, torch.arange(n) ^ 1)(3),
    }
    for axis, there in others.items():
        assert abs(correlation(here, there)) < 4 / math.sqrt(n), axis
        assert (here == there).float().mean() < 0.001, axis


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 2**31), st.integers(-2, 10**6))
@settings(deadline=None, max_examples=50)
def test_a_row_has_the_same_uniforms_in_any_batch(numbers: list[int], seed: int, stream: int) -> None:
    together = addressed_uniforms(seed, stream, torch.tensor(numbers))
    for position in (0, 7):
        alone = [float(addressed_uniforms(seed, stream, rows(number))(position)) for number in numbers]
        assert together(position).tolist() == alone
    assert together(0).tolist() == together(0).tolist()  # asked twice, the same


def test_generator_uniforms_continue() -> None:
    noise, again = (generator_uniforms(torch.Generator().manual_seed(0), 3) for _ in range(2))
    first = noise(0)
    assert first.shape == (3,)
    assert first.tolist() != noise(0).tolist()
    assert first.tolist() == again(0).tolist()


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(model: RLChatModel, prompt: list[int], noise: Uniforms, row: int, new: int, temperature: float) -> list[int]:
    """One row, no cache, no padding, probabilities added up one by one."""
    ids: list[int] = list(prompt)
    for position in range(new):
        tokens = torch.tensor([ids])
        logits = model.backbone(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1] @ model.backbone.head_weight.T
        weights = [math.exp(x / temperature) if i != PAD else 0.0 for i, x in enumerate(logits.tolist())]
        left = float(noise(position)[row]) * sum(weights)
        token = next(i for i, weight in enumerate(weights) if (left := left - weight) < 0)
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


@every_family
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_equals_a_naive_loop(family: str, temperature: float) -> None:
    model, noise = policy(family), addressed_uniforms(3, 0, torch.arange(len(PROMPTS)))
    expected = [naive(model, prompt, noise, i, 24, temperature) for i, prompt in enumerate(PROMPTS)]
    assert replies(model, PROMPTS, noise, Sampling(24, temperature)) == expected
    assert len({len(reply) for reply in expected}) > 1  # some rows end before others


@every_family
def test_the_response_of_a_row_does_not_depend_on_the_other_rows(family: str) -> None:
    model = policy(family)
    together = replies(model, PROMPTS, addressed_uniforms(3, 0, torch.arange(8)))
    alone = [replies(model, [prompt], addressed_uniforms(3, 0, rows(i)))[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    halves = [
        reply
        for part in (slice(0, 8, 2), slice(1, 8, 2))
        for reply in replies(model, PROMPTS[part], addressed_uniforms(3, 0, torch.arange(8)[part]))
    ]
    assert halves == together[0::2] + together[1::2]
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    shuffled = replies(model, [PROMPTS[i] for i in order], addressed_uniforms(3, 0, order))
    assert shuffled == [together[i] for i in order]
    assert replies(model, PROMPTS, addressed_uniforms(3, 1, torch.arange(8))) != together  # another iteration


class Script(RLChatModel):
    """Generates ``lines[row]`` for any prompt, then padding, whatever the random numbers."""

    def __init__(self, lines: list[list[int]]) -> None:
        super().__init__(policy().backbone)
        self.lines, self.position = lines, -1

    def logits(self, hidden: Tensor) -> Tensor:
        self.position += 1
        if len(hidden) < len(self.lines):  # rows that have ended have left the batch
            self.lines = [line for line in self.lines if END not in line[: self.position]]
        logits = torch.full((len(hidden), VOCABULARY), -100.0)
        for i, line in enumerate(self.lines):
            logits[i, line[self.position]] = 100.0
        return logits


def test_a_response_ends_at_its_end_marker_and_is_padded_after_it() -> None:
    lines = [[1, 2, END, 7, 7, 7], [3, 4, 5, 6, END, 8], [END, 9, 9, 9, 9, 9]]
    said = generated(Script(lines), PROMPTS[:3], generator_uniforms(torch.Generator(), 3))
    assert said.ids.tolist() == [[1, 2, END, PAD, PAD], [3, 4, 5, 6, END], [END, PAD, PAD, PAD, PAD]]
    assert said.mask.sum(1).tolist() == [3, 5, 1]
    assert said.mask.tolist() == (said.ids != PAD).tolist()
    assert said.ended.tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("lines", "steps", "ids", "ended"),
    [
        ([[1, 2, END], [3, END, 7]], 1, [[1], [3]], [False, False]),
        ([[1, 2, END], [3, END, 7]], 2, [[1, 2], [3, END]], [False, True]),
        ([[1, 2, END, 7, 7], [3, END, 7, 7, 7]], 5, [[1, 2, END], [3, END, PAD]], [True, True]),
        ([[END, 7], [END, 7]], 2, [[END], [END]], [True, True]),  # without the column of padding
    ],
)
def test_processes_with_a_sharded_model_stop_together(
    lines: list[list[int]], steps: int, ids: list[list[int]], ended: list[bool]
) -> None:
    """``goes_on`` may end a response early, and it may ask for steps after the last row has ended."""
    asked: list[Tensor] = []

    def goes_on(alive: Tensor) -> bool:
        asked.append(alive)
        return len(asked) < steps

    noise = generator_uniforms(torch.Generator(), 2)
    said = generate(Script(lines), *pad(PROMPTS[:2], PAD, "left"), Sampling(5, 1.0), noise, **ENDS, goes_on=goes_on)
    assert len(asked) == steps
    assert said.ids.tolist() == ids
    assert said.ended.tolist() == ended


def test_a_response_cut_at_the_limit_has_not_ended() -> None:
    lines = [[1, 2, 3, END], [4, END, 5, 6]]
    said = generated(Script(lines), PROMPTS[:2], generator_uniforms(torch.Generator(), 2), Sampling(3, 1.0))
    assert said.ids.tolist() == [[1, 2, 3], [4, END, PAD]]
    assert said.ended.tolist() == [False, True]


def test_tokens_come_one_by_one_and_the_caller_may_stop() -> None:
    model = Script([[1, 2, 3, 4], [5, END, 6, 6]])
    ids, mask = pad(PROMPTS[:2], PAD, "left")
    noise = generator_uniforms(torch.Generator(), 2)
    steps = sample(model, ids, mask, Sampling(4, 1.0), noise, end_id=END, pad_id=PAD)
    assert [next(steps).tokens.tolist() for _ in range(3)] == [[1, 5], [2, END], [3, PAD]]
    assert model.position == 2  # no step is computed in advance


def test_the_mask_and_the_logprobs_of_a_row_that_has_ended() -> None:
    """All logits are equal: 0.94 draws the end marker, token 22 of 24, and 0 draws token 0."""
    fed: list[tuple[Any, Any]] = []

    def decode(ids: Tensor, mask: Tensor) -> Tensor:
        fed.append((ids.tolist(), mask.int().tolist()))
        return torch.zeros(2, VOCABULARY)

    ids, mask = pad([[5], [6, 7]], PAD, "left")
    noise = torch.tensor([[0.0, 0.0], [0.94, 0.0], [0.0, 0.0], [0.0, 0.94]])
    steps = list(sample(policy(), ids, mask, Sampling(8, 1.0), lambda i: noise[i], **ENDS, decode=decode))
    assert [step.tokens.tolist() for step in steps] == [[0, 0], [END, 0], [PAD, 0], [PAD, END]]
    assert fed == [
        ([[PAD, 5], [6, 7]], [[0, 1], [1, 1]]),
        ([[0], [0]], [[0, 1, 1], [1, 1, 1]]),
        ([[END], [0]], [[0, 1, 1, 1], [1, 1, 1, 1]]),
        ([[PAD], [0]], [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),  # nothing attends to what follows the end marker
    ]
    one = -math.log(VOCABULARY)
    for step, expected in zip(steps, [[one, one], [one, one], [0, one], [0, one]], strict=True):
        torch.testing.assert_close(step.logprobs, torch.tensor(expected))


def test_the_caller_sees_the_logits_and_decides_when_to_stop() -> None:
    model = Script([[1, END, 7, 8], [2, 3, END, 9]])
    likeliest: list[list[int]] = []
    unfinished: list[list[bool]] = []

    def goes_on(alive: Tensor) -> bool:
        unfinished.append(alive.tolist())
        return len(unfinished) < 4

    def observe(logits: Tensor) -> None:
        likeliest.append(logits.argmax(-1).tolist())

    ids, mask = pad(PROMPTS[:2], PAD, "left")
    noise = generator_uniforms(torch.Generator(), 2)
    steps = sample(model, ids, mask, Sampling(3, 1.0), noise, **ENDS, goes_on=goes_on, observe=observe)
    assert [step.tokens.tolist() for step in steps] == [[1, 2], [END, 3], [PAD, END], [PAD, PAD]]
    assert unfinished == [[True, True], [False, True], [False, False], [False, False]]
    assert likeliest == [[1, 2], [END, 3], [7, END], [8, 9]]


@every_family
def test_sampling_continues_from_a_cache(family: str) -> None:
    """Cached tokens are not processed again, and the response equals that to the whole prompt."""
    model, sampling, no_noise = policy(family), Sampling(4, temperature=0), addressed_uniforms(0, 0, rows(0))
    (first,) = replies(model, [PROMPTS[0]], no_noise, sampling)
    whole = [*PROMPTS[0], *first, 1, 2]
    (expected,) = replies(model, [whole], no_noise, sampling)

    cache = model.backbone.new_cache()
    ids, mask = pad([PROMPTS[0]], PAD, "left")
    said = list(sample(model, ids, mask, sampling, no_noise, end_id=END, pad_id=PAD, cache=cache))
    assert [int(step.tokens) for step in said] == first
    seen = len(PROMPTS[0]) + len(first) - 1  # the last token was drawn, and not fed
    fed = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    rest, mask = torch.tensor([whole[seen:]]), torch.ones(1, len(whole), dtype=torch.bool)
    steps = sample(model, rest, mask, sampling, no_noise, end_id=END, pad_id=PAD, cache=cache)
    assert [int(step.tokens) for step in steps] == expected
    assert fed == [3, 1, 1, 1][: len(expected)]


def test_the_prompt_tensors_are_not_modified() -> None:
    ids, mask = pad(PROMPTS, PAD, "left")
    before = ids.clone(), mask.clone()
    generate(policy(), ids, mask, Sampling(4), addressed_uniforms(0, 0, torch.arange(8)), end_id=END, pad_id=PAD)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


@torch.no_grad()
def test_temperature_0_takes_the_most_likely_token() -> None:
    model, greedy = policy(), Sampling(5, temperature=0.0)
    for prompt in PROMPTS:
        (said,) = replies(model, [prompt], generator_uniforms(torch.Generator(), 1), greedy)
        ids = torch.tensor([[*prompt, *said]])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))
        likeliest = model.logits(hidden)[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == said


@every_family
def test_rows_that_have_ended_leave_the_batch(family: str) -> None:
    """The responses have 1 to 8 tokens; when a fifth of the rows has ended, the next step is without them."""
    model = policy(family)
    sizes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    ids, mask = pad(PROMPTS, PAD, "left")
    each = [Sampling(row + 1, temperature=1.0) for row in range(8)]
    noise = addressed_uniforms(3, 0, torch.arange(8))
    together = generate(model, ids, mask, each, noise, end_id=END, pad_id=PAD)
    assert sizes[0] == 8
    assert sizes == sorted(sizes, reverse=True)
    lengths = together.mask.sum(1)
    for step, size in enumerate(sizes):
        unfinished = int((lengths > step).sum())
        assert unfinished <= size <= max(unfinished / 0.8, unfinished + 2)
    for row in range(8):
        said = generate(
            model,
            *pad([PROMPTS[row]], PAD, "left"),
            each[row],
            addressed_uniforms(3, 0, rows(row)),
            end_id=END,
            pad_id=PAD,
        )
        assert together.ids[row][together.mask[row]].tolist() == said.ids[0].tolist()
        torch.testing.assert_close(together.logprobs[row][together.mask[row]], said.logprobs[0], atol=1e-5, rtol=1e-4)


def test_one_of_five_rows_leaves_the_batch_as_soon_as_it_has_ended() -> None:
    """One of six would stay, since each change copies the cache."""
    for count, expected in ((5, [5, 4, 4]), (6, [6, 6, 6])):
        model, sizes = Script([[END, 9, 9], *[[1, 2, 3]] * (count - 1)]), []
        model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))  # noqa: B023
        said = generated(model, PROMPTS[:count], generator_uniforms(torch.Generator(), count), Sampling(3, 1.0))
        assert sizes == expected
        assert said.ids.tolist() == [[END, PAD, PAD], *[[1, 2, 3]] * (count - 1)]


# ---- rows that differ, leave and join --------------------------------------------------------------------------------

CROWD = [
    Sampling(8, temperature=1.0),
    Sampling(3, temperature=0.0),
    Sampling(8, temperature=0.7, top_k=3),
    Sampling(5, temperature=1.5, top_p=0.8),
]


def alone(model: RLChatModel, row: int) -> list[int]:
    """The response to prompt ``row`` in a separate batch, with the same random numbers and sampling options."""
    return replies(model, [PROMPTS[row]], addressed_uniforms(3, 0, rows(row)), CROWD[row % 4])[0]


@every_family
def test_each_row_can_have_its_own_sampling_options(family: str) -> None:
    model = policy(family)
    ids, mask = pad(PROMPTS, PAD, "left")
    each = [CROWD[row % 4] for row in range(8)]
    said = generate(model, ids, mask, each, addressed_uniforms(3, 0, torch.arange(8)), end_id=END, pad_id=PAD)
    assert [row[own].tolist() for row, own in zip(said.ids, said.mask, strict=True)] == [
        alone(model, row) for row in range(8)
    ]
    assert said.mask.sum(1).tolist()[1] == 3  # the other rows are not affected


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_the_response_of_a_row_does_not_depend_on_when_rows_join_and_leave(family: str, seed: int) -> None:
    """Rows join one by one and in groups, finish or are removed, in a random order."""
    model, order = policy(family), torch.Generator().manual_seed(seed)
    waiting = torch.randperm(24, generator=order).tolist()  # row r has PROMPTS[r % 8] and its own random numbers
    waiting = [row for row in waiting if len(PROMPTS[row % 8]) > 1]
    running = [waiting.pop() for _ in range(2)]
    began = [0, 0]
    said: dict[int, list[int]] = {row: [] for row in running}
    thrown_out: set[int] = set()

    def noise() -> Uniforms:
        return addressed_uniforms(3, 0, torch.tensor(running).long(), torch.tensor(began).long())

    ids, mask = pad([PROMPTS[row % 8] for row in running], PAD, "left")
    how = [CROWD[row % 4] for row in running]
    steps = sample(model, ids, mask, how, noise(), end_id=END, pad_id=PAD)
    change, position = None, 0
    while True:
        try:
            step = steps.send(change)
        except StopIteration:
            break
        position += 1
        for row, token in zip(running, step.tokens.tolist(), strict=True):
            said[row].append(token)
        ended = [said[row][-1] == END or len(said[row]) == CROWD[row % 4].max_new_tokens for row in running]
        chance = torch.rand(len(running), generator=order).tolist()
        thrown_out |= {row for row, end, u in zip(running, ended, chance, strict=True) if not end and u < 0.05}
        keep = [i for i, row in enumerate(running) if not ended[i] and row not in thrown_out]
        joining = [waiting.pop() for _ in range(min(len(waiting), int(torch.randint(1, 4, (), generator=order))))]
        running = [running[i] for i in keep] + joining
        began = [began[i] for i in keep] + [position] * len(joining)
        said.update({row: [] for row in joining})
        prompts = [PROMPTS[row % 8] for row in joining]
        change = Change(keep, prompts, [CROWD[row % 4] for row in running], noise())
    assert thrown_out
    assert len(said) - len(thrown_out) > 5
    for row, tokens in said.items():
        (expected,) = replies(model, [PROMPTS[row % 8]], addressed_uniforms(3, 0, rows(row)), CROWD[row % 4])
        assert tokens == (expected[: len(tokens)] if row in thrown_out else expected), row


def test_a_batch_is_as_wide_as_its_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that only removed rows used are dropped; otherwise a server's batch would grow without bound."""
    model = policy()
    model.backbone.steps = False  # all tokens go through the method that is replaced below
    widths = []

    def forward(ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        widths.append(mask.shape[1])
        return model.backbone(ids, mask, cache)

    monkeypatch.setattr(model, "forward", forward)
    ids, mask = pad([PROMPTS[0], PROMPTS[2]], PAD, "left")  # of 7 tokens and of 3
    how, noise = Sampling(8, 1.0), addressed_uniforms(0, 0, rows(1))
    steps = sample(model, ids, mask, how, addressed_uniforms(0, 0, rows(0, 1)), end_id=END, pad_id=PAD)
    next(steps)
    steps.send(Change([1], [], [how], noise))
    steps.send(Change([0], [PROMPTS[7]], [how, how], addressed_uniforms(0, 0, rows(1, 2))))
    assert widths == [7, 4, 4, 5]  # the prompts; the shorter row's; the newcomer's 4 of 5, read; both


def test_the_token_limit_of_a_row_counts_from_its_first_token() -> None:
    """The second row joins after two tokens of the first one, and has two tokens itself; so has the third, later."""
    model = policy()
    model.unsayable[END] = 1
    ids, mask = pad([PROMPTS[0]], PAD, "left")
    long, short = Sampling(7, 1.0), Sampling(2, 1.0)
    noise = [generator_uniforms(torch.Generator(), n) for n in range(4)]
    steps = sample(model, ids, mask, long, noise[1], **ENDS)
    next(steps)
    said = [next(steps), steps.send(Change([0], [PROMPTS[3]], [long, short], noise[2])), next(steps)]
    said += [steps.send(Change([0, 1], [PROMPTS[2]], [long, short, short], noise[3])), *steps]
    tokens = [[token != PAD for token in step.tokens.tolist()] for step in said]
    assert tokens == [
        [True],
        [True, True],
        [True, True],
        [True, False, True],
        [True, False, True],
        [True, False, False],
    ]


def test_rows_cannot_join_a_cache_with_a_sliding_window() -> None:
    config = {"model_type": "mistral", **CONFIGS["llama"], "sliding_window": 4}
    model = RLChatModel(Backbone(config, VOCABULARY, 32), unsayable=[PAD]).eval()
    ids, mask = pad(PROMPTS[:2], PAD, "left")
    how, noise = Sampling(8, 1.0), addressed_uniforms(0, 0, rows(0, 1))
    steps = sample(model, ids, mask, how, noise, end_id=END, pad_id=PAD)
    next(steps)
    with pytest.raises(ValueError, match="cannot add rows"):
        steps.send(Change([0], [PROMPTS[2]], [how, how], noise))


# ---- truncated distributions -----------------------------------------------------------------------------------------

PROBABILITIES = [0.05, 0.4, 0.0, 0.25, 0.2, 0.1]


def support(sampling: Sampling, probabilities: Iterable[float] = PROBABILITIES) -> dict[int, float]:
    """Each token that can be sampled and its frequency, over an even grid of uniform numbers."""
    logits = torch.tensor(list(probabilities)).log()
    count = 20_000
    tokens = choose(logits.expand(count, -1), sampling, torch.arange(count) / count).tokens
    return {i: n / count for i, n in enumerate(tokens.bincount().tolist()) if n}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), {0: 0.05, 1: 0.4, 3: 0.25, 4: 0.2, 5: 0.1}),
        (Sampling(temperature=1.0, top_k=1), {1: 1.0}),
        (Sampling(temperature=1.0, top_k=2), {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (Sampling(temperature=1.0, top_k=100), {0: 0.05, 1: 0.4, 3: 0.25, 4: 0.2, 5: 0.1}),
        (Sampling(temperature=1.0, top_p=0.39), {1: 1.0}),
        (Sampling(temperature=1.0, top_p=0.6), {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (Sampling(temperature=1.0, top_p=0.8), {1: 0.4 / 0.85, 3: 0.25 / 0.85, 4: 0.2 / 0.85}),
        (Sampling(temperature=1.0, top_p=1e-9), {1: 1.0}),
        (Sampling(temperature=1.0, top_p=1e-320), {1: 1.0}),  # less than any float32
        # top_p counts what top_k has left: of 0.4, 0.25 and 0.2 the first two are 0.76.
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        # Squared: 0.0025, 0.16, 0.0625, 0.04 and 0.01 of 0.275.
        (
            Sampling(temperature=0.5),
            {0: 0.0025 / 0.275, 1: 0.16 / 0.275, 3: 0.0625 / 0.275, 4: 0.04 / 0.275, 5: 0.01 / 0.275},
        ),
        (Sampling(temperature=0.5, top_k=2), {1: 0.16 / 0.2225, 3: 0.0625 / 0.2225}),
        (Sampling(temperature=0.0), {1: 1.0}),
    ],
    ids=str,
)
def test_the_support_and_its_probabilities(sampling: Sampling, expected: dict[int, float]) -> None:
    found = support(sampling)
    assert set(found) == set(expected)
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("sampling", "uniform", "token", "probability"),
    [
        (Sampling(temperature=1.0), 0.25, 1, 0.2),
        (Sampling(temperature=0.5), 0.25, 2, 9 / 30),  # the weights are 1, 4, 9 and 16
        (Sampling(temperature=1.0, top_k=2), 0.25, 2, 0.3 / 0.7),
        (Sampling(temperature=1.0, top_p=0.8), 0.25, 2, 0.3 / 0.9),
        (Sampling(temperature=0.0), 0.25, 3, 1.0),
        (Sampling(temperature=1.0, top_k=1), 0.25, 3, 1.0),
    ],
    ids=str,
)
def test_a_logprob_is_of_the_distribution_that_was_drawn_from(
    sampling: Sampling, uniform: float, token: int, probability: float
) -> None:
    logits, other = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(2, 4), Sampling(temperature=1.0)
    both = torch.tensor([uniform, 0.0])
    for drawn in (choose(logits, sampling, both), choose(logits, [sampling, other], both)):
        assert int(drawn.tokens[0]) == token
        assert float(drawn.logprobs[0].exp()) == pytest.approx(probability)
    assert drawn.tokens.tolist() == [token, 0]
    assert float(drawn.logprobs[1].exp()) == pytest.approx(0.1)
    assert choose(logits[:1], [sampling], both[:1]).tokens.tolist() == [token]


@pytest.mark.parametrize("deterministic", [False, True])
def test_drawing_does_not_change_the_setting_of_deterministic_algorithms(deterministic: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(deterministic)
        choose(torch.zeros(1, 4), Sampling(top_p=0.5), torch.zeros(1))
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_nucleus_ends_where_top_p_is_reached_exactly() -> None:
    drawn = choose(torch.zeros(100, 4), Sampling(temperature=1.0, top_p=0.5), torch.arange(100) / 100)
    assert len(drawn.tokens.unique()) == 2
    torch.testing.assert_close(drawn.logprobs.exp(), torch.full((100,), 0.5))


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12, unique=True),
    top_p=st.floats(0.05, 0.99),
)
@settings(deadline=None, max_examples=50)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(weights: list[float], top_p: float) -> None:
    total = sum(weights)
    ordered = sorted(range(len(weights)), key=lambda i: -weights[i])
    assume(all(weights[i] - weights[j] > 1e-4 for i, j in pairwise(ordered)))  # float32 cannot order closer ones
    reached, expected = 0.0, set()
    for i in ordered:
        if abs(reached - top_p) < 1e-4:
            return  # so close to the boundary that rounding decides
        if reached >= top_p:
            break
        expected.add(i)
        reached += weights[i] / total
    assert set(support(Sampling(temperature=1.0, top_p=top_p), [w / total for w in weights])) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 9e-7},
        {"temperature": 1000001.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^invalid value {value} for {name}: expected "):
        Sampling(**options)


def test_the_limits_of_the_options_are_valid() -> None:
    for options in ({"max_new_tokens": 1, "top_k": 0, "top_p": 1.0}, {"temperature": 1e-6}, {"temperature": 1e6}):
        assert Sampling(**options) == replace(Sampling(), **options)


def test_top_k_1_is_greedy_under_ties() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0]]).expand(5, 4)
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.9, BELOW_ONE])
    assert choose(logits, Sampling(top_k=1), uniform).tokens.tolist() == [1] * 5
    assert choose(logits, Sampling(temperature=0), uniform).tokens.tolist() == [1] * 5
    # top_k 2 keeps two of the three, the first ones; so it does of more tokens than a sort of few keeps in order.
    assert choose(logits, Sampling(top_k=2), uniform).tokens.tolist() == [1, 1, 2, 2, 2]
    assert choose(torch.zeros(5, 100), Sampling(top_k=2), uniform).tokens.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=3), Sampling(top_p=0.5)])
@pytest.mark.parametrize("bad", [[1.0, math.nan, 0.0, 2.0], [1.0, math.inf, 0.0, 2.0], [-math.inf] * 4], ids=str)
def test_logits_that_are_not_finite_are_an_error(sampling: Sampling, bad: list[float]) -> None:
    good, logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2), torch.tensor([[0.0, 1.0, 2.0, 3.0], bad])
    half = torch.tensor([0.5, 0.5])
    for one in (sampling, [sampling, Sampling(top_k=2)]):
        assert choose(good, one, half).finite
        drawn = choose(logits, one, half)
        assert not drawn.finite
        assert drawn.tokens.max() < 4
    ids = torch.zeros(2, 1, dtype=torch.long)
    for check_every in (1, 3, 8):
        outputs = [good, good, logits, good, good, good]
        more: dict[str, Any] = {"decode": lambda ids, mask: outputs.pop(0), "check_every": check_every}  # noqa: B023
        said = sample(policy(), ids, ids == 0, replace(sampling, max_new_tokens=5), lambda _: half, **ENDS, **more)
        with pytest.raises(UserError, match="logits are NaN or infinite"):
            list(said)
        assert len(outputs) == {1: 3, 3: 3, 8: 1}[check_every]  # the third token, the third, the last one


def test_a_uniform_number_that_rounds_up_to_the_total_hits_a_token() -> None:
    """1 - 2**-30 is 1 in float32, so u · total is the total; without the guard the index would be 3, past the end."""
    probabilities = torch.tensor([[0.5, 0.25, 0.0]])
    assert inverse_cdf(probabilities, torch.tensor([1 - 2**-30], dtype=torch.float64)).tolist() == [1]
