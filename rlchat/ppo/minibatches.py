"""Assigns the rows of a rollout to minibatches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from rlchat.models.sampling import addressed_uniforms


def local_minibatches(
    order: Tensor, minibatches: int, micro_batch_size: int | None, group_size: int, world_size: int, rank: int
) -> list[list[Tensor]]:
    """This process's rows, Long [rows] each, by minibatch and microbatch.

    All processes get the same number of microbatches, so that all take part in every collective; a microbatch may be
    empty.

    Args:
        order: Long [global rows], a permutation of the rows of all processes; see :func:`shuffled_rows`.
        minibatches: optimizer steps in one pass over the rollout.
        micro_batch_size: rows in one forward pass; None: all rows of the process.
        group_size: responses to each prompt.
        world_size: the number of processes.
        rank: the number of this process.

    Example: 2 processes, 2 prompts each, groups of 2. Prompt p of rank r is global prompt 2·p + r, and the responses to
    a prompt are adjacent:

        global row     0  1    2  3    4  5    6  7
        global prompt  0  0    1  1    2  2    3  3      row // group_size
        rank           0  0    1  1    0  0    1  1      prompt % world_size
        local row      0  1    0  1    2  3    2  3      prompt // world_size · group_size + row % group_size

    With order = (5, 2, 0, 7, 1, 3, 6, 4) and 2 minibatches, the first is global rows 5, 2, 0, 7: rank 0 takes its local
    rows 0 and 3, rank 1 its local rows 0 and 3. They are sorted, so that responses to a prompt are neighbours and the
    prompt is computed once.
    """
    result = []
    for rows in order.tensor_split(min(minibatches, len(order))):
        prompt, copy = rows // group_size, rows % group_size
        owner = prompt % world_size
        local = (prompt // world_size * group_size + copy)[owner == rank].sort().values
        most = int(owner.bincount().max())  # the largest number of rows of any process
        size = micro_batch_size or most
        result.append([local[start : start + size] for start in range(0, most, size)])
    return result


def shuffled_rows(rows: int, seed: int, iteration: int, epoch: int) -> Tensor:
    """Long [rows]: a permutation that depends only on the arguments, so that all processes draw the same one."""
    uniforms = addressed_uniforms(seed, iteration, torch.arange(rows))
    return uniforms(-1 - epoch).argsort()  # sampled tokens use the positions from 0 on


def not_empty(rows: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` Long [rows] and their response mask [rows, R]; row 0 with an all-False mask if there are none.

    A process without rows must still take part in the forward and backward passes of the other processes.
    """
    if len(rows):
        return rows, response_mask[rows]
    return rows.new_zeros(1), torch.zeros_like(response_mask[:1])
