"""Selects and formats the messages of libraries that reach the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import PurePath

from transformers.utils.logging import disable_progress_bar

_LIGHTNING = "lightning"

# Lightning's modules whose messages the user wants to see: the reasons of EarlyStopping and Timer, a
# profiler's report, the result of a tuner, and the hint about tensor cores.
_INFORMATIVE = ("pytorch/callbacks", "pytorch/profilers", "pytorch/tuner", "fabric/accelerators")

_ROUTINE_WARNINGS = (
    ".*args parameter is intended to run from within Python.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard has just created it
    ".*does not have many workers.*",  # creating batches is faster than training
    ".*The number of training batches.*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*treespec.*",
    ".*Couldn't infer the batch indices.*",  # the order of rlchat's batches is known
    ".*Total length of .* across ranks is zero.*",  # data with prompts only
    ".*lr_scheduler.step.*before.*optimizer.step.*",
)


def configure_messages(command: str) -> None:
    """Hides messages of libraries that the user can do nothing about, and shows the others on standard error."""
    handler = _BesideProgressBar()
    handler.addFilter(is_informative)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of source
    # The summary of the data is useful before training, and redundant before a test or prediction.
    logging.getLogger("rlchat").setLevel(logging.INFO if command == "fit" else logging.WARNING)
    for name in (_LIGHTNING, "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for lightnings_own in [*logger.handlers]:  # it would print everything a second time
            logger.removeHandler(lightnings_own)
        logger.propagate = True
    for name in ("huggingface_hub", "transformers"):  # retries, unused weights of a head
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()  # of loading weights; downloads keep theirs
    for message in _ROUTINE_WARNINGS:
        warnings.filterwarnings("ignore", message)


class _BesideProgressBar(logging.Handler):
    """Looks up standard error for each record, because rich replaces it while a progress bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def is_informative(record: logging.LogRecord) -> bool:
    """Whether ``record`` is more than a routine message of Lightning."""
    if record.levelno > logging.INFO or record.name.partition(".")[0] != _LIGHTNING:
        return True
    # All calls of rank_zero_info share one logger, so only the file of the call distinguishes them.
    return PurePath(record.pathname).parent.as_posix().endswith(_INFORMATIVE)
