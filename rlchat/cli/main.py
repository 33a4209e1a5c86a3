"""`rlchat fit|validate|test|predict`: LightningCLI over the three stages."""

from __future__ import annotations

import inspect
import json
import logging
import signal
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name as import_object
from typing import Any, get_args

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.alarms import Alarms
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.predictions import Predictions
from rlchat.callbacks.progress_bar import OneLineProgressBar
from rlchat.callbacks.rollout_log import RolloutLog
from rlchat.cli.option_errors import explain
from rlchat.cli.recipes import checked_recipe
from rlchat.cli.runs import LOGS, check_checkpoint, configuration_of, newest_run
from rlchat.data.datamodule import OASST2DataModule
from rlchat.distributed.strategies import AtomicCheckpointIO, check_strategy
from rlchat.errors import UserError
from rlchat.ppo.module import PPOModule
from rlchat.training.reward_model import RewardModelModule
from rlchat.training.sft import SFTModule

_log = logging.getLogger("rlchat")

COMMANDS = ("fit", "validate", "test", "predict")
STAGES = (SFTModule, RewardModelModule, PPOModule)
_USAGE = "rlchat {} --config RECIPE_OR_FILE [--data.path FILE [FILE ...]] [--GROUP.OPTION VALUE ...]"
_HELP = """\
Options come from the configuration, and a flag overrules it. Add --print_config to see all of them with their values.
What those of a stage mean: --model.help rlchat.SFTModule, rlchat.RewardModelModule or rlchat.PPOModule.
"""


class RLChatCLI(LightningCLI):
    """LightningCLI with rlchat's callbacks always on, both loggers in one folder, and checkpoints by name."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods, with what is no option: checkpoints are always loaded with ``weights_only=True``."""
        return {
            name: {*given, "weights_only"} for name, given in LightningCLI.subcommands().items() if name in COMMANDS
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks under keys of their own, so that a user's ``trainer.callbacks`` replaces none of them."""
        parser.add_lightning_class_args(BestModel, "best_model")
        parser.add_lightning_class_args(SampleResponses, "sample_responses")
        parser.add_lightning_class_args(StatsPlot, "stats_plot")
        parser.add_lightning_class_args(Predictions, "predictions")
        parser.add_lightning_class_args(Alarms, "alarms")
        parser.add_lightning_class_args(RolloutLog, "rollout_log")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Raises :class:`UserError` where jsonargparse would show the usage and exit."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            words = args if isinstance(args, list) else []
            raise explain(str(error), words, self._options(words[0] if words else "fit")) from error

    def _options(self, command: str) -> list[str]:
        """All flags of ``command``, with those of the modules' own options that jsonargparse knows by class only."""
        flags = [flag for action in self._parser(command)._actions for flag in action.option_strings]
        of_modules = {name for module in STAGES for name in inspect.signature(module).parameters}
        return [flag for flag in flags if not flag.endswith("+")] + [f"--model.{name}" for name in of_modules]

    def _parse_ckpt_path(self) -> None:
        """``best`` and ``last`` become files; the options stay what the command line says.

        LightningCLI's own would let the checkpoint's hyper-parameters override the flags, in silence.
        """
        options = self.config[self.config["subcommand"]]
        wanted = options.get("ckpt_path")
        if wanted is None:
            return
        module = import_object(str(options["model"]["class_path"]))
        path = Path(wanted)
        if wanted in ("best", "last"):
            path = newest_run(wanted, _stage_of(module), _logs_folder(options))
        check_checkpoint(path, module)
        if self.config["subcommand"] == "fit":
            _log.info("going on from %s", path)
        options["ckpt_path"] = str(path)

    def before_instantiate_classes(self) -> None:
        """Refuses what cannot train, before anything is loaded. Raises :class:`UserError`."""
        options = self.config[self.config["subcommand"]]
        module = import_object(str(options["model"]["class_path"]))
        check_strategy(options["trainer"])
        if isinstance(module, type) and issubclass(module, PPOModule):
            check_trainer_for_ppo(options["trainer"])
        if self.config["subcommand"] == "predict" and not is_overridden("predict_step", module, L.LightningModule):
            raise UserError(f"{module.__name__} has no replies to give; name the configuration of a chat model")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Both loggers in one folder, our progress bar, atomic checkpoints, unless the configuration names others."""
        options = self.config[self.config["subcommand"]]
        given = self._get(self.config_init, "trainer")
        if given["logger"] in (None, True):
            folder = str(_logs_folder(options))
            stage = _stage_of(import_object(str(options["model"]["class_path"])))
            board = TensorBoardLogger(folder, name=stage, default_hp_metric=False)
            kwargs["logger"] = [
                board,
                CSVLogger(folder, name=stage, version=board.version, flush_logs_every_n_steps=10),
            ]
        plugins = _as_list(given["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = _as_list(given["callbacks"])
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(OneLineProgressBar())
        return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks, "plugins": plugins})

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:  # Lightning's own table has a column for each loader, with the same numbers
            self.shows_figures = kwargs["verbose"]
            kwargs["verbose"] = False
        # Nothing is unpickled from a checkpoint but tensors and plain values.
        return {**kwargs, "weights_only": True}

    def after_fit(self) -> None:
        """Says so where the run had already come to its end."""
        if self._get(self.config, "ckpt_path") and not self.trainer.callback_metrics:
            epochs = self.trainer.max_epochs
            _log.info("nothing was left to train in %s epochs; give more with --trainer.max_epochs", epochs)

    def after_validate(self) -> None:
        """Shows the figures."""
        self._show_figures("val/", "validation")

    def after_test(self) -> None:
        """Shows the figures."""
        self._show_figures("test/", "test")

    def _show_figures(self, prefix: str, split: str) -> None:
        if not (self.shows_figures and self.trainer.is_global_zero):
            return
        table = Table("", f"{split} conversations", title_justify="left")
        table.columns[1].justify = "right"
        for name, value in sorted(self.trainer.callback_metrics.items()):
            if name.startswith(prefix):
                table.add_row(name.removeprefix(prefix), f"{float(value):.4g}")
        get_console().print(table)


class SaveConfig(SaveConfigCallback):
    """Keeps the configuration of a run in its folder; a run without loggers has none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes ``config.yaml``, from which ``rlchat fit --config`` repeats the run."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def main(args: ArgsType = None) -> int:
    """Runs ``[command, *options]``; returns the exit code. Raises :class:`UserError`."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        run(argv)
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except SystemExit as stop:  # --help and --print_config; and Lightning, once it has tidied up after Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        return int(stop.code or 0)
    return 0


def run(argv: list[str]) -> RLChatCLI:
    """Runs ``[command, *options]`` and returns what it made: the trainer, the module, the data module."""
    _quieten(argv)
    _integers_first()
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a user's own reward is a module beside where they work
    try:
        return RLChatCLI(
            model_class=L.LightningModule,
            datamodule_class=OASST2DataModule,
            subclass_mode_model=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                **{name: {"usage": _USAGE.format(name), "description": _HELP} for name in COMMANDS},
            },
            args=with_recipes(argv),
        )
    except Exception as error:
        if (user_error := user_error_in(error)) is not None and user_error is not error:
            raise user_error from error
        raise


def with_recipes(argv: list[str]) -> list[str]:
    """``argv`` as jsonargparse takes it.

    Recipes become files, several values after ``--data.path`` a list, and where a checkpoint is all that is named, the
    configuration of its run is added.
    """
    result: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c"):
            value = value if equals else words.popleft() if words else ""
            result += ["--config", str(checked_recipe(value))]
        elif word == "--data.path":
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.popleft())
            result += [word, *values] if len(values) < 2 else [f"{word}={json.dumps(values)}"]
        else:
            result.append(word)
    checkpoint = _option(argv, "--ckpt_path")
    if checkpoint is not None and "--config" not in result and _option(argv, "--model") is None:
        path = newest_run(checkpoint) if checkpoint in ("best", "last") else Path(checkpoint)
        result[1:1] = ["--config", str(configuration_of(path))]
    return result


def check_trainer_for_ppo(options: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` for options of the trainer that cannot be had where a module optimizes by hand."""
    if options.get("gradient_clip_val"):
        raise UserError("trainer.gradient_clip_val: PPO clips by itself; set --model.max_grad_norm instead")
    if (options.get("max_steps") or -1) > 0:
        raise UserError(
            "trainer.max_steps: PPO takes many optimizer steps in an iteration, and its learning rate goes by "
            "iterations; set --trainer.max_epochs and --trainer.limit_train_batches instead"
        )
    if (options.get("accumulate_grad_batches") or 1) > 1:
        raise UserError(
            "trainer.accumulate_grad_batches: PPO takes its steps by itself; set --model.micro_batch_size instead"
        )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _logs_folder(options: Namespace) -> Path:
    return Path(options["trainer"].get("default_root_dir") or ".") / LOGS


def _stage_of(module: Any) -> str:
    return str(getattr(module, "stage", module.__name__))


def _option(argv: list[str], name: str) -> str | None:
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == name:
            return value if equals else (argv[index + 1] if index + 1 < len(argv) else None)
    return None


def user_error_in(error: BaseException) -> UserError | None:
    """The sentence for the user: inside what a library wrapped around it, or made of what Lightning itself refused."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        inner = inner.__cause__ or inner.__context__
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict"):
        return UserError(
            "ckpt_path: the checkpoint is of a model of another shape than the options describe; leave out --config, "
            "so that its own is used, or train anew"
        )
    if "val_check_interval" in text and "number of the training batches" in text:
        return UserError(
            "trainer.val_check_interval: the data gives fewer batches an epoch than that; give a share of the epoch, "
            "as --trainer.val_check_interval 1.0, or lower --data.batch_size"
        )
    if isinstance(error, RuntimeError) and "Connection closed by peer" in text:
        return UserError("another process of this run has stopped, and so does this one; see what it said")
    if "No supported gpu backend" in text:
        return UserError("trainer.accelerator gpu: torch finds no GPU on this machine; set --trainer.accelerator auto")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}; give a place that can be read and written")
    if isinstance(error, MisconfigurationException | ValueError) and _raised_by_lightning(error):
        return UserError(f"trainer: {text}")
    return None


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refused something, as it does options that cannot be; not a call of a module's."""
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        where = str(frame.f_globals.get("__name__", ""))
    return where.startswith("lightning.") and "logger_connector" not in where and "pytorch.core" not in where


class _BesideProgressBar(logging.Handler):
    """Writes to what standard error is at that moment: while a bar is drawn, rich's, which keeps the two apart."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _integers_first() -> None:
    """Makes ``--trainer.limit_train_batches 1`` one batch, and not 1.0, which is all of them.

    The type of such options is ``Union[int, float, None]``, of which jsonargparse takes the first that fits. ``typing``
    keeps one object for all unions of the same members, in the order of whoever asked first: some library or other.
    """
    annotations = L.Trainer.__init__.__annotations__
    for name, annotation in annotations.items():
        if set(get_args(annotation)) == {int, float, type(None)}:
            annotations[name] = int | float | None


def _quieten(argv: list[str]) -> None:
    """Leaves on the terminal what the user can act on."""
    logging.basicConfig(format="%(message)s", handlers=[_BesideProgressBar()])
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # not where in the source it was raised
    # What the data holds is news in training; who measures or predicts has seen it.
    _log.setLevel(logging.INFO if argv[:1] == ["fit"] else logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("huggingface_hub", "transformers"):  # retries, and which weights a headless model leaves out
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()  # of reading weights; downloads keep theirs
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard has just made it
        ".*does not have many workers.*",  # batches are made faster than they are used
        ".*The number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*treespec.*",
        ".*Couldn't infer the batch indices.*",  # we know the order of our own batches
        ".*Total length of .* across ranks is zero.*",  # data with prompts alone
        ".*lr_scheduler.step.*before.*optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", message)
