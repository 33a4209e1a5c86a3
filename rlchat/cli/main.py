"""`rlchat fit|validate|test|predict`: LightningCLI over the stages."""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from argparse import ArgumentError
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name as import_object
from typing import Any, cast, get_args

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import LightningEnum
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import get_console
from rich.table import Table

from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.alarms import Alarms
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.predictions import Predictions
from rlchat.callbacks.progress_bar import OneLineProgressBar
from rlchat.callbacks.rollout_log import RolloutLog
from rlchat.callbacks.run_state import is_fast_dev_run
from rlchat.cli.data_class import BatchCheck, check_data_needs, with_data_class
from rlchat.cli.hyperparameters import HyperparameterLog, options_to_log
from rlchat.cli.library_errors import user_error_in
from rlchat.cli.messages import configure_messages
from rlchat.cli.option_errors import explain, ignored_variables
from rlchat.cli.recipes import checked_recipe
from rlchat.cli.runs import (
    LOGS,
    CheckpointRecord,
    check_checkpoint,
    configuration_of,
    newest_run,
    record_versions,
)
from rlchat.cli.settings import with_home, with_own_tokenizer
from rlchat.cli.trainer_options import check_checkpoint_keyword, check_trainer, check_trainer_for_ppo
from rlchat.data.datamodule import OASST2DataModule
from rlchat.distributed.collectives import is_first
from rlchat.distributed.sharding import to_be_sharded
from rlchat.distributed.strategies import AtomicCheckpointIO, check_strategy, is_fsdp2
from rlchat.errors import UserError
from rlchat.ppo.module import PPOModule
from rlchat.training.base import StageModule
from rlchat.training.dpo import DPOModule
from rlchat.training.reward_model import RewardModelModule
from rlchat.training.sft import SFTModule

_log = logging.getLogger("rlchat")

COMMANDS = ("fit", "validate", "test", "predict")
STAGES = (SFTModule, RewardModelModule, PPOModule, DPOModule)
CALLBACKS = {
    "best_model": BestModel,
    "sample_responses": SampleResponses,
    "stats_plot": StatsPlot,
    "predictions": Predictions,
    "alarms": Alarms,
    "rollout_log": RolloutLog,
}
_SHORT = {"--best_of": "--predictions.best_of", "--checks": "--alarms.checks"}
_USAGE = "rlchat {} --config RECIPE_OR_FILE [--data.path FILE [FILE ...]] [--GROUP.OPTION VALUE ...]"
_HELP = """\
The configuration sets the options; flags override it. Add --print_config to see all options with their values.
Help on the options of a stage: --model.help rlchat.SFTModule, rlchat.RewardModelModule, rlchat.DPOModule or
rlchat.PPOModule.
"""


class RLChatCLI(LightningCLI):
    """LightningCLI with rlchat's callbacks always on, both loggers in one folder, and checkpoints by name."""

    @property
    def data_class(self) -> type[L.LightningDataModule]:
        """The class of the data module."""
        return cast(type[L.LightningDataModule], self.datamodule_class)

    def __init__(self, *, commands: Sequence[str], **options: Any) -> None:
        self._commands = commands
        super().__init__(**options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """The Trainer's methods among ``commands``, and their arguments that are not options.

        ``weights_only`` is not an option because checkpoints are always loaded with ``weights_only=True``.
        """
        known = LightningCLI.subcommands()
        return {name: {*known[name], "weights_only"} for name in self._commands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds each callback under a separate key, so that a user's ``trainer.callbacks`` does not replace it."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Raises :class:`UserError` instead of showing the usage and exiting, as jsonargparse does."""
        words = args if isinstance(args, list) else []
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            groups: dict[str, type] = {"trainer": L.Trainer, "data": self.data_class, **CALLBACKS}
            raise explain(words, groups, self._options(words[0] if words else "fit"), str(error)) from error
        self.config = with_home(self.config)
        for variable, reason in ignored_variables(os.environ, words, self._options(words[0])) if words else ():
            _log.warning("the environment variable %s has no effect: %s", variable, reason)

    def _options(self, command: str) -> list[str]:
        """All flags of ``command``, with the options of the stages, which jsonargparse resolves by class only."""
        flags = [flag for action in self._parser(command)._actions for flag in action.option_strings]
        of_modules = {name for module in STAGES for name in inspect.signature(module).parameters}
        return [flag for flag in flags if not flag.endswith("+")] + [f"--model.{name}" for name in of_modules]

    def _parse_ckpt_path(self) -> None:
        """Replaces ``best`` and ``last`` by the path of a file; the options of the command line are unchanged.

        LightningCLI's method would silently override the flags with the hyperparameters in the checkpoint.
        """
        options = self.config[self.config["subcommand"]]
        wanted = options.get("ckpt_path")
        if wanted is None:
            return
        check_checkpoint_keyword(wanted)
        module = import_object(str(options["model"]["class_path"]))
        path = Path(wanted)
        if wanted in ("best", "last"):
            path = newest_run(wanted, _stage_of(module), _logs_folder(options))
        check_checkpoint(path, module)
        if self.config["subcommand"] == "fit":
            _log.info("resuming from %s", path)
        elif is_first():
            print(f"checkpoint: {path}")
        options["ckpt_path"] = str(path)

    def before_instantiate_classes(self) -> None:
        """Raises :class:`UserError` for options that do not work together, before anything is loaded."""
        options = self.config[self.config["subcommand"]]
        module = import_object(str(options["model"]["class_path"]))
        if isinstance(module, type) and issubclass(module, StageModule):
            # rlchat's stages log values that are already reduced over all processes.
            warnings.filterwarnings("ignore", ".*It is recommended to use .*sync_dist=True.*")
        check_strategy(options["trainer"])
        check_trainer(options["trainer"])
        if isinstance(module, type) and issubclass(module, PPOModule):
            check_trainer_for_ppo(options["trainer"])
        check_data_needs(module, self.data_class)
        if self.config["subcommand"] == "predict" and not is_overridden("predict_step", module, L.LightningModule):
            raise UserError(
                f"{module.__name__} does not generate responses; set --config to the configuration of a chat model"
            )

    def instantiate_classes(self) -> None:
        """With FSDP2, the networks of the module get their weights on the first process only, before they are sharded.

        The processes have not joined yet. Their rank is known from the environment, except that the main process of
        each further machine may take itself for the first one; its weights will be replaced.
        """
        sharded = is_fsdp2(self.config[self.config["subcommand"]]["trainer"])
        first = getattr(rank_zero_only, "rank", 0) == 0
        with to_be_sharded(first) if sharded else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds both loggers in one folder, a progress bar and atomic checkpoints, unless others are configured."""
        options = self.config[self.config["subcommand"]]
        given = self._get(self.config_init, "trainer")
        stage = _stage_of(import_object(str(options["model"]["class_path"])))
        command = self.config["subcommand"]
        if given["logger"] in (None, True) and command == "predict":
            kwargs["logger"] = False  # it has no metrics
        elif given["logger"] in (None, True):
            folder = str(_logs_folder(options))
            name = stage if command == "fit" else f"{stage}_{command}"  # separate from the training runs
            board = TensorBoardLogger(folder, name=name, default_hp_metric=False)
            kwargs["logger"] = [
                board,
                CSVLogger(folder, name=name, version=board.version, flush_logs_every_n_steps=10),
            ]
        plugins = _as_list(given["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = [*_as_list(given["callbacks"]), CheckpointRecord(stage)]
        if self.subclass_mode_data:
            callbacks.append(BatchCheck())
        if given["enable_autolog_hparams"]:
            callbacks.append(HyperparameterLog(options_to_log(options)))
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(OneLineProgressBar())
        return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks, "plugins": plugins})

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:  # Lightning's table repeats the same numbers in one column per loader
            self.prints_metrics = kwargs["verbose"]
            kwargs["verbose"] = False
        # Only tensors and plain values are unpickled from a checkpoint.
        return {**kwargs, "weights_only": True}

    def after_fit(self) -> None:
        """Reports why EarlyStopping ended the run, and if a resumed run was already complete."""
        for callback in self.trainer.early_stopping_callbacks:
            if callback.stopping_reason_message and not callback.verbose and is_first():  # verbose: it has told
                _log.info("EarlyStopping: %s", callback.stopping_reason_message)
        if self._get(self.config, "ckpt_path") and not self.trainer.callback_metrics:
            epochs = self.trainer.max_epochs
            _log.info("the run is already complete after %s epochs; raise --trainer.max_epochs to continue it", epochs)

    def after_validate(self) -> None:
        """Prints the validation metrics."""
        self._print_metrics("val/", "validation split")

    def after_test(self) -> None:
        """Prints the test metrics."""
        self._print_metrics("test/", "held-out test split")

    def _print_metrics(self, prefix: str, split: str) -> None:
        if not (self.prints_metrics and self.trainer.is_global_zero):
            return
        logged = sorted(self.trainer.callback_metrics.items())
        # A module of the user may log metrics under any names.
        metrics = [(name.removeprefix(prefix), value) for name, value in logged if name.startswith(prefix)] or logged
        if not metrics:
            _log.warning("there are no metrics: the %s has no rows for this stage, or the model logs nothing", split)
            return
        table = Table("metric", split, title_justify="left")
        table.columns[1].justify = "right"
        for name, value in metrics:
            table.add_row(name, f"{float(value):.4g}")
        get_console().print(table)


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a run and its versions in its log folder. A run without loggers has no log folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes ``config.yaml``; ``rlchat fit --config`` with this file repeats the run."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)
            folder = trainer.log_dir  # a collective
            if folder is not None and trainer.is_global_zero and not is_fast_dev_run(trainer):
                record_versions(Path(folder))


def main(args: ArgsType = None) -> int:
    """Runs ``[command, *options]``; returns the exit code. Raises :class:`UserError`."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        run(argv)
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except SystemExit as stop:  # from --help, --print_config, and Lightning after it has handled Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        return int(stop.code or 0)
    return 0


def run(argv: list[str]) -> RLChatCLI:
    """Runs ``[command, *options]``; the result has the trainer, the module and the data module."""
    configure_messages(argv[0] if argv else "")
    _integers_first()
    # Some defaults of Lightning, such as Timer's interval, are members of an enumeration, which YAML cannot write.
    yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, member: dumper.represent_str(member.value))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # so that a user's reward in the working directory can be imported
    scratch = tempfile.TemporaryDirectory(prefix="rlchat-")
    try:
        words, data_class = with_data_class(with_own_tokenizer(with_recipes(argv)), Path(scratch.name))
        # Lightning would build a parser for each command, which takes a second.
        commands = [name for name in COMMANDS if name in words[:1]] or COMMANDS
        return RLChatCLI(
            commands=commands,
            model_class=L.LightningModule,
            datamodule_class=data_class or OASST2DataModule,
            subclass_mode_model=True,
            subclass_mode_data=data_class is not None,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "default_env": True,  # PL_FIT__BEST_MODEL__FOLDER=x sets --best_model.folder
                **{name: {"usage": _USAGE.format(name), "description": _HELP} for name in commands},
            },
            args=words,
        )
    except Exception as error:
        if (user_error := user_error_in(error)) is not None and user_error is not error:
            raise user_error from error
        raise
    finally:
        scratch.cleanup()


def with_recipes(argv: list[str]) -> list[str]:
    """``argv`` in the form that jsonargparse expects.

    Recipes become the paths of their files, short options become whole ones, and several values after ``--data.path``
    become one list. If the command line sets a checkpoint and no configuration, that of the checkpoint's run is added.
    """
    result: list[str] = []
    words = deque(argv)
    while words:
        flag, equals, value = words.popleft().partition("=")
        flag = _SHORT.get(flag, flag)
        word = flag + equals + value
        if flag in ("--config", "-c"):
            value = value if equals else words.popleft() if words else ""
            result += ["--config", str(checked_recipe(value))]
        elif word == "--data.path":
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.popleft())
            quoted = len(values) > 1 or any(map(_is_comment, values))
            result += [f"{word}={json.dumps(values)}"] if quoted else [word, *values]
        elif flag == "--data.path" and _is_comment(value):
            result.append(f"{flag}={json.dumps([value])}")
        else:
            result.append(word)
    checkpoint = _option(argv, "--ckpt_path")
    if checkpoint is not None and "--config" not in result and _option(argv, "--model") is None:
        path = newest_run(checkpoint) if checkpoint in ("best", "last") else Path(checkpoint)
        result[1:1] = ["--config", str(configuration_of(path))]
    return result


def _is_comment(path: str) -> bool:
    """Whether YAML would read a part of ``path`` as a comment, as in ``#1.jsonl``; not for a list in YAML's syntax."""
    return "#" in path and not path.startswith("[")


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


def _integers_first() -> None:
    """Makes ``--trainer.limit_train_batches 1`` mean one batch instead of 1.0, which is all of them.

    The type of such options is ``Union[int, float, None]``, and jsonargparse takes the first member that fits. But
    ``typing`` caches one object for all unions of the same members, in the order of the library that asked first.
    """
    annotations = L.Trainer.__init__.__annotations__
    for name, annotation in annotations.items():
        if set(get_args(annotation)) == {int, float, type(None)}:
            annotations[name] = int | float | None
