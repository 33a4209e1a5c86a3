"""The rows of each minibatch, microbatch and process, by hand."""

from __future__ import annotations

import torch

from rlchat.models.sampling import addressed_uniforms
from rlchat.ppo.minibatches import local_minibatches, not_empty, shuffled_rows

ORDER = torch.tensor([5, 2, 0, 7, 1, 3, 6, 4])


def plan(rank: int, micro_batch_size: int | None, minibatches: int = 2) -> list[list[list[int]]]:
    """The rows of process ``rank`` of two, which have two prompts each, in groups of two responses."""
    parts = local_minibatches(ORDER, minibatches, micro_batch_size, group_size=2, world_size=2, rank=rank)
    return [[rows.tolist() for rows in minibatch] for minibatch in parts]


def test_the_example_of_the_docstring() -> None:
    """The second minibatch is global rows 1, 3, 6 and 4: rank 0 has rows 1 and 4 of these, rank 1 rows 3 and 6."""
    assert plan(0, None) == [[[0, 3]], [[1, 2]]]
    assert plan(1, None) == [[[0, 3]], [[1, 2]]]
    assert plan(0, 1) == [[[0], [3]], [[1], [2]]]


def test_a_process_with_fewer_rows_gets_empty_microbatches() -> None:
    """Three minibatches: global rows 5, 2, 0; then 7, 1, 3; then 6, 4."""
    assert plan(0, 1, 3) == [[[0], [3]], [[1], []], [[2]]]
    assert plan(1, 1, 3) == [[[0], []], [[1], [3]], [[2]]]
    assert plan(0, None, 3) == [[[0, 3]], [[1]], [[2]]]


def test_there_are_at_most_as_many_minibatches_as_rows() -> None:
    assert [len(plan(rank, None, minibatches=9)) for rank in range(2)] == [8, 8]


def test_the_order_does_not_use_the_random_numbers_of_sampled_tokens() -> None:
    """Those have the positions from 0 on; pass e over the rollout has position -1 - e."""
    uniforms = addressed_uniforms(3, 7, torch.arange(50))
    for epoch in range(3):
        order = shuffled_rows(50, seed=3, iteration=7, epoch=epoch)
        assert order.tolist() == uniforms(-1 - epoch).argsort().tolist()
        assert sorted(order.tolist()) == list(range(50))


def test_a_process_without_rows_computes_row_0_with_an_empty_mask() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    rows, chosen = not_empty(torch.tensor([2, 1]), mask)
    assert rows.tolist() == [2, 1]
    assert chosen.tolist() == [[False, True], [True, True]]
    rows, chosen = not_empty(torch.tensor([], dtype=torch.long), mask)
    assert rows.tolist() == [0]
    assert chosen.tolist() == [[False, False]]
