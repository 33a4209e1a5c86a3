"""Logs rollouts as text with numbers per token, and as histograms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.conversation import messages_id
from rlchat.distributed.collectives import gather_objects, take_turns
from rlchat.errors import UserError, at_least_one
from rlchat.ppo.module import Iteration, PPOModule
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.files import append_lines

_VERSION = 2  # of the rows; the first version had no token data, no prompt_id and no version
_LARGEST = 1e19  # still within the bins of TensorBoard's histograms


class RolloutLog(Callback):
    """Logs the responses that PPO trains on, and the distribution of their rewards, KL, values and advantages.

    ``rollouts.jsonl`` in the run's log folder has one line per response: the prompt, the response, why it ended, its
    reward by factor, its KL to the reference model in nats, and the critic's value. With ``tokens``, the line also has
    the tokens of the response with their numbers. ``rlchat look`` shows this file; docs/look.md describes its fields.
    ``held_out.jsonl`` has the responses of each validation, without tokens; ``rlchat report`` compares them.
    TensorBoard shows histograms of the same numbers, and of the advantages, under ``rollout/``.

    Args:
        every_n_iterations: log the first rollout, then one every this many PPO iterations.
        max_replies: maximum number of responses written per logged rollout. If a rollout has more, those to the prompts
            that come first in a fixed random order are written, so that a prompt that was written is written again
            when it comes back.
        tokens: also write the text, log-prob, KL, entropy, value and advantage of each token.
        ratio: also write the ratio of each token: its probability under the policy after the update, divided by that
            before. This takes one more forward pass over each logged rollout.

    Raises:
        UserError: for an invalid option.
    """

    def __init__(
        self, every_n_iterations: int = 10, max_replies: int = 64, tokens: bool = True, ratio: bool = False
    ) -> None:
        self.every_n_iterations = at_least_one("RolloutLog", "every_n_iterations", every_n_iterations)
        self.max_replies = at_least_one("RolloutLog", "max_replies", max_replies)
        if ratio and not tokens:
            raise UserError("RolloutLog.ratio is a number per token: set RolloutLog.tokens to true as well")
        self.tokens = tokens
        self.ratio = ratio

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        iteration = batches_seen(trainer)
        if not isinstance(pl_module, PPOModule) or (iteration - 1) % self.every_n_iterations:
            return
        seen = pl_module.last_iteration
        assert seen is not None
        columns = _token_columns(pl_module, seen) if self.tokens else {}
        if self.ratio:
            columns["ratio"] = _ratios(trainer, pl_module, seen)
        rows = _rows(pl_module, seen.rollout.rows(seen.factors))
        chosen = self._chosen(trainer.global_rank, [row["prompt_id"] for row in rows], pl_module.options.group_size)
        if columns:
            for number, tokens in per_token(seen, columns, chosen, pl_module.tokenizer).items():
                rows[number]["per_token"] = tokens
        parts = gather_objects((rows, chosen, seen.advantages[seen.rollout.response_mask].tolist()))
        log_dir = trainer.log_dir  # a collective, so every process has to call it
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        numbered = [[(row, number in chosen) for number, row in enumerate(rows)] for rows, chosen, _ in parts]
        every = take_turns(numbered, pl_module.options.group_size)
        if log_dir is not None:
            head = {"version": _VERSION, "iteration": iteration}
            lines = ({**head, **row} for row, written in every if written)
            append_lines(Path(log_dir, "rollouts.jsonl"), lines, compact=True)
        self._add_histograms(trainer, iteration, [row for row, _ in every], [x for *_, part in parts for x in part])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the responses to held-out prompts."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not isinstance(pl_module, PPOModule) or not training:
            return
        rows = take_turns(gather_objects(_rows(pl_module, pl_module.held_out_rows)))
        log_dir = trainer.log_dir  # a collective
        if trainer.is_global_zero and log_dir is not None and rows and not is_fast_dev_run(trainer):
            head = {"version": _VERSION, "iteration": batches_seen(trainer)}
            append_lines(Path(log_dir, "held_out.jsonl"), ({**head, **row} for row in rows), compact=True)

    def _chosen(self, rank: int, prompt_ids: Sequence[str], group_size: int) -> set[int]:
        """The numbers of the responses of this process, ``rank``, that are written. A collective.

        They are those with the lowest hashes of their prompts among the responses of all processes.
        """
        everyone = gather_objects(prompt_ids)
        addresses = [[(of, number) for number in range(len(ids))] for of, ids in enumerate(everyone)]
        order = sorted(take_turns(addresses, group_size), key=lambda address: everyone[address[0]][address[1]])
        return {number for of, number in order[: self.max_replies] if of == rank}

    @staticmethod
    def _add_histograms(
        trainer: Trainer, iteration: int, rows: Sequence[dict[str, Any]], advantages: Sequence[float]
    ) -> None:
        numbers: dict[str, Sequence[float | None]] = {
            name: [row[name] for row in rows] for name in ("reward", "kl", "value", "tokens")
        }
        numbers |= {f"factor_{name}": [row["factors"][name] for row in rows] for name in rows[0]["factors"]}
        numbers["advantage"] = advantages
        for logger in trainer.loggers:
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                for name, values in numbers.items():
                    if (drawable := _drawable(values)) is not None:
                        add_histogram(f"rollout/{name}", drawable, iteration)


def prompt_id(prompt: Sequence[Mapping[str, str]], turns: int = 1) -> str:
    """Names the messages ``prompt``, each with ``role`` and ``content``: see :func:`rlchat.conversation.messages_id`.

    If the policy answers several turns, the responses in a prompt are its own. They do not count, so that the same turn
    of a conversation has the same name in every iteration.
    """
    return messages_id([(m["role"], m["content"]) for m in prompt if turns == 1 or m["role"] != "assistant"])


def _rows(module: PPOModule, responses: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``responses`` with ``prompt_id``, and without numbers that are not finite or that mean nothing."""
    has_value = module.critic_kind != "none"
    return [
        {
            "prompt_id": prompt_id(row["prompt"], module.options.turns),
            **row,
            "kl": row["kl"] if math.isfinite(row["kl"]) else None,
            "value": row["value"] if has_value and math.isfinite(row["value"]) else None,
        }
        for row in responses
    ]


def _token_columns(module: PPOModule, seen: Iteration) -> dict[str, Tensor]:
    """The numbers per token by name, each [B, R]."""
    rollout = seen.rollout
    columns = {
        "logprob": rollout.old_logprobs,
        "kl": rollout.old_logprobs - rollout.ref_logprobs,
        "entropy": rollout.entropy,
        "advantage": seen.advantages,
    }
    return columns if module.critic_kind == "none" else {**columns, "value": rollout.values}


def _ratios(trainer: Trainer, module: PPOModule, seen: Iteration) -> Tensor:
    """[B, R] the ratio of the policy after the update to the policy before it. All processes have to call it."""
    rollout = seen.rollout
    with torch.no_grad(), trainer.precision_plugin.train_step_context():
        new = module.evaluate_in_parts(
            module.model, rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask
        )
    return (new.logprobs - rollout.old_logprobs).exp()


def per_token(
    seen: Iteration, columns: dict[str, Tensor], wanted: Iterable[int], tokenizer: ChatTokenizer
) -> dict[int, dict[str, list[Any]]]:
    """The tokens of the responses ``wanted`` by number: ``text``, and each of ``columns`` [B, R] by name."""
    rollout = seen.rollout
    flat = {name: column[rollout.response_mask].tolist() for name, column in columns.items()}
    ids = rollout.ids[rollout.sampled].tolist()
    places: dict[int, list[int]] = {number: [] for number in wanted}
    # Row by row, the n-th sampled token of [B, T] is the n-th True entry of the response mask [B, R].
    for place, number in enumerate(rollout.response_index[rollout.response_mask].tolist()):
        if number in places:
            places[number].append(place)
    return {
        number: {
            "text": token_texts([ids[place] for place in found], tokenizer),
            **{name: [rounded(numbers[place]) for place in found] for name, numbers in flat.items()},
        }
        for number, found in places.items()
    }


def token_texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """The text that each token completes, or the name of a token without text, such as the end of the turn.

    A character may be split between tokens. Then the last of them has it, and the text of the others is empty.
    """
    decoder = tokenizer.stream()
    texts = [decoder.push(token) if tokenizer.token_bytes(token) else tokenizer.token_name(token) for token in ids]
    texts[-1] += decoder.finish()
    return texts


def rounded(number: float) -> float | None:
    """``number`` with 4 significant digits; None if it is not finite, because JSON has no such number."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _drawable(values: Sequence[float | None]) -> Tensor | None:
    """The finite ``values``, clipped to the range that TensorBoard can draw; None if there is no finite value.

    TensorBoard's bins end at ±1e20, and it raises an error if no value falls into them.
    """
    numbers = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    finite = numbers[numbers.isfinite()]
    return finite.clamp(-_LARGEST, _LARGEST) if len(finite) else None
