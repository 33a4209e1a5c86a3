"""The page of `rlchat look` in a headless browser. See tests/server/test_page.py for what it needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.look_runs import TOKENS, add_rows, old_rollout, rollout, write_run

from rlchat.look.main import main
from rlchat.look.server import LookServer, Run

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect

SECONDS = 20_000.0  # milliseconds; this machine may be busy
NASTY = "<img src=x onerror=alert(1)></script><b>"
BLUE, ORANGE = "rgba(47, 127, 214, ", "rgba(226, 126, 30, "


class Opener:
    """Opens pages, which must not log an error, open a dialog or violate their own policy."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser = browser
        self.folder = folder
        self.troubles: list[str] = []
        self.contexts: list[Any] = []

    def url(self, url: str, **options: Any) -> Any:
        context = self.browser.new_context(**{"viewport": {"width": 1300, "height": 850}, **options})
        self.contexts.append(context)
        context.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("console", lambda line: self.troubles.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: self.troubles.append(dialog.message))
        page.goto(url)
        return page

    def run(self, rows: list[Any], curves: str | None = None, **options: Any) -> Any:
        """The page over a run with ``rows``, as a file."""
        run = write_run(self.folder / f"run-{len(self.contexts)}", rows, curves)
        return self.files(run, **options)

    def files(self, *runs: Path, **options: Any) -> Any:
        out = self.folder / "page.html"
        words = [str(runs[0]), "--out", str(out), *(["--with", str(runs[1])] if len(runs) > 1 else [])]
        assert main(words) == 0
        return self.url(out.as_uri(), **options)


@pytest.fixture
def opener(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(browser, tmp_path)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.troubles == []


def rewards(page: Any) -> list[str]:
    """The rewards in the list, from top to bottom."""
    return page.locator(".row .top .number").all_inner_texts()


def colors(page: Any) -> list[str]:
    return page.locator(".token").evaluate_all("tokens => tokens.map(token => getComputedStyle(token).backgroundColor)")


def alpha(color: str) -> float:
    return float(color.rpartition(",")[2].rstrip(")")) if color.count(",") == 3 else 1.0


def test_tokens_are_colored_and_tell_their_numbers(opener: Opener) -> None:
    page = opener.run([rollout()])
    advantage = colors(page)  # 2, -1 and 0 on a scale from -2 to 2
    assert advantage[0].startswith(BLUE)
    assert advantage[1].startswith(ORANGE)
    assert [alpha(color) for color in advantage] == pytest.approx([0.62, 0.31, 0.0], abs=0.005)
    expect(page.locator(".token")).to_have_text(["Hel", "lo", "<|end|>"])
    page.locator(".token").first.hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text('"Hel"')
    expect(tip.locator("tr")).to_have_text(["advantage2", "value0.25", "KL0.5", "entropy1.5", "log-prob−1"])
    expect(tip.locator(".chosen")).to_have_text("advantage2")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(tip.locator("tr").nth(2)).to_have_text("KL−0.25")
    page.keyboard.press("3")
    expect(page.get_by_role("radio", checked=True)).to_have_text("3 KL")
    assert [color.startswith(BLUE) for color in colors(page)] == [True, False, True]
    assert [alpha(color) for color in colors(page)] == pytest.approx([0.62, 0.31, 0.0], abs=0.005)
    page.keyboard.press("5")
    assert [alpha(color) for color in colors(page)] == pytest.approx([0.62, 0.207, 0.103], abs=0.005)
    page.keyboard.press("4")
    expect(page.locator("#same")).to_have_text("No ratio was recorded: train with --rollout_log.ratio true.")


def test_the_scale_and_numbers_that_are_missing(opener: Opener) -> None:
    tokens = {**TOKENS, "value": [0.5, 0.5, 0.5], "kl": [None, 1.0, 0.0], "text": ["", "ü", "<|end|>"]}
    page = opener.run([rollout(per_token=tokens), rollout(iteration=2, per_token=tokens)])
    page.keyboard.press("2")
    expect(page.locator("#same")).to_have_text("the same in every token: 0.5")
    expect(page.locator("#summary tr", has_text="value, tokens")).to_contain_text("constant")
    page.keyboard.press("3")
    expect(page.locator(".token.broken")).to_have_count(1)
    page.locator(".token").first.hover()
    expect(page.locator("#tip")).to_contain_text("part of a character")
    expect(page.locator("#tip .chosen")).to_have_text("KLnot finite")


def test_a_token_far_outside_the_scale_is_underlined(opener: Opener) -> None:
    """The scale leaves out the outermost twentieth of the responses, and ends at 2."""
    rows = [rollout(per_token={**TOKENS, "advantage": [2.0, -2.0, 0.0]}) for _ in range(40)]
    page = opener.run([rollout(per_token={**TOKENS, "advantage": [4.5, 3.5, -4.5]}, iteration=2), *rows])
    expect(page.locator("#high")).to_have_text("2")
    assert [alpha(color) for color in colors(page)] == pytest.approx([0.62] * 3, abs=0.005)
    expect(page.locator(".token.beyond")).to_have_text(["Hel", "<|end|>"])


def test_text_is_never_html(opener: Opener) -> None:
    tokens = {**TOKENS, "text": [NASTY, "<i>", "<|end|>"]}
    prompt = [{"role": NASTY, "content": NASTY}]
    row = rollout(reply=NASTY, per_token=tokens, prompt=prompt, factors={NASTY: 1.0}, ended_by=NASTY)
    page = opener.run([row, {**row, "iteration": 2}], f'step,"reward/{NASTY}"\n0,1\n1,2\n')
    expect(page.locator(".token").first).to_have_text(NASTY)
    page.locator(".token").first.hover()
    expect(page.locator("#tip")).to_contain_text(NASTY)
    expect(page.locator(".bars")).to_contain_text(NASTY)
    expect(page.locator(".curve").first).to_contain_text(NASTY)
    page.keyboard.press("p")
    expect(page.locator(".row")).to_contain_text(NASTY)
    assert page.locator("img, body b img, i:not(.bar i), script:not([type]) ~ b").count() == 0


ROWS = [
    rollout(iteration=1, reward=1.0, kl=0.5, tokens=3, factors={"quality": 1.0, "polite": 0.0}),
    rollout(iteration=1, reward=3.0, kl=0.25, factors={"quality": 2.0, "polite": 1.0}, reply="Good day", prompt_id="b"),
    rollout(iteration=11, reward=2.0, kl=0.75, factors={"quality": 2.5, "polite": -0.5}, ended_by="token limit"),
    rollout(iteration=21, reward=-1.0, kl=None, factors={"quality": 0.0, "polite": -1.0}, prompt_id="b"),
]


def test_sort_and_filter(opener: Opener) -> None:
    page = opener.run(ROWS)
    assert rewards(page) == ["−1", "2", "3", "1"]  # the newest first
    sort = page.get_by_label("Sort by")
    sort.select_option("reward")
    assert rewards(page) == ["3", "2", "1", "−1"]
    page.locator("#direction").click()
    assert rewards(page) == ["−1", "1", "2", "3"]
    sort.select_option("KL")
    assert rewards(page) == ["3", "1", "2", "−1"]  # the row without a KL is last
    sort.select_option("factor quality")
    assert rewards(page) == ["−1", "1", "3", "2"]
    expect(page.locator(".row .ink").first).to_contain_text("factor quality")  # the number that the row did not show
    page.get_by_label("End reason").select_option("token limit")
    assert rewards(page) == ["2"]
    page.get_by_role("button", name="Clear the filters").click()
    page.get_by_role("button", name="Add a range").click()
    page.get_by_label("at least").fill("1.5")
    assert rewards(page) == ["3", "2"]
    page.get_by_label("Filter by").select_option("factor polite")
    page.get_by_label("at least").fill("-0.5")
    page.get_by_label("at most").fill("0")
    assert rewards(page) == ["1", "2"]
    expect(page.locator("#count")).to_have_text("2 of 4 responses")
    expect(page.locator("#summary tr", has_text="truncated")).to_contain_text("50 %")
    page.get_by_label("Remove this range").click()
    page.get_by_label("Search").fill("GOOD d")
    assert rewards(page) == ["3"]
    page.get_by_label("Search").fill("nothing like this")
    expect(page.locator(".row")).to_have_count(0)


def test_unusual_iterations(opener: Opener) -> None:
    """The critic is constant in the seventh of ten iterations, and all responses are truncated in the third."""
    values = [[0.1 * row, 0.2, 0.3] for row in range(4)]
    rows = [
        rollout(
            iteration=iteration,
            prompt_id=f"prompt {row}",
            prompt=[{"role": "user", "content": f"Say {row}."}],
            reply=f"It is {row}.",
            reward=float(row),
            kl=0.1 * row,
            factors={"quality": float(row)},
            ended_by="token limit" if iteration == 3 or row == 0 else "end of turn",
            per_token={**TOKENS, "value": [0.0] * 3 if iteration == 7 else values[row]},
        )
        for iteration in range(1, 11)
        for row in range(4)
    ]
    page = opener.run(rows)
    lines = page.locator("#odd tr")
    expect(lines.filter(has_text="value, tokens: all the same")).to_contain_text("7")
    expect(lines.filter(has_text="all truncated")).to_contain_text("3")
    expect(lines.filter(has_text="reward")).to_have_count(0)
    lines.filter(has_text="all truncated").get_by_role("button").click()
    expect(page.locator("#count")).to_have_text("4 of 40 responses")
    page.keyboard.press("]")
    expect(page.locator(".facts")).to_contain_text("iteration 4")
    page.keyboard.press("[")
    expect(page.locator(".facts")).to_contain_text("iteration 3")


def test_the_keyboard(opener: Opener) -> None:
    page = opener.run(ROWS)
    chosen = page.locator(".row[aria-selected=true] .top .number")
    expect(chosen).to_have_text("−1")
    for key, reward in (("j", "2"), ("j", "3"), ("j", "1"), ("j", "1"), ("k", "3"), ("ArrowUp", "2")):
        if key == "ArrowUp":
            page.locator("#list").focus()
        page.keyboard.press(key)
        expect(chosen).to_have_text(reward)
        expect(page.locator(".facts")).to_contain_text(f"reward {reward} ".strip())
    page.keyboard.press("/")
    page.keyboard.type("good j1")  # keys are text in the search
    expect(page.locator("#search")).to_have_value("good j1")
    expect(page.locator(".row")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator("#search")).to_have_value("")
    expect(page.locator(".row")).to_have_count(4)
    page.keyboard.press("2")
    expect(page.get_by_role("radio", checked=True)).to_have_text("2 value")


def test_the_same_prompt_over_iterations(opener: Opener) -> None:
    wavy = [rollout(iteration=n, reward=reward, prompt_id="w") for n, reward in enumerate([9.0, 0.0, 9.0, 0.0], 1)]
    falling = [rollout(iteration=n, reward=float(10 - n), prompt_id="f", reply=f"f {n}") for n in range(1, 5)]
    rising = [rollout(iteration=n, reward=float(n), prompt_id="r", reply=f"r {n}") for n in range(1, 5)]
    page = opener.run([*wavy, *falling, *rising])
    page.get_by_role("button", name="Prompts").click()
    rows = page.locator(".row")
    expect(rows).to_have_count(3)
    # The wave: slope -1.8, three iterations apart; squared residuals 64.8, error (64.8 / 2 / 5) ** 0.5 * 3 = 7.64.
    expect(rows.nth(0)).to_contain_text("trend −5.4 ± 7.6")
    expect(rows.nth(1)).to_contain_text("trend −3 ± 0")
    expect(rows.nth(2)).to_contain_text("trend +3 ± 0")
    page.get_by_label("Sort by").select_option("trend divided by its error")
    expect(rows.nth(0)).to_contain_text("trend −3")
    rows.nth(0).click()
    expect(page.locator(".history tr")).to_have_count(5)
    expect(page.locator("svg[aria-label='Reward by iteration'] circle")).to_have_count(4)
    expect(page.locator("svg[aria-label='Reward by iteration'] circle.now")).to_have_count(1)
    page.get_by_role("button", name="List only these").click()
    assert rewards(page) == ["6", "7", "8", "9"]
    page.locator(".history").get_by_role("button", name="2").click()
    expect(page.locator(".response")).to_contain_text("iteration 2")
    page.get_by_role("button", name="All prompts").click()
    expect(rows).to_have_count(12)


CURVES = "step,train/reward,train/kl,odd\n0,0.0,1,5\n10,1.0,2,\n20,2.0,3,\n"


def test_curves_with_the_iteration_marked(opener: Opener) -> None:
    page = opener.run(ROWS, CURVES)
    titles = page.locator("#curves .curve .title span:first-child")
    expect(titles).to_have_text(["train/reward", "train/kl"])
    mark = page.locator("#curves .mark").first
    expect(mark).to_have_attribute("x1", "280")  # iteration 21 of 1 to 21
    page.keyboard.press("j")
    expect(mark).to_have_attribute("x1", "140")
    page.locator("#curves svg").first.click(position={"x": 3, "y": 20})
    assert rewards(page) == ["3", "1"]  # those of the logged iteration that is nearest
    expect(mark).to_have_attribute("x1", "0")
    page.get_by_text("All metrics").click()
    expect(page.locator("#more .curve .title span")).to_have_text(["odd", "5"])
    expect(page.locator("#more .curve circle")).to_have_count(1)  # a curve of one point


def test_two_runs_side_by_side(opener: Opener, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [rollout(iteration=n, reply=f"one {n}") for n in (1, 11)], CURVES)
    tokens = {**TOKENS, "advantage": [4.0, 4.0, -4.0]}
    rows = [rollout(iteration=n, reply=f"two {n}", reward=5.0, per_token=tokens) for n in (1, 9)]
    two = write_run(tmp_path / "two", [*rows, rollout(iteration=1, prompt_id="b", reply="only two")], CURVES)
    page = opener.files(one, two)
    page.locator(".row", has_text="one 11").click()
    cards = page.locator(".response")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("iteration 11")
    expect(cards.nth(1)).to_contain_text("iteration 9")  # the nearest
    assert [alpha(color) for color in colors(page)] == pytest.approx([0.31, 0.155, 0, 0.62, 0.62, 0.62], abs=0.005)
    expect(page.locator("#curves .curve").first.locator("path")).to_have_count(2)
    page.locator(".row", has_text="only two").click()
    expect(cards.nth(1)).to_contain_text("one has no response to this prompt")
    page.get_by_label("Run").select_option("1")
    expect(page.locator(".row")).to_have_count(3)


def test_a_run_that_grows_while_it_is_watched(opener: Opener, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rollout()], CURVES)
    with LookServer([Run(run)], ["run"], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = opener.url(server.url)
        expect(page.locator(".row")).to_have_count(1)
        expect(page.locator("#state")).to_have_text("following the run")
        page.locator(".token").nth(1).focus()
        add_rows(run, [rollout(iteration=2, reward=7.0), "damaged", rollout(iteration=3, reply="new", prompt_id="b")])
        with (run / "metrics.csv").open("a") as file:
            file.write("30,9.0,4,\n")
        expect(page.locator(".row")).to_have_count(3)
        expect(page.locator("#damage")).to_have_text("1 damaged line skipped (the first is line 3)")
        expect(page.locator(".history tr")).to_have_count(3)
        expect(page.locator(".row[aria-selected=true] .top .number")).to_have_text("1.5")  # still the same response
        expect(page.locator(".token").nth(1)).to_be_focused()
        expect(page.locator("#curves .curve").first).to_contain_text("0 … 9")
        server.shutdown()
        thread.join()
    expect(page.locator("#state")).to_have_text("rlchat look has stopped")
    opener.troubles.clear()  # Chromium logs each request that is refused


def test_rows_without_token_data(opener: Opener) -> None:
    page = opener.run([old_rollout(), old_rollout(iteration=2)])
    expect(page.locator(".tokens")).to_have_text("Hello")
    expect(page.locator("#same")).to_have_text(
        "These rollouts have no numbers per token: train with --rollout_log.tokens true."
    )
    expect(page.locator(".history tr")).to_have_count(3)


def test_only_visible_rows_exist(opener: Opener) -> None:
    page = opener.run([rollout(iteration=n, reward=float(n)) for n in range(1, 2001)])
    assert page.locator(".row").count() < 30
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight / 2; }")
    page.wait_for_function("() => document.querySelector('.row .number').textContent < 1100")
    assert page.locator(".row").count() < 30
    expect(page.locator("#count")).to_have_text("2,000 responses")


def test_on_a_phone(opener: Opener) -> None:
    page = opener.run(ROWS, CURVES, viewport={"width": 360, "height": 740}, has_touch=True, color_scheme="dark")
    expect(page.locator("#content")).to_be_hidden()
    page.locator(".row", has_text="Good day").tap()
    expect(page.locator(".facts")).to_contain_text("reward 3")
    expect(page.locator("#side")).to_be_hidden()
    page.locator(".token").first.tap()
    expect(page.locator("#tip")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(22, 25, 27)"
    page.get_by_role("button", name="Back to the list").click()
    expect(page.locator("#list")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
