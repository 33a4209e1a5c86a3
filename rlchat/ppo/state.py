"""What PPO saves beside tensors: counters in checkpoints, and a report if the run stops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlchat.errors import UserError
from rlchat.utils.files import append_lines

if TYPE_CHECKING:
    from rlchat.ppo.module import PPOModule


def saved_counters(module: PPOModule) -> dict[str, Any]:
    """The entry ``rlchat`` of a checkpoint."""
    return {
        "iterations": module.iterations,
        "episodes": module.episodes,
        "kl_coef": module.kl_coef,
        "skipped_steps": module.guard.skipped_steps,
        "skipped_in_a_row": module.guard.skipped_in_a_row,
    }


def restore_counters(module: PPOModule, saved: dict[str, Any]) -> None:
    """The inverse of :func:`saved_counters`. A fixed kl_coef stays that of the options.

    Version 0.1 also saved ``tokens``, which nothing uses.
    """
    module.iterations = saved["iterations"]
    module.episodes = saved["episodes"]
    module.guard.skipped_steps = saved["skipped_steps"]
    module.guard.skipped_in_a_row = saved["skipped_in_a_row"]
    if module.adaptive_kl is not None:
        module.kl_coef = module.adaptive_kl.coef = saved["kl_coef"]


def stop_run(module: PPOModule) -> NoReturn:
    """Writes the responses of this iteration, and a checkpoint if there is none, and raises. A collective.

    Raises:
        UserError: always; it names the loss or gradient that is not finite, and both files.
    """
    assert module.last_iteration is not None
    folder = Path(module.trainer.log_dir or ".")  # a collective, so all processes must call it
    dump = folder / f"not_finite_{module.global_rank}.jsonl"
    append_lines(dump, module.last_iteration.rollout.rows(module.last_iteration.factors))
    saved = getattr(module.trainer.checkpoint_callback, "last_model_path", "")
    if not saved:  # skipped steps have changed no weight, so the present state is as good as before them
        saved = str(folder / "last_good.ckpt")
        module.trainer.save_checkpoint(saved)
    raise UserError(
        f"iteration {module.iterations + 1}: {module.guard.culprit} was not finite in "
        f"{module.guard.skipped_in_a_row} optimizer steps in a row; the responses are in {dump}, the last state in "
        f"{saved}; lower --model.learning_rate, or check the rewards"
    )
