"""`rlchat fit|validate|test|predict`: LightningCLI over the three stages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlchat.best_model import BEST, LAST, BestModel
from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.data import OASST2DataModule
from rlchat.errors import UserError
from rlchat.ppo import PPOModule
from rlchat.predictions import Predictions
from rlchat.recipes import find_recipe
from rlchat.reward_model import RewardModelModule
from rlchat.sft import SFTModule

STAGES = {module.stage: module for module in (SFTModule, RewardModelModule, PPOModule)}
LOGS = "lightning_logs"


class RLChatCLI(LightningCLI):
    """LightningCLI with rlchat's callbacks always on, both loggers in one folder, and checkpoints by name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks under keys of their own, so that a user's ``trainer.callbacks`` replaces none of them."""
        parser.add_lightning_class_args(BestModel, "best_model")
        parser.add_lightning_class_args(SampleResponses, "sample_responses")
        parser.add_lightning_class_args(StatsPlot, "stats_plot")
        parser.add_lightning_class_args(Predictions, "predictions")

    def _parse_ckpt_path(self) -> None:
        """``best`` and ``last`` become files; the options stay what the command line says.

        LightningCLI's own would let the checkpoint's hyper-parameters override the flags, in silence.
        """
        options = self.config[self.config["subcommand"]]
        if options.get("ckpt_path") in ("best", "last"):
            run = newest_run(options["ckpt_path"], self._stage(options), _logs_folder(options))
            options["ckpt_path"] = str(run)
        elif options.get("ckpt_path") and not Path(options["ckpt_path"]).is_file():
            raise UserError(f"{options['ckpt_path']}: no such checkpoint; give a file, or `best` or `last`")

    def _stage(self, options: Namespace) -> str:
        return _stage_of(str(options["model"]["class_path"]))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """TensorBoard and CSV in one version folder, unless the configuration names loggers."""
        options = self.config[self.config["subcommand"]]
        if options["trainer"].get("logger") in (None, True):
            folder, stage = str(_logs_folder(options)), self._stage(options)
            board = TensorBoardLogger(folder, name=stage, default_hp_metric=False)
            kwargs["logger"] = [
                board,
                CSVLogger(folder, name=stage, version=board.version, flush_logs_every_n_steps=10),
            ]
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Nothing is unpickled from a checkpoint but tensors and plain values.
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def main(args: ArgsType = None) -> int:
    """Runs ``[command, *options]``; returns the exit code. Raises :class:`UserError`."""
    argv = list(sys.argv[1:] if args is None else args)
    run(argv)
    return 0


def run(argv: list[str]) -> RLChatCLI:
    """Runs ``[command, *options]`` and returns what it made: the trainer, the module, the data module."""
    _quieten()
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a user's own reward is a module beside where they work
    try:
        return RLChatCLI(
            model_class=L.LightningModule,
            datamodule_class=OASST2DataModule,
            subclass_mode_model=True,
            save_config_callback=SaveConfigCallback,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=with_recipes(argv),
        )
    except Exception as error:
        if (user_error := _user_error_in(error)) is not None and user_error is not error:
            raise user_error from error
        raise


def with_recipes(argv: list[str]) -> list[str]:
    """``argv`` with recipe names as files, and with the run's own configuration where only a checkpoint is named."""
    result: list[str] = []
    named = False
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c"):
            named = True
            result += ["--config", str(find_recipe(value if equals else next(words, "")))]
        else:
            result.append(word)
    checkpoint = _option(argv, "--ckpt_path")
    if not named and checkpoint is not None and "--model" not in argv:
        path = newest_run(checkpoint) if checkpoint in ("best", "last") else Path(checkpoint)
        config = path.parent.parent / "config.yaml"
        if config.is_file():
            result[1:1] = ["--config", str(config)]
    return result


def newest_run(which: str, stage: str | None = None, folder: Path = Path(LOGS)) -> Path:
    """The ``best`` or ``last`` checkpoint that was written most recently, of ``stage`` or of any.

    Raises :class:`UserError` where no run has left one.
    """
    name = {"best": BEST, "last": LAST}[which]
    found = folder.glob(f"{stage or '*'}/version_*/checkpoints/{name}")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no {name} under {folder / (stage or '')}; train first with `rlchat fit`, or give a file")
    return newest


def _logs_folder(options: Namespace) -> Path:
    return Path(options["trainer"].get("default_root_dir") or ".") / LOGS


def _stage_of(class_path: str) -> str:
    from jsonargparse.util import import_object

    return str(getattr(import_object(class_path), "stage", class_path.rsplit(".", 1)[-1]))


def _option(argv: list[str], name: str) -> str | None:
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == name:
            return value if equals else (argv[index + 1] if index + 1 < len(argv) else None)
    return None


def _user_error_in(error: BaseException | None) -> UserError | None:
    """The sentence for the user inside what a library wrapped around it."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _quieten() -> None:
    """Leaves on the terminal what the user can act on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rlchat").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard has just made it
        ".*does not have many workers.*",  # batches are made faster than they are used
        ".*The number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*treespec.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", message)
