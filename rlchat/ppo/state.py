"""The state that PPO saves in addition to tensors: counters in checkpoints, and a report if the run stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlchat.errors import NonFiniteError
from rlchat.utils.files import append_lines

if TYPE_CHECKING:
    from rlchat.ppo.checkpoint import ResumableModule
    from rlchat.ppo.module import PPOModule


def saved_counters(module: ResumableModule) -> dict[str, Any]:
    """The entry ``rlchat`` of a checkpoint."""
    return {
        "iterations": module.iterations,
        "episodes": module.episodes,
        "kl_coef": module.kl_coef,
    }


def restore_counters(module: ResumableModule, saved: dict[str, Any]) -> None:
    """The inverse of :func:`saved_counters`. A fixed kl_coef is taken from the options.

    Version 0.1 also saved ``tokens``, which nothing uses.
    """
    module.iterations = saved["iterations"]
    module.episodes = saved["episodes"]
    if module.adaptive_kl is not None:
        module.kl_coef = module.adaptive_kl.coef = saved["kl_coef"]


def save_last_good(module: PPOModule) -> Path:
    """Writes the last good weights as a model file; returns its path. A collective."""
    module.good_weights.restore(module)
    path = Path(module.trainer.log_dir or ".") / "last_good.pt"  # log_dir is a collective
    module.save_bundle(path)
    return path


@contextmanager
def saving_last_good(module: PPOModule) -> Iterator[None]:
    """Saves the last good weights if the code in the context finds that the current ones have diverged.

    Raises:
        NonFiniteError: in this case; the error names the file.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"iteration {module.iterations + 1}: the policy's logits are not finite, because the last update corrupted "
            f"its weights; the last good weights are in {save_last_good(module)}; lower --model.learning_rate, or "
            f"check the rewards"
        ) from error


def stop_run(module: PPOModule) -> NoReturn:
    """Writes the responses of this iteration and the last good weights, and raises. A collective.

    Raises:
        NonFiniteError: always; it names the loss or gradient that is not finite, and both files.
    """
    assert module.last_iteration is not None
    folder = Path(module.trainer.log_dir or ".")  # a collective, so all processes must call it
    dump = folder / f"not_finite_{module.global_rank}.jsonl"
    append_lines(dump, module.last_iteration.rollout.rows(module.last_iteration.factors))
    raise NonFiniteError(
        f"iteration {module.iterations + 1}: {module.guard.last_culprit} was not finite in "
        f"{module.guard.skipped_in_a_row} optimizer steps in a row; the responses are in {dump}, the last good weights "
        f"in {save_last_good(module)}; lower --model.learning_rate, or check the rewards"
    )
