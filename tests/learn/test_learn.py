"""`rlchat learn` from end to end on a tiny model: outcomes, files, exit codes, and bad input in one sentence."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_models import random_policy

from rlchat.__main__ import main
from rlchat.chat import ChatInterface
from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.chat.verdicts import verdict_of
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.learn import stages
from rlchat.models.model_file import identity, load_policy, load_reward_model, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

MODEL = "chat.pt"
QUICK = ["--passes", "1", "--max-new-tokens", "4", "--replay-prompts", "4", "--control-prompts", "4", "--device", "cpu"]
SAFE = ["--learning-rate", "1e-9"]  # changes nothing that the gate could see


@pytest.fixture
def place(workplace: Path, tokenizer: ChatTokenizer) -> Path:
    """A model, replay data, and two corrections."""
    save_bundle(MODEL, random_policy(tokenizer))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}"},
                {"role": "assistant", "content": f"It is {n}."},
            ],
            "answer": str(n),
        }
        for n in range(30)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(2):
        give(f"What is {n}?", "No.", Correction("Yes."))
    return workplace


def give(
    question: str, response: str, verdict: Verdict, model: str = MODEL, client: str = "", model_id: str = ""
) -> None:
    prompt = Conversation((Message("user", question),))
    append_feedback("feedback.jsonl", prompt, response, verdict, model=model, model_id=model_id, client=client)


def learn(*more: str, replay: Sequence[str] = ("--replay", "data.jsonl")) -> int:
    return main(["learn", MODEL, "--feedback", "feedback.jsonl", *replay, *QUICK, *more])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def figures(name: str = "chat.versions/1.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name).read_text())
    return found


def test_an_accepted_version(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(MODEL).read_bytes()
    assert learn(*SAFE) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "accepted as version 1: chat.versions/1.pt"
    assert "2 verdicts: 2 corrected" in out
    assert "agreement is not part of the gate: 2 verdicts are fewer than 10" in out
    assert "correct controls" in out
    assert Path(MODEL).read_bytes() == before
    assert ChatInterface("chat.versions/1.pt", device="cpu").bundle.about["learned"]["from"] == MODEL
    found = figures()
    assert found["accepted"]
    assert found["feedback"]["kinds"] == {"corrected": 2}
    assert found["after"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found["replay"] == "data.jsonl"
    assert learn(*SAFE) == 0
    assert last_line(capsys) == "accepted as version 2: chat.versions/2.pt"
    again = ["learn", "chat.versions/2.pt", "--feedback", "feedback.jsonl", "--replay", "data.jsonl", *QUICK, *SAFE]
    assert main([*again, "--any-model"]) == 0
    out = capsys.readouterr().out
    assert "chat.versions/2.pt was learned from chat.pt: the KL penalty" in out
    assert out.splitlines()[-1] == "accepted as version 1: chat.versions/2.versions/1.pt"


def test_the_same_seed_gives_the_same_version(place: Path) -> None:
    for out, seed in (("a.pt", "1"), ("b.pt", "1"), ("c.pt", "2")):
        assert (
            learn(
                "--learning-rate", "1e-4", "--max-kl", "9", "--max-perplexity-rise", "9", "--out", out, "--seed", seed
            )
            == 0
        )
    a, b, c = (load_policy(name).model.state_dict() for name in ("a.pt", "b.pt", "c.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_it_learns_a_correction_and_forgets_one_that_was_taken_back(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = ["--learning-rate", "1e-2", "--passes", "8", "--max-kl", "99", "--max-perplexity-rise", "1e9"]
    assert learn(*loose, "--max-control-drop", "1", "--out", "a.pt") == 0
    asked = ["What is 0?", "What is 1?"]
    assert ChatInterface("a.pt", device="cpu").batch(asked, 4, 0.0) == ["Yes.", "Yes."]
    give("What is 1?", "No.", "none")
    assert learn(*loose, "--max-control-drop", "1", "--out", "b.pt") == 0
    assert last_line(capsys) == "accepted as a version of chat.pt: b.pt"
    assert figures("b.json")["feedback"]["verdicts"] == 1
    assert figures("b.json")["feedback"]["withdrawn"] == 1


def test_ratings_are_learned_with_lora(place: Path) -> None:
    pytest.importorskip("peft")
    for n in range(4):
        give(f"Question {n}", "Up.", "good")
        give(f"Question {n}", "Down.", "bad")
        give(f"Other {n}", "Left.", "bad")
    assert learn("--train", "lora", *SAFE, "--out", "mine") == 0
    assert "lora" not in " ".join(load_policy("mine/1.pt").model.state_dict())
    assert figures("mine/1.json")["training"]["part"] == "lora"
    assert figures("mine/1.json")["feedback"]["kinds"] == {"corrected": 2, "good": 4, "bad": 8}


@pytest.mark.parametrize("part", ["lora", "full"])
def test_the_first_layers_stay_as_they_are(place: Path, part: str) -> None:
    pytest.importorskip("peft")
    loose = ["--learning-rate", "1e-2", "--max-kl", "99", "--max-perplexity-rise", "1e9", "--max-control-drop", "1"]
    assert learn("--train", part, "--train-layers", "1", *loose, "--out", "mine.pt") == 0
    before, after = (load_policy(name).model.state_dict() for name in (MODEL, "mine.pt"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {int(part) for name in changed for part in name.split(".") if part.isdigit()}
    last = max(int(part) for name in before for part in name.split(".") if part.isdigit())
    assert layers == {last}
    assert figures("mine.json")["training"]["train_layers"] == 1


def test_ppo_updates_the_reward_model_and_names_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        give(f"Question {n}", "Up.", "good")
    assert learn("--method", "ppo", "--iterations", "1", *SAFE) == 0
    assert last_line(capsys) == "accepted as version 1: chat.versions/1.pt"
    described = load_policy("chat.versions/1.pt").about["reward"]
    assert described[0]["init_args"]["bundle"] == "chat.versions/1.reward.pt"
    load_reward_model("chat.versions/1.reward.pt")
    # The next round continues from the reward model that the model file names.
    Path("chat.versions/1.pt").rename(MODEL)
    assert learn("--method", "ppo", "--iterations", "1", *SAFE) == 0
    assert figures("chat.versions/2.json")["accepted"]


def test_no_path_outside_the_folder_is_recorded(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for out, bundle in ((elsewhere / "a.pt", "a.reward.pt"), (place / "b.pt", "b.reward.pt"), (Path("c"), None)):
        assert learn("--method", "ppo", "--iterations", "1", *SAFE, "--out", str(out)) == 0
        version = out if bundle else out / "1.pt"
        described = load_policy(version).about["reward"]
        assert described[0]["init_args"]["bundle"] == (bundle or "c/1.reward.pt")
        assert str(elsewhere) not in str(load_policy(version).about)
        assert version.with_suffix(".reward.pt").is_file()


def test_a_version_that_forgets_is_rejected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn("--learning-rate", "0.1") == 0
    line = last_line(capsys)
    assert line.startswith("rejected: ")
    assert "have moved too far from those of the original model: the KL is" in line
    (row,) = [json.loads(text) for text in Path("chat.versions/rejected.jsonl").read_text().splitlines()]
    assert not row["accepted"]
    assert "; ".join(row["reasons"]) == line.removeprefix("rejected: ")
    assert row["after"]["kl"] > row["bounds"]["kl"]
    assert [path.name for path in Path("chat.versions").glob("*.pt")] == []


def test_training_that_diverges_is_an_alarm(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn("--learning-rate", "1e30", "--passes", "9") == 0
    assert last_line(capsys).startswith("rejected: alarm in training: ")


def test_held_back_verdicts_are_part_of_the_gate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(20):
        give(f"Question {n}", "Up.", "good")
    assert learn(*SAFE) == 0
    out = capsys.readouterr().out
    found = figures()
    held_back = found["feedback"]["held_back"]
    assert held_back == found["after"]["verdicts"] > 0
    assert held_back + found["feedback"]["trained_on"] == 22
    assert f"{held_back} of them held back" in out
    assert "agreement with held-back verdicts" in out


def test_the_version_in_use_sets_the_agreement(place: Path, tokenizer: ChatTokenizer) -> None:
    for n in range(20):
        give(f"Question {n}", f"Up {n}.", "good")
    in_use = random_policy(tokenizer, seed=5)
    in_use.about["learned"] = {"model_id": identity(load_policy(MODEL))}
    save_bundle("other.pt", in_use)
    assert learn(*SAFE, "--current", "other.pt", "--max-kl", "99") == 0
    files = [*Path("chat.versions").glob("1.json"), *Path("chat.versions").glob("rejected.jsonl")]
    found = json.loads(files[0].read_text())
    assert found["current"] == "other.pt"
    assert found["before"]["perplexity"] != found["original"]["perplexity"]
    assert found["after"]["perplexity"] == pytest.approx(found["original"]["perplexity"], rel=1e-4)


def test_what_trained_the_version_in_use_does_not_measure_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version of 8 verdicts, all of which train, and one of 30, which holds some back."""
    for n in range(6):
        give(f"Question {n}", "Up.", "good")
    assert learn(*SAFE) == 0
    first = figures()["trained_prompts"]
    assert len(first) == 8
    for n in range(6, 28):
        give(f"Question {n}", "Up.", "good")
    assert learn(*SAFE, "--current", "chat.versions/1.pt") == 0
    second = figures("chat.versions/2.json")
    assert set(first) < set(second["trained_prompts"])
    assert len(second["trained_prompts"]) + second["after"]["verdicts"] == 30
    assert learn(*SAFE) == 0
    assert not set(first) < set(figures("chat.versions/3.json")["trained_prompts"])  # the original saw none of them
    capsys.readouterr()
    Path("chat.versions/1.json").unlink()
    assert learn(*SAFE, "--current", "chat.versions/1.pt") == 0
    assert "1.json, which says what trained chat.versions/1.pt, was not found" in capsys.readouterr().out


def test_replayed_responses_are_held_where_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also truncated ones: a random model rarely ends within 4 tokens. Without verdicts, nothing would change."""
    only_replay = lambda prompts: prompts[2:]  # noqa: E731
    write = stages.write_prompts
    monkeypatch.setattr(stages, "write_prompts", lambda path, prompts: write(path, only_replay(prompts)))
    loose = ["--learning-rate", "1e-2", "--passes", "8"]
    assert learn(*loose) == 0
    assert figures()["feedback"]["replayed"] == 4
    assert figures()["after"]["kl"] == pytest.approx(0, abs=1e-3)


def test_ppo_replays_all_prompts(place: Path) -> None:
    assert learn(*SAFE, "--method", "ppo", "--iterations", "1") == 0
    assert figures()["feedback"]["replayed"] == 4


def test_the_data_that_the_model_names_is_replayed(
    place: Path, tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = random_policy(tokenizer)
    bundle.about["data"] = {"path": ["data.jsonl"], "seed": 0, "val_fraction": 0.1, "test_fraction": 0.1}
    save_bundle(MODEL, bundle)
    assert learn(*SAFE, replay=()) == 0
    assert figures()["replay"] == "data.jsonl"
    Path("data.jsonl").unlink()
    capsys.readouterr()
    assert learn(*SAFE, replay=()) == 0
    assert "data.jsonl, which the model file names, was not found" in capsys.readouterr().out
    assert figures("chat.versions/2.json")["replay"] == "packaged everyday prompts"


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line on standard error of a run with exit code 2 that leaves no version and no figures."""
    assert learn(*more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    folder = Path("chat.versions")
    assert {path.name for path in folder.iterdir()} <= {".lock"} if folder.exists() else True
    return line


def test_feedback_of_another_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("feedback.jsonl").unlink()
    give("Hello", "Hi.", "good", model="other.pt")
    assert refused(capsys) == (
        "rlchat: feedback.jsonl: the only verdict is on responses of other.pt, not of chat.pt; pass the feedback of "
        "this model, or --any-model"
    )
    give("Hello", "Bye.", "bad", model="chat.pt")
    assert learn(*SAFE) == 0
    assert "1 on responses of other models" in capsys.readouterr().out
    assert learn(*SAFE, "--any-model") == 0
    assert figures("chat.versions/2.json")["feedback"]["verdicts"] == 2


def test_a_response_is_known_by_the_weights_of_its_model(
    place: Path, tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Versions of every model are called 1.pt, 2.pt, …, and a file can be replaced by another model."""
    other = random_policy(tokenizer, seed=5)
    save_bundle("other.pt", other)
    assert learn(*SAFE) == 0
    own, version, foreign = (identity(load_policy(name)) for name in (MODEL, "chat.versions/1.pt", "other.pt"))
    assert own == version != foreign
    Path("feedback.jsonl").unlink()
    shutil.rmtree("chat.versions")
    give("Hello", "Hi.", "good", model="3.pt", model_id=foreign)
    assert "the only verdict is on responses of 3.pt, not of chat.pt" in refused(capsys)
    give("Hi", "Hi.", "good", model=MODEL, model_id=foreign)
    assert "of 3.pt, another model named chat.pt (as when it was trained again), not of chat.pt" in refused(capsys)
    give("Bye", "Bye.", "good", model="3.pt", model_id=own)
    give("Old", "Bye.", "good", model="3.pt")  # of version 0.1
    assert learn(*SAFE) == 0
    assert figures("chat.versions/4.json")["feedback"]["verdicts"] == 2
    assert figures("chat.versions/4.json")["model_id"] == own
    assert learn(*SAFE, "--any-model") == 0
    assert figures("chat.versions/5.json")["feedback"]["verdicts"] == 4


def test_a_number_that_the_feedback_names_is_not_given_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of versions was deleted. A name without the id of MODEL may be that of another model's version."""
    own = identity(load_policy(MODEL))
    give("Hello", "Hi.", "good", model="4.pt", model_id=own)
    give("Hi", "Hi.", "good", model="7.pt", model_id="another")
    give("Bye", "Hi.", "good", model="9.pt")
    assert learn(*SAFE) == 0
    assert last_line(capsys) == "accepted as version 5: chat.versions/5.pt"
    assert figures("chat.versions/5.json")["version"] == 5


def test_the_version_in_use_is_one_of_the_model(
    place: Path, tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """MODEL was trained again: its old versions are not compared with it, and verdicts on them do not count."""
    assert learn(*SAFE) == 0
    save_bundle(MODEL, random_policy(tokenizer, seed=5))
    assert learn(*SAFE, "--current", "chat.versions/1.pt") == 2
    assert capsys.readouterr().err == (
        "rlchat: --current chat.versions/1.pt is not a version of chat.pt, but of another model; pass a version of "
        "chat.pt, or leave out --current\n"
    )
    old, new = identity(load_policy("chat.versions/1.pt")), identity(load_policy(MODEL))
    give("Hello", "Hi.", "good", model="1.pt", model_id=old)
    give("Bye", "Hi.", "good", model_id=new)
    assert learn(*SAFE) == 0
    assert figures("chat.versions/2.json")["feedback"]["left_out"] == {"on responses of other models": 1}


def test_the_chat_records_the_model(place: Path) -> None:
    chat = ChatInterface(MODEL, device="cpu", seed=0)
    chat.generate_response("Hello", max_new_tokens=4)
    chat.add_feedback(Correction("Yes, of course."), "mine.jsonl")
    (row,) = [json.loads(line) for line in Path("mine.jsonl").read_text().splitlines()]
    assert row["model_id"] == identity(load_policy(MODEL)) != ""
    assert verdict_of(row).model_id == row["model_id"]
    assert read_trees(["mine.jsonl"])[1].unread == {}


def test_damaged_lines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("feedback.jsonl").open("a") as file:
        file.write('{"feedback_id": \n')
    assert refused(capsys).startswith("rlchat: feedback.jsonl:3: not JSON")
    assert learn(*SAFE, "--on-bad-line", "skip") == 0
    assert "1 damaged line)" in capsys.readouterr().out


def test_verdicts_that_do_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("feedback.jsonl").unlink()
    give("Hello", "word " * 99, "bad")
    assert refused(capsys) == ("rlchat: feedback.jsonl: the only verdict cannot be used (1 longer than max_length 64)")
    give("Hello", "Hi.", "good")
    assert learn(*SAFE) == 0
    assert "1 longer than max_length 64" in capsys.readouterr().out


def test_a_full_disk(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(content: dict[str, Any], file: Any) -> None:
        if "learned" in content.get("about", {}):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    for method in ("dpo", "ppo"):
        line = refused(capsys, *SAFE, "--method", method, "--iterations", "1")
        assert "cannot be written: No space left on device" in line


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--feedback", "nothing.jsonl"], "nothing.jsonl"),
        (["--replay", "nothing.jsonl"], "nothing.jsonl"),
        (["--out", MODEL], "--out chat.pt is MODEL, which is never changed"),
        (["--out", "data.pt"], "no version replaces a file"),
        (["--replay-prompts", "0"], "--replay-prompts"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--max-kl", "-1"], "kl"),
        (["--max-new-tokens", "64"], "max_new_tokens"),
        (["--device", "abacus"], "abacus"),
        (["--current", "nothing.pt"], "nothing.pt"),
    ],
)
def test_bad_options(more: list[str], complaint: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.pt").write_text("mine")
    assert complaint in refused(capsys, *more)
    assert Path("data.pt").read_text() == "mine"


def test_no_verdict_that_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("feedback.jsonl").write_text("")
    assert "no verdict that counts in 0 lines" in refused(capsys)
    give("Hello", "Hi.", "good", client="ann")
    give("Hello", "Hi.", "bad", client="bob")
    assert "the verdicts contradict each other" in refused(capsys)
    give("Hello", "Hi.", "none", client="ann")
    give("Hello", "Hi.", "none", client="bob")
    assert "no verdict that counts in 4 lines (2 taken back)" in refused(capsys)
