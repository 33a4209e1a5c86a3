"""The model, its versions and their folder are replaced, damaged or deleted, before the start or while serving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.chat_models import random_policy
from helpers.servers import wait_until
from helpers.supervisors import folder_of, give, read_state, supervising, wait_for_failures, wait_for_rounds

from rlchat.chat.learning.folder import VersionFolder
from rlchat.chat.learning.live import table_of
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.errors import UserError
from rlchat.models.model_file import identity, load_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


@pytest.fixture
def model(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    """A model; ``new.pt`` beside it is another one, and has the name of the model after :func:`retrain`."""
    for seed, name in enumerate(("chat.pt", "new.pt")):
        save_bundle(tmp_path / name, random_policy(tokenizer, seed=seed))
    return tmp_path / "chat.pt"


def id_of(model: Path) -> str:
    return identity(load_policy(model))


def retrain(model: Path) -> None:
    """Replaces the model by another one, and keeps it as ``old.pt``."""
    model.rename(model.with_name("old.pt"))
    shutil.copy(model.with_name("new.pt"), model)


def learn(model: Path, *rounds: str) -> None:
    """Makes a version from each of ``rounds``, a word with a question per letter."""
    model_id = id_of(model)
    with supervising(model) as (supervisor, _):
        before = len(supervisor.status().rounds)
        for number, questions in enumerate(rounds, before + 1):
            give(model, *questions, model_id=model_id)
            wait_for_rounds(supervisor, number)


def last_column(line: str) -> str:
    return line.split("  ")[-1].strip()


# ---- another model ---------------------------------------------------------------------------------------------------


def test_versions_of_a_model_that_was_trained_again(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new model answers, its verdicts count, numbers go on, and no file of the old one changes or is used."""
    learn(model, "ab", "cd")
    old = {path: path.read_bytes() for path in folder_of(model).glob("[12].*")}
    assert len(old) == 4
    retrain(model)
    notice = (
        f"versions 1, 2 in {folder_of(model)} are of another model named chat.pt, and not used; no file is replaced: "
        "the next version has the number 3"
    )
    with supervising(model, keep=1) as (supervisor, swaps):
        status = supervisor.status()
        assert (status.active, status.path, status.previous, status.versions) == (0, model, (), (0,))
        assert (status.notices, status.rounds, status.new) == ((notice,), (), 0)
        assert notice in caplog.messages
        for number in (1, 2):
            with pytest.raises(UserError, match=f"there is no version {number}; expected one of 0$"):
                supervisor.rollback(number)
        assert supervisor.model_id_of("2.pt") == id_of(model.with_name("old.pt")) != id_of(model)
        give(model, "e", model_id=id_of(model.with_name("old.pt")), name="2.pt")
        give(model, "f", "g", model_id=id_of(model))
        wait_for_rounds(supervisor, 1)
        status = supervisor.status()
        assert (status.active, status.verdicts, status.versions, swaps) == (3, 2, (0, 3), [(3, status.path)])
        assert json.loads((folder_of(model) / "3.json").read_text())["current"] is None
        give(model, "h", "i", model_id=id_of(model), name="3.pt")
        wait_for_rounds(supervisor, 2)
        assert supervisor.status().versions == (0, 4)  # keep=1, of the versions of this model
        table = supervisor.table()
        assert [line[:3] for line in table] == ["  v", "  0", "  1", "  2", "  3", "* 4"]
        assert [last_column(line) for line in table[2:5]] == [
            *["of another model with the same name"] * 2,
            "its model file was deleted",
        ]
    assert {path: path.read_bytes() for path in old} == old
    model.with_name("old.pt").replace(model)  # the old model comes back, with its versions
    with supervising(model) as (supervisor, _):
        assert supervisor.status().versions == (0, 1, 2)
        assert supervisor.rollback(2)[0] == 2
        assert supervisor.status().notices == (
            f"version 4 in {folder_of(model)} is of another model named chat.pt, and not used; no file is replaced: "
            "the next version has the number 5",
        )


def test_the_round_of_a_model_that_was_trained_again_meanwhile(model: Path) -> None:
    """The server was killed in a round, the round ended, and MODEL was replaced before the next start."""
    learn(model, "ab")
    state = read_state(model)
    name = json.loads((folder_of(model) / "1.json").read_text())["feedback_file"].removeprefix("round-")[:-6]
    (folder_of(model) / "state.json").write_text(json.dumps({**state, "active": 0, "running": name, "used": []}))
    retrain(model)
    with supervising(model) as (supervisor, _):
        assert supervisor.active() == (0, model)
        assert read_state(model)["running"] is None


@pytest.mark.parametrize("with_version", [False, True])
def test_a_model_that_is_replaced_while_serving(model: Path, with_version: bool) -> None:
    """By another model, or by a version of itself, which has the same identity but other weights."""
    learn(model, "ab")
    own, error = id_of(model), f"{model} was replaced since the start; restart to use it"
    if with_version:
        version = load_policy(model.with_name("new.pt"))
        version.about["learned"] = {"model_id": own}
        save_bundle(model.with_name("new.pt"), version)
    with supervising(model) as (supervisor, swaps):
        retrain(model)
        give(model, "c", "d", model_id=own)
        wait_for_failures(supervisor, 1)
        status = supervisor.status()
        assert (status.error, status.active, status.new, status.training_since) == (error, 1, 2, None)
        with pytest.raises(UserError) as raised:
            supervisor.rollback(0)
        assert str(raised.value) == error
        assert (supervisor.active()[0], swaps) == (1, [])
        assert read_state(model)["running"] is None
        shutil.copy(model.with_name("old.pt"), model)  # a copy is the same model
        give(model, "e", model_id=own)
        wait_for_rounds(supervisor, 2)
        assert (supervisor.active()[0], supervisor.status().error) == (2, None)
        model.unlink()
        give(model, "f", "g", model_id=own)
        wait_for_failures(supervisor, 2)
        assert str(supervisor.status().error).startswith(f"{model}: no such model file")
        assert supervisor.active()[0] == 2


def test_a_model_that_is_replaced_while_a_round_begins(model: Path) -> None:
    """The round has read the other model: its version is not used, and its verdicts stay new."""
    own = id_of(model)
    give(model, "a", "b", model_id=own)
    with supervising(model, "--copy", str(model.with_name("new.pt"))) as (supervisor, swaps):
        wait_for_failures(supervisor, 1)
        status = supervisor.status()
        assert status.error == f"{model} was replaced since the start; restart to use it"
        assert (status.active, status.new, status.versions, status.rounds, swaps) == (0, 2, (0,), (), [])


def test_a_model_that_is_replaced_before_it_is_loaded(model: Path) -> None:
    supervisor = Supervisor(model, model.with_name("feedback.jsonl"), on_version=lambda *_: None)
    with pytest.raises(UserError, match=r"chat\.pt was replaced while it was loaded; start again to use it"):
        supervisor.start(id_of(model.with_name("new.pt")))
    supervisor.close()


def test_rejected_rounds_of_another_model(model: Path) -> None:
    folder = VersionFolder(model, keep=1)
    row = {"accepted": False, "reasons": ["no"], "date": "2026-11-01", "feedback": {"verdicts": 2}}
    for name in (model, model.with_name("new.pt")):
        folder.versions.reject({**row, "model_id": id_of(name)})
    folder.versions.reject(row)  # of a development version
    assert [folder.is_own(outcome) for outcome in folder.outcomes()] == [True, False, True]
    assert len(folder.own_outcomes()) == 2
    assert [last_column(line) for line in table_of(model)[2:]] == [
        "no",
        "no; of another model with the same name",
        "no",
    ]


# ---- damaged and deleted versions ------------------------------------------------------------------------------------


def test_a_damaged_version_is_reported(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A half file, and one with NaN, which only loading finds."""
    learn(model, "ab", "cd", "ef")
    (folder_of(model) / "3.pt").write_bytes(b"half")
    broken = load_policy(folder_of(model) / "2.pt")
    broken.about["learned"] = {"model_id": id_of(model)}
    next(iter(broken.model.parameters())).data.fill_(float("nan"))
    save_bundle(folder_of(model) / "2.pt", broken)
    notice = f"version 3 and version 2 in {folder_of(model)} cannot be loaded, so version 1 answers"
    with supervising(model) as (supervisor, _):
        status = supervisor.status()
        assert (status.active, status.versions, status.previous) == (1, (0, 1), (0,))
        assert status.notices == (notice,)
        assert notice in caplog.messages
        with pytest.raises(UserError, match="there is no version 3; expected one of 0, 1"):
            supervisor.rollback(3)
        assert [last_column(line) for line in supervisor.table()[3:]] == ["its model file is damaged"] * 2
    (folder_of(model) / "1.pt").unlink()
    with supervising(model) as (supervisor, _):
        assert supervisor.status().notices == (
            f"version 1 in {folder_of(model)} cannot be loaded, so the original model answers",
        )


def test_versions_that_were_pruned_are_not_reported(model: Path) -> None:
    learn(model, "ab", "cd", "ef")
    (folder_of(model) / "3.pt").write_bytes(b"half")
    (folder_of(model) / "2.pt").unlink()
    with supervising(model) as (supervisor, _):
        assert supervisor.status().notices == (
            f"version 3 in {folder_of(model)} cannot be loaded, so version 1 answers",
        )


def test_the_file_of_the_active_version_is_deleted_while_serving(model: Path) -> None:
    learn(model, "ab")
    with supervising(model) as (supervisor, _):
        (folder_of(model) / "1.pt").unlink()
        give(model, "c", "d", model_id=id_of(model))
        wait_for_rounds(supervisor, 2)
        assert supervisor.active()[0] == 2
        assert json.loads((folder_of(model) / "2.json").read_text())["current"] is None
        assert supervisor.status().notices == (
            "the file of version 1 is gone, so the next version is compared with the original model",
        )


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_deleted_while_serving(model: Path) -> None:
    """It is taken again, a round that runs begins again, and the numbers go on."""
    learn(model, "ab", "cd")
    gate = model.with_name("go")
    with supervising(model, "--wait", str(gate)) as (supervisor, _):
        give(model, "e", "f", model_id=id_of(model))
        wait_until(lambda: supervisor.status().training_since is not None)
        shutil.rmtree(folder_of(model))
        wait_until(lambda: bool(supervisor.status().notices))
        status = supervisor.status()
        assert (status.active, status.versions) == (2, (0,))
        assert status.notices[0] == f"{folder_of(model)} was deleted, with the versions in it; version 2 still answers"
        with pytest.raises(UserError, match="another chat already learns"), supervising(model):
            pass
        gate.touch()
        wait_for_rounds(supervisor, 1)
        status = supervisor.status()
        assert (status.active, status.versions, status.new, status.error) == (3, (0, 3), 0, None)
    with supervising(model) as (supervisor, _):
        assert supervisor.active()[0] == 3


def test_the_folder_is_replaced_while_serving(model: Path) -> None:
    """Another supervisor was faster, or the folder was restored: its state is not overwritten."""
    learn(model, "ab")
    kept = model.with_name("kept")
    gate = model.with_name("go")
    with supervising(model, "--wait", str(gate)) as (supervisor, swaps):
        give(model, "c", "d", model_id=id_of(model))
        wait_until(lambda: supervisor.status().training_since is not None)
        with supervisor._swap:
            shutil.copytree(folder_of(model), kept)
            shutil.rmtree(folder_of(model))
            kept.rename(folder_of(model))
            restored = (folder_of(model) / "state.json").read_bytes()
        lost = f"{folder_of(model)} was replaced since the start; restart to learn again"
        wait_until(lambda: supervisor.status().error == lost)
        assert (supervisor.status().training_since, supervisor.active()[0]) == (None, 1)
        for change in (lambda: supervisor.rollback(0), lambda: supervisor.set_learning(False)):
            with pytest.raises(UserError, match="was replaced since the start; restart to learn again"):
                change()
        with supervising(model, every=9) as (other, _):
            assert other.active()[0] == 1
    assert swaps == []
    assert json.loads(restored)["running"] is not None
    assert read_state(model)["active"] == 1


# ---- a version as the model ------------------------------------------------------------------------------------------


def test_a_version_is_not_the_model_of_a_chat_that_learns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(model, "ab")
    version = folder_of(model) / "1.pt"
    advice = (
        f"{version} is version 1 of {model}, and learning begins with the original: pass {model} with --learn, and "
        "roll back to version 1 if another one answers"
    )
    with pytest.raises(UserError) as raised, supervising(version):
        pass
    assert str(raised.value) == advice
    monkeypatch.chdir(folder_of(model))
    with pytest.raises(UserError, match=f"1.pt is version 1 of {model}, and"), supervising(Path("1.pt")):
        pass
    (folder_of(model) / "1.json").unlink()
    with pytest.raises(UserError, match="has the name of a version: copy it"), supervising(version):
        pass
    assert not list(folder_of(model).glob("*.versions"))


def test_a_version_under_a_new_name_is_a_model(model: Path) -> None:
    version = load_policy(model.with_name("new.pt"))
    version.about["learned"] = {"model_id": id_of(model)}
    mine = model.with_name("mine.pt")
    save_bundle(mine, version)
    with supervising(mine) as (supervisor, _):
        assert supervisor.status().notices == (
            f"{mine} was itself learned from feedback; its versions are compared with it",
        )
