"""Turns exceptions of Lightning and PyTorch about the user's options into errors of one sentence."""

from __future__ import annotations

import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException

from rlchat.errors import UserError
from rlchat.rewards import Factor, FactorError

# Lightning raises these when it checks options and the requirements of callbacks and loggers.
_REFUSALS = (MisconfigurationException, ValueError)
# Its callbacks, loggers and tuners also raise these, for example for a missing metric or package.
_REFUSALS_OF_PARTS = (RuntimeError, ImportError, NotImplementedError)
_PARTS = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.fabric.loggers",
    "lightning.pytorch.tuner",
)


def user_error_in(error: BaseException) -> UserError | None:
    """``error`` as an error for the user, or None if the user cannot fix it.

    The result is a :class:`UserError` that a library has wrapped, or a new one for an error of a library.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        if isinstance(inner, ImportError) and (module := _raised_in(inner)).startswith("lightning."):
            option = "trainer.logger" if module.startswith("lightning.pytorch.loggers") else "trainer"
            return UserError(f"{option}: {' '.join(str(inner).split())}")
        if (failure := _failed_factor(inner)) is not None:
            return failure
        inner = inner.__cause__ or inner.__context__
    text = " ".join(str(error).split())
    # PyTorch and Lightning raise these as RuntimeError or MisconfigurationException without more specific types, so
    # only the text distinguishes them.
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict"):
        return UserError(
            "ckpt_path: the shape of the model in the checkpoint differs from the options; leave out --config "
            "to use the configuration of the checkpoint, or train a new model"
        )
    if "val_check_interval" in text and "number of the training batches" in text:
        return UserError(
            "trainer.val_check_interval exceeds the number of training batches per epoch; set a fraction of the "
            "epoch (for example --trainer.val_check_interval 1.0), or lower --data.batch_size"
        )
    if isinstance(error, RuntimeError) and "Connection closed by peer" in text:
        return UserError(
            "another process of this run has stopped, so this one stops too; see the error of that process"
        )
    if "No supported gpu backend" in text:
        return UserError("trainer.accelerator gpu: torch finds no GPU on this machine; set --trainer.accelerator auto")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; specify a path that can be read and written")
    module = _raised_in(error)
    if isinstance(error, _REFUSALS) and _is_lightning(module):
        return UserError(f"trainer: {text}")
    if isinstance(error, _REFUSALS_OF_PARTS) and any(module.startswith(part) for part in _PARTS):
        return UserError(f"trainer: {text}")
    return None


def _failed_factor(error: BaseException) -> FactorError | None:
    """The error that names the reward factor whose constructor raised ``error``; None if none did.

    jsonargparse turns such an exception into a list of all options, in which its class and its place are lost.
    """
    trace = error.__traceback__
    while trace is not None and isinstance(error, Exception):
        factor = trace.tb_frame.f_locals.get("self")
        if isinstance(factor, Factor) and trace.tb_frame.f_code.co_name == "__init__":
            return FactorError.from_code(factor.name, factor.code, error.with_traceback(trace))
        trace = trace.tb_next
    return None


def _raised_in(error: BaseException) -> str:
    """The module whose code raised ``error``."""
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        where = str(frame.f_globals.get("__name__", ""))
    return where


def _is_lightning(module: str) -> bool:
    """Whether Lightning rejected an option, as opposed to a call from a module, for example ``self.log``."""
    return module.startswith("lightning.") and "logger_connector" not in module and "pytorch.core" not in module
