"""The page of a server that learns, in a headless browser: teach, see the version change, ask again, roll back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import chain, scripted_policy
from helpers.pages import opened
from helpers.servers import Server, learning_server, serving

from rlchat.chat.feedback import append_feedback
from rlchat.chat.verdicts import read_verdicts
from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import identity, load_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> Path:
    """A model that answers "old!"; the one beside it answers "new?"."""
    for name, text in (("tiny.pt", b"old!"), ("new.pt", b"new?")):
        bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text)))
        if name == "new.pt":
            bundle.about["learned"] = {"model_id": identity(load_policy(tmp_path / "tiny.pt"))}
        save_bundle(tmp_path / name, bundle)
    return tmp_path / "tiny.pt"


def ask(page: Any, text: str, reply: str) -> None:
    replies = page.locator(".message.assistant").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.assistant .text")).to_have_count(replies + 1)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".message.assistant .text").last).to_have_text(reply)


def correct(page: Any, text: str) -> None:
    page.get_by_role("button", name="Correct this response").last.click()
    page.get_by_label("Save the correction").first.fill(text)
    page.get_by_role("button", name="Save the correction").click()
    expect(page.get_by_text("Feedback saved.")).to_be_visible()


def names(server: Server) -> list[str]:
    return [verdict.model for verdict in read_verdicts(server.feedback)[0]]


def test_teach_and_roll_back(browser: Any, model: Path) -> None:
    gate = model.with_name("go")
    more = ("--copy", str(model.with_name("new.pt")), "--wait", str(gate))
    with learning_server(model, *more) as (server, _):
        for page in opened(browser, server):
            page.get_by_role("button", name="Learning", exact=True).click()
            panel = page.get_by_role("complementary", name="Learning")
            expect(panel).to_contain_text("The original model is in use")
            expect(panel).to_contain_text("0 of 2 new verdicts until the next training.")
            ask(page, "One", "old!")
            correct(page, "new?")
            expect(panel).to_contain_text("1 of 2 new verdicts")
            ask(page, "Two", "old!")
            page.get_by_role("button", name="Bad response").last.click()
            expect(panel).to_contain_text("Training now")
            expect(page.locator("#open-learning")).to_have_class("icon busy")
            gate.touch()
            expect(panel).to_contain_text("Version 1 is in use")
            expect(page.get_by_text("Version 1 answers from now on.")).to_be_visible()
            expect(panel).to_contain_text(
                "It has learned from 2 verdicts. "
                "It agrees with 2 of 2 of your verdicts that it was not trained on, before: 1."
            )
            label = "Agreement with held-back verdicts: the original model 50 %, version 1 100 %"
            expect(panel.get_by_role("img", name=label)).to_be_visible()
            expect(page.locator("#open-learning")).to_have_class("icon")
            ask(page, "Three", "new?")
            expect(page.locator(".meta").last).to_contain_text("version 1")
            page.get_by_role("button", name="Good response").last.click()
            expect(panel).to_contain_text("1 of 2 new verdicts")
            panel.get_by_role("button", name="Roll back to the original model").click()
            expect(panel).to_contain_text("The original model is in use")
            ask(page, "Four", "old!")
            panel.get_by_role("switch", name="Learn from feedback").uncheck()
            expect(panel).to_contain_text("Learning is off")
            page.reload()
            page.get_by_role("button", name="Learning", exact=True).click()
            expect(panel.get_by_role("switch")).not_to_be_checked()
        assert names(server) == ["tiny.pt", "tiny.pt", "1.pt"]


def test_a_response_is_scored_by_the_version_that_generated_it(browser: Any, model: Path) -> None:
    for name, words in (("tiny.pt", 4), ("new.pt", 2)):
        bundle = load_policy(model.with_name(name), "cpu")
        bundle.about["reward"] = [{"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": words}}]
        save_bundle(model.with_name(name), bundle)
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, _):
        for page in opened(browser, server):
            ask(page, "One", "old!")
            page.get_by_role("button", name="Bad response").last.click()
            ask(page, "Two", "old!")
            page.get_by_role("button", name="Bad response").last.click()
            expect(page.get_by_text("Version 1 answers from now on.")).to_be_visible()
            ask(page, "Three", "new?")
            for shown in (0, 2):
                page.get_by_role("button", name="Reward").nth(shown).click()
            expect(page.locator(".reward .sum")).to_have_text(["reward", "−0.750", "reward", "−0.500"])
            expect(page.locator(".reward .wide")).to_have_count(0)


def test_the_panel_on_a_phone(browser: Any, model: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    with learning_server(model) as (server, _):
        for page in opened(browser, server, **phone):
            page.get_by_role("button", name="Learning", exact=True).tap()
            panel = page.get_by_role("complementary", name="Learning")
            expect(panel).to_be_in_viewport(ratio=1)
            page.get_by_role("button", name="Close the learning panel").tap()
            expect(panel).to_be_hidden()
            assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_each_round_that_fails_is_reported(browser: Any, model: Path) -> None:
    with learning_server(model, "--crash") as (server, _):
        for page in opened(browser, server):
            page.get_by_role("button", name="Learning", exact=True).click()
            panel = page.get_by_role("complementary", name="Learning")
            for number, question in enumerate(("One", "Two", "Three")):
                ask(page, question, "old!")
                page.get_by_role("button", name="Bad response").last.click()
                if number:
                    expect(page.locator("#toast")).to_have_text(
                        "No new version: feedback.jsonl: none of 2 verdicts can be used."
                    )
                    page.locator("#toast").evaluate("(toast) => { toast.textContent = '' }")
            expect(panel).to_contain_text("none of 2 verdicts can be used")


def test_an_error_and_damaged_lines_are_shown_as_text(browser: Any, model: Path) -> None:
    prompt = Conversation((Message("user", "Hi"),))
    append_feedback(model.with_name("feedback.jsonl"), prompt, "No.", "bad", model="<img src=x>.pt")
    with model.with_name("feedback.jsonl").open("a") as file:
        file.write("damaged\n")
    with learning_server(model) as (server, _):
        for page in opened(browser, server):
            page.get_by_role("button", name="Learning", exact=True).click()
            panel = page.get_by_role("complementary", name="Learning")
            expect(panel).to_contain_text("are on responses of <img src=x>.pt, not of tiny.pt.")
            expect(panel).to_contain_text("Left out: 1 verdict on responses of <img src=x>.pt, 1 damaged line.")
            assert panel.locator("img").count() == 0
            ask(page, "One", "old!")


def teach(page: Any, first: str, second: str) -> None:
    for question in (first, second):
        page.get_by_label("Message", exact=True).fill(question)
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.get_by_role("button", name="Bad response").last).to_have_attribute("aria-pressed", "false")
        page.get_by_role("button", name="Bad response").last.click()


def test_any_version_can_be_used_again(browser: Any, model: Path) -> None:
    """Back by two versions and forward again, with the keyboard. A training is not ended without a question."""
    gate = model.with_name("go")
    gate.touch()
    more = ("--copy", str(model.with_name("new.pt")), "--wait", str(gate))
    with learning_server(model, *more) as (server, supervisor):
        for page in opened(browser, server):
            page.get_by_role("button", name="Learning", exact=True).click()
            panel = page.get_by_role("complementary", name="Learning")
            choice = panel.get_by_label("Other versions")
            expect(choice).to_be_hidden()
            teach(page, "One", "Two")
            expect(panel).to_contain_text("Version 1 is in use")
            teach(page, "Three", "Four")
            expect(panel).to_contain_text("Version 2 is in use")
            expect(choice.locator("option")).to_have_text(["The original model", "Version 1"])
            expect(choice).to_have_value("1")  # the one before
            choice.focus()
            page.keyboard.press("ArrowUp")
            page.keyboard.press("Tab")
            expect(panel.get_by_role("button", name="Roll back to the original model")).to_be_focused()
            page.keyboard.press("Enter")
            expect(panel).to_contain_text("The original model is in use")
            expect(choice.locator("option")).to_have_text(["Version 1", "Version 2"])
            choice.select_option("2")
            panel.get_by_role("button", name="Go forward to version 2").click()
            expect(panel).to_contain_text("Version 2 is in use")
            gate.unlink()
            teach(page, "Five", "Six")
            expect(panel).to_contain_text("Training now")
            choice.select_option("0")
            panel.get_by_role("button", name="Roll back to the original model").click()
            expect(panel).to_contain_text("A training is running. It ends if you change the version.")
            expect(panel.get_by_role("button", name="Keep training")).to_be_focused()
            page.keyboard.press("Enter")
            expect(panel.get_by_role("button", name="Roll back to the original model")).to_be_focused()
            assert supervisor.status().training_since is not None
            assert supervisor.status().active == 2
            page.keyboard.press("Enter")
            panel.get_by_role("button", name="End it and change the version").click()
            expect(panel).to_contain_text("The original model is in use")
            assert supervisor.status().training_since is None


def test_a_first_version_says_what_it_has_learned_from(browser: Any, model: Path) -> None:
    none = {"agrees": None, "verdicts": 0, "controls": 255}
    figures = {
        "notes": ["agreement is not part of the gate: 2 verdicts are fewer than 10"],
        "feedback": {"verdicts": 2, "kinds": {"bad": 2}, "left_out": {"longer than max_length 64": 1, "<b>": 1}},
        "before": {**none, "correct": 233},
        "after": {**none, "correct": 232},
    }
    with learning_server(model, "--figures", json.dumps(figures)) as (server, _):
        for page in opened(browser, server):
            page.get_by_role("button", name="Learning", exact=True).click()
            panel = page.get_by_role("complementary", name="Learning")
            teach(page, "One", "Two")
            expect(panel.locator("#learning-change")).to_have_text(
                "It has learned from 2 verdicts (2 bad). "
                "232 of 255 control questions are right, before: 233, which is within the bound."
            )
            expect(panel.locator("li small")).to_have_text(
                "Left out: 1 longer than max_length 64, 1 <b>; "
                "agreement is not part of the gate: 2 verdicts are fewer than 10."
            )


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_bar_moves_while_a_version_is_trained(browser: Any, model: Path, motion: str) -> None:
    with learning_server(model, "--wait", str(model.with_name("never"))) as (server, _):
        for page in opened(browser, server, reduced_motion=motion):
            page.get_by_role("button", name="Learning", exact=True).click()
            bar = page.locator("#learning-bar")
            teach(page, "One", "Two")
            expect(page.get_by_role("progressbar", name="Training")).to_be_visible()
            places = set()
            for _ in range(3):
                places.add(bar.evaluate("(bar) => getComputedStyle(bar).backgroundPosition"))
                page.wait_for_timeout(100)
            assert (len(places) > 1) == (motion == "no-preference")
            animations = bar.evaluate("(bar) => bar.getAnimations().map((one) => one.currentTime)")
            page.wait_for_timeout(1_700)  # longer than from one look at the server to the next
            later = bar.evaluate("(bar) => bar.getAnimations().map((one) => one.currentTime)")
            assert all(now > before for now, before in zip(later, animations, strict=True))  # it does not begin again


def test_without_learning_there_is_no_panel(browser: Any, model: Path) -> None:
    with serving(load_policy(model, "cpu"), model.with_name("feedback.jsonl")) as server:
        for page in opened(browser, server):
            expect(page.get_by_role("button", name="Learning", exact=True)).to_be_hidden()
