"""BestModel: model files and checkpoints of a run, and resuming from them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.callbacks.best_model import BestModel
from rlchat.errors import UserError


class Scripted(L.LightningModule):
    """Validates with ``scores``, one after another; its model file states the number of batches before it."""

    bundle_name = "model.pt"
    monitor = ("val/score", "max")

    def __init__(self, scores: Sequence[float | None], mode: str = "max") -> None:
        super().__init__()
        self.monitor = ("val/score", mode)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.scores = scores
        self.validations = 0
        self.batches = 0
        self.log_more = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches += 1
        return (self.weight - 1) ** 2

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.log("val/score", 1e6)
            return
        score = self.scores[self.validations]
        self.validations += 1
        if score is not None:
            self.log("val/score", score)
            if self.log_more:
                self.log("val/score_loss", -score)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["counts"] = [self.validations, self.batches]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validations, self.batches = checkpoint["counts"]

    def save_bundle(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"after {self.batches} batches")


class Looks(L.Callback):
    """Records before each batch after how many batches ``last.ckpt`` was written; 0 if there is none."""

    def __init__(self, folder: Path) -> None:
        self.last = folder / "last.ckpt"
        self.seen: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(counts(self.last)[1] if self.last.exists() else 0)


class Keeps(L.Callback):
    """Copies ``last.ckpt`` before the batch that follows ``after`` batches."""

    def __init__(self, folder: Path, after: int) -> None:
        self.last, self.kept, self.after = folder / "last.ckpt", folder / "kept.ckpt", after

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if module.batches == self.after:
            shutil.copy(self.last, self.kept)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.zeros(batches, 1), batch_size=1)  # type: ignore[arg-type]


def run(
    folder: Path,
    module: Scripted,
    best: BestModel,
    epochs: int,
    batches: int = 2,
    *,
    callbacks: Sequence[L.Callback] = (),
    validate: bool = True,
    resume: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """A fit that validates after each epoch of ``batches``; checkpoints go to ``folder``/run/checkpoints."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        default_root_dir=folder / "run",
        callbacks=[best, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **options},
    )
    trainer.fit(module, loader(batches), loader(1) if validate else None, ckpt_path=resume, weights_only=True)
    return trainer


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "checkpoints"


def counts(path: Path) -> list[int]:
    """Validations and batches that the checkpoint at ``path`` was written after."""
    return torch.load(path, weights_only=True)["counts"]


@pytest.mark.parametrize(
    ("mode", "scores", "best_after"),
    [
        ("max", [1.0, 3.0, 2.0], 4),
        ("max", [-3.0, -2.0, -1.0], 6),
        ("max", [2.0, 2.0, 2.0], 2),  # equal scores are no improvement
        ("min", [3.0, 1.0, 2.0], 4),
        ("min", [1.0, 2.0, 3.0], 2),
        ("max", [None, 1.0, None], 4),  # validations without the metric
        ("max", [1.0, float("nan"), 0.5], 2),
        ("max", [float("nan"), 1.0, float("nan")], 4),  # a NaN is not the best, not even the first time
        ("min", [float("nan"), float("inf"), 1.0], 6),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:val/score is (nan|inf):UserWarning")
def test_the_model_file_is_the_best_model(
    tmp_path: Path, mode: str, scores: list[float | None], best_after: int
) -> None:
    bundles = tmp_path / "checkpoints"
    best = BestModel(str(bundles))
    run(tmp_path, Scripted(scores, mode), best, epochs=3)
    assert (bundles / "model.pt").read_text() == f"after {best_after} batches"
    assert list(bundles.iterdir()) == [bundles / "model.pt"]
    assert best.bundle_path == str(bundles / "model.pt")
    assert sorted(p.name for p in checkpoints(tmp_path).iterdir()) == ["best.ckpt", "last.ckpt"]
    assert counts(checkpoints(tmp_path) / "best.ckpt")[1] == best_after
    assert counts(checkpoints(tmp_path) / "last.ckpt") == [3, 6]


@pytest.mark.filterwarnings("ignore:the previous run selected:UserWarning")
def test_a_resumed_run_with_another_selection_metric_starts_its_comparison_again(tmp_path: Path) -> None:
    """The best score was 3 by val/score; by another metric the first validation after the resume is the best."""
    run(tmp_path, Scripted([3.0]), BestModel(str(tmp_path / "a")), epochs=1)
    module = Scripted([3.0, 1.0])
    best = BestModel(str(tmp_path / "b"), select_by="val/score_loss")
    module.log_more = True
    run(tmp_path, module, best, epochs=2, resume=checkpoints(tmp_path) / "last.ckpt")
    assert (best.monitor, best.mode) == ("val/score_loss", "min")
    assert best.best_model_score == -1.0
    assert (tmp_path / "b" / "model.pt").read_text() == "after 4 batches"


def test_the_sanity_check_does_not_count(tmp_path: Path) -> None:
    best = BestModel(str(tmp_path))
    run(tmp_path, Scripted([1.0]), best, epochs=1, num_sanity_val_steps=1)
    assert best.best_model_score == 1.0


def test_an_earlier_model_file_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("of an earlier run")
    run(tmp_path, Scripted([1.0, 2.0]), BestModel(str(tmp_path)), epochs=2)
    older = list(tmp_path.glob("model.*.pt"))
    assert [p.read_text() for p in older] == ["of an earlier run"]  # once: the run does not rename its own file
    assert (tmp_path / "model.pt").read_text() == "after 4 batches"
    run(tmp_path, Scripted([1.0]), BestModel(str(tmp_path)), epochs=1)
    found = sorted(p.read_text() for p in tmp_path.glob("model*.pt"))
    assert found == ["after 2 batches", "after 4 batches", "of an earlier run"]


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 0, 2, 2, 4]), (3, [0, 0, 0, 3, 3]), (0, [0, 0, 0, 0, 0])])
def test_last_is_written_every_so_many_batches(tmp_path: Path, every: int, expected: list[int]) -> None:
    looks = Looks(checkpoints(tmp_path))
    run(tmp_path, Scripted([1.0]), BestModel(str(tmp_path), every), epochs=1, batches=5, callbacks=[looks])
    assert looks.seen == expected
    assert counts(checkpoints(tmp_path) / "last.ckpt") == [1, 5]  # and after the validation


def test_last_counts_over_epochs(tmp_path: Path) -> None:
    looks = Looks(checkpoints(tmp_path))
    run(tmp_path, Scripted([]), BestModel(str(tmp_path), 5), 3, callbacks=[looks], validate=False)
    assert looks.seen == [0, 0, 0, 0, 0, 5]
    assert counts(checkpoints(tmp_path) / "last.ckpt") == [0, 6]  # and at the end


@pytest.mark.parametrize("options", [{"max_steps": 5, "val_check_interval": 2}, {"limit_val_batches": 0}])
def test_last_is_written_at_the_end_though_no_validation_follows(tmp_path: Path, options: dict[str, Any]) -> None:
    run(tmp_path, Scripted([1.0, 2.0, 3.0]), BestModel(str(tmp_path), 0), epochs=1, batches=5, **options)
    assert counts(checkpoints(tmp_path) / "last.ckpt")[1] == 5


class Breaks(L.Callback):
    """Makes the weights NaN after the third batch, as a destructive optimizer step does."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.batches == 3:
            module.weight.data.fill_(float("nan"))


def test_a_model_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    bundles, scores = tmp_path / "bundles", [1.0, 2.0, 3.0]
    run(tmp_path, Scripted(scores), BestModel(str(bundles), 1), epochs=3, callbacks=[Breaks()])
    assert (bundles / "model.pt").read_text() == "after 2 batches"
    assert [p.name for p in bundles.iterdir()] == ["model.pt"]
    for name in ("best.ckpt", "last.ckpt"):
        state = torch.load(checkpoints(tmp_path) / name, weights_only=True)["state_dict"]
        assert bool(state["weight"].isfinite()), name


def test_a_run_that_ends_without_a_finite_model_is_an_error(tmp_path: Path) -> None:
    module = Scripted([])
    with pytest.raises(UserError, match=r"weights of the model are not finite.*lower --model\.learning_rate"):
        run(tmp_path, module, BestModel(str(tmp_path / "b")), epochs=2, callbacks=[Breaks()], validate=False)
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # these batches do not depend on the state
def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    first, second = (Scripted([]) for _ in range(2))
    keeps = Keeps(checkpoints(tmp_path / "first"), after=3)
    run(tmp_path / "first", first, BestModel(str(tmp_path), 3), 1, batches=5, validate=False, callbacks=[keeps])
    last = keeps.kept
    assert counts(last) == [0, 3]
    run(tmp_path / "second", second, BestModel(str(tmp_path), 3), 1, batches=5, validate=False, resume=last)
    assert second.batches == 5
    assert torch.equal(first.weight, second.weight)


def test_a_resumed_run_keeps_the_best_score(tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, Scripted([5.0]), BestModel(str(bundles)), epochs=1)
    last = checkpoints(first) / "last.ckpt"
    best = BestModel(str(bundles), save_last_every=7)  # with another option, it is still the same callback
    run(second, Scripted([5.0, 4.0, 6.0, 5.5]), best, epochs=2, resume=last)
    assert best.best_model_score == 5.0
    assert (bundles / "model.pt").read_text() == "after 2 batches"
    assert not (checkpoints(second) / "best.ckpt").exists()
    run(second, Scripted([5.0, 4.0, 6.0, 5.5]), best, epochs=4, resume=checkpoints(second) / "last.ckpt")
    assert best.best_model_score == 6.0
    assert (bundles / "model.pt").read_text() == "after 6 batches"
    assert list(bundles.iterdir()) == [bundles / "model.pt"]  # the run's own file is overwritten, not renamed
    assert counts(checkpoints(second) / "best.ckpt")[1] == 6
    assert counts(checkpoints(first) / "best.ckpt")[1] == 2  # the first run's folder is as it was


def test_a_resumed_run_does_not_overwrite_the_model_file_of_another_run(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.pt").write_text("of another run")
    run(tmp_path / "first", Scripted([1.0]), BestModel(str(tmp_path / "bundles")), epochs=1)
    last = checkpoints(tmp_path / "first") / "last.ckpt"
    run(tmp_path / "second", Scripted([1.0, 2.0]), BestModel(str(elsewhere)), epochs=2, resume=last)
    assert sorted(p.read_text() for p in elsewhere.iterdir()) == ["after 4 batches", "of another run"]
    assert (elsewhere / "model.pt").read_text() == "after 4 batches"


def test_without_validation_the_model_file_is_the_last_model(tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    run(tmp_path, Scripted([]), BestModel(str(bundles), save_last_every=0), epochs=2, validate=False)
    assert (bundles / "model.pt").read_text() == "after 4 batches"


class Interrupts(L.Callback):
    """Ctrl-C as the second batch begins."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # these batches do not depend on the state
def test_an_interrupted_run_loses_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    module, bundles = Scripted([1.0]), tmp_path / "bundles"
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tmp_path, module, BestModel(str(bundles), 25), epochs=1, batches=5, callbacks=[Interrupts()])
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from here on
    assert module.batches == 2  # the batch came to its end
    last = checkpoints(tmp_path) / "last.ckpt"
    assert counts(last) == [0, 2]
    resumed = Scripted([1.0])
    run(tmp_path / "resumed", resumed, BestModel(str(bundles)), epochs=1, batches=5, resume=last)
    assert (resumed.batches, (bundles / "model.pt").read_text()) == (5, "after 5 batches")


def test_the_handler_of_ctrl_c_is_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path, Scripted([1.0]), BestModel(str(tmp_path)), epochs=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Scripted([1.0])
    with pytest.raises(UserError, match=r"best_model\.folder .* cannot be written"):
        run(tmp_path, module, BestModel(str(tmp_path / "file" / "bundles")), epochs=1)
    assert module.batches == 0


def test_validation_alone_saves_nothing(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[BestModel(str(tmp_path))], enable_progress_bar=False
    )
    trainer.validate(Scripted([1.0]), loader(1), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path, Scripted([1.0]), BestModel(str(tmp_path / "bundles"), 1), epochs=1, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
