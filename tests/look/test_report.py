"""`rlchat report`: figures worked out by hand, the page and the picture, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from rlchat.__main__ import main
from rlchat.look.report import write_page
from rlchat.look.report_page import draw_slide, report_page
from rlchat.runs.report import compare_rollouts, difference_interval, read_report


def response(iteration: int, prompt: str, reward: float | None, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "prompt_id": prompt,
        "prompt": [{"role": "user", "content": prompt}],
        "reply": f"reply to {prompt}",
        "tokens": 4,
        "ended_by": "end of turn",
        "reward": reward,
        "factors": {"polite": reward},
        "kl": 0.0,
        "value": None,
        **more,
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two logged rollouts of twelve prompts, and two validations."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lightning_logs" / "ppo" / "version_0"
    folder.mkdir(parents=True)
    rows = [response(i, f"p{n}", i + n / 10) for i in (1, 11) for n in range(12)]
    rows[-1] |= {"reply": "<script>alert(1)</script> & $x$\u2028\u0085", "ended_by": "token limit"}
    (folder / "rollouts.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"iteration": 12, "pr'
    )
    (folder / "metrics.csv").write_text(
        "step,train/reward,val/reward,val/kl\n0,1.5,,\n9,,2.0,0.25\n10,11.5,,\n19,,3.5,0.75\n"
    )
    reward = {"class_path": "rlchat.Reward", "init_args": {"factors": [{"class_path": "my_rewards.polite"}]}}
    model = {"class_path": "rlchat.PPOModule", "init_args": {"kl_coef": 0.1, "reward": reward, "base_model": None}}
    config = {"seed_everything": 3, "model": model, "data": {"path": ["a.jsonl", "b.jsonl"]}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "rollouts.jsonl").open("ab") as file:  # damaged lines, and one that is cut inside a character
        file.write(b'oll\nnull\n{"iteration": "<b>", "prompt": []}\n{"reply": "\xc3')
    samples = [
        {"iteration": i, "prompt": [{"role": "user", "text": "Hi"}], "reply": text, "ended": True, "tokens": 3}
        for i, text in ((10, "early reply"), (20, "late reply"))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "versions.json").write_text('{"torch": "2.11.0"}')
    alarms = [{"iteration": 7, "what": "kl", "message": "the KL is 12 nats"}]
    (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alarms))
    return folder


def test_the_same_prompts_are_compared_in_pairs() -> None:
    # Each prompt gains 1; the mean goes from 0.45 to 1.45, and every resample of the pairs has the difference 1.
    rows = [response(i, f"p{n}", i + n / 10) for i in (0, 1) for n in range(10)]
    rows += [response(1, "new", 50.0)]  # only in one rollout
    found = compare_rollouts(rows)
    reward = found.changes[0]
    assert (reward.name, reward.low, reward.high) == ("reward", pytest.approx(1), pytest.approx(1))
    assert (reward.before, reward.after) == (pytest.approx(0.45), pytest.approx(1.45))
    assert (found.prompts, found.iterations, found.paired) == ((10, 10), (0, 1), True)


def test_responses_to_a_prompt_are_averaged_first() -> None:
    rows = [response(1, "a", 0.0), response(1, "a", 4.0), response(1, "b", 5.0)]  # means 2 and 5
    rows += [response(2, "c", 6.0, ended_by="token limit"), response(2, "c", None)]  # no finite reward
    rows += [response(2, "d", 7.0)]
    found = compare_rollouts(rows)
    assert not found.paired
    changes = {change.name: change for change in found.changes}
    assert (changes["reward"].before, changes["reward"].after) == (3.5, 7.0)
    assert (changes["truncated responses, fraction"].before, changes["truncated responses, fraction"].after) == (
        0,
        0.25,
    )
    assert compare_rollouts(rows[:3]).changes == []  # one rollout
    assert compare_rollouts([]).changes == []


def test_the_bootstrap_interval_is_that_of_the_normal_distribution_for_many_values() -> None:
    before, after = np.random.default_rng(1).normal(size=(2, 400))
    low, high = difference_interval(before, after, paired=False)
    center, half = after.mean() - before.mean(), 1.96 * np.sqrt(before.var() / 400 + after.var() / 400)
    assert (low, high) == (pytest.approx(center - half, abs=0.01), pytest.approx(center + half, abs=0.01))
    low, high = difference_interval(before, before + 2, paired=True)
    assert (low, high) == (pytest.approx(2), pytest.approx(2))


def test_the_page(run: Path) -> None:
    page = report_page(read_report(run))
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x$" in page
    for text in (
        "Iterations 1 and 11, the same 12 training prompts",
        '<td>reward</td><td class="number">1.55</td><td class="number">11.55</td><td class="number">+10</td>',
        '<td>truncated responses, fraction</td><td class="number">0</td><td class="number">0.08333</td>',
        '<td>kl</td><td class="number">0.25</td><td class="number">0.75</td><td class="number">+0.5</td>',
        "<td>kl_coef</td><td>0.1</td>",
        "<td>reward</td><td>my_rewards.polite()</td>",
        "<td>data</td><td>a.jsonl, b.jsonl</td>",
        "early reply",
        "late reply",
        "Iteration 7: the KL is 12 nats",
        "Versions: torch 2.11.0",
        "rlchat fit --config ",
        "data:image/png;base64,",
    ):
        assert text in page, text
    assert page.index("reply to p10") < page.index("reply to p0")  # the best first
    assert "base_model" not in page.split("<details>")[0]  # null


def test_held_out_responses_are_compared_with_intervals(run: Path) -> None:
    rows = [response(i, f"h{n}", 0.5 + 0.1 * i, kl=0.05 * i) for i in (10, 20) for n in range(11)]
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = read_report(run)
    page = report_page(report)
    assert "Iterations 10 and 20, the same 11 held-out prompts" in page
    assert (
        '<td>reward</td><td class="number">1.5</td><td class="number">2.5</td><td class="number">+1</td>'
        '<td class="note">+1 to +1</td>'
    ) in page
    assert report.validation == []  # val/reward and val/kl are the means of these responses
    texts = [text.get_text() for text in draw_slide(report).texts]
    assert any("the same 11 held-out prompts" in text for text in texts)


def test_a_run_with_metrics_alone(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "metrics.csv":
            path.unlink()
    page = report_page(read_report(run))
    assert "The folder has no config.yaml." in page
    assert "This run has not recorded alarms." in page
    assert "Before and after" not in page


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent.parent / "ppo_validate" / "version_0").mkdir(parents=True)
    (run.parent.parent / "ppo_validate" / "version_0" / "metrics.csv").write_text("step,val/reward\n0,1.0\n")
    assert main(["report"]) == 0  # the newest training run
    assert "report: report.html\npicture for a slide: report.png" in capsys.readouterr().out
    assert "Run ppo/version_0" in Path("report.html").read_text()
    assert imread("report.png").shape[:2] == (1125, 1999)
    assert main(["report"]) == 2
    assert "report.html already exists; set another --out, or use --force" in capsys.readouterr().err
    Path("report.html").unlink()
    assert main(["report"]) == 2
    assert "report.png already exists" in capsys.readouterr().err
    assert main(["report", str(run), "--force"]) == 0
    assert main(["report", "--out", "report.pdf"]) == 2
    assert "expected a file name that ends in .html" in capsys.readouterr().err
    assert main(["report", "nowhere", "--force"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["report", "lightning_logs/ppo", "--force"]) == 2
    assert "neither metrics.csv nor TensorBoard's event files" in capsys.readouterr().err


def test_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "no run under lightning_logs; train a model with `rlchat fit`" in capsys.readouterr().err


def test_the_slide_counts_what_it_shows(run: Path) -> None:
    rows = [
        response(i, f"p{n}", float(i), factors={f"factor_{k}": float(k) for k in range(7)})
        for i in (1, 2)
        for n in range(12)
    ]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text.get_text() for text in draw_slide(read_report(run)).texts]
    for name in ("reward", "response length, tokens", "truncated responses, fraction", "kl"):
        assert name in texts
    assert not any(text.startswith("reward/") for text in texts)
    assert texts[-1].startswith("The first 4 figures: Iterations 1 and 2, the same 12 training prompts")
    assert texts[-1].endswith("Others: first and last validation.")


def test_reports_of_an_earlier_demo_are_kept(run: Path) -> None:
    for _ in range(2):
        write_page(run, Path("report.html"), keep_older=True)
    assert len(list(Path().glob("report*.html"))) == len(list(Path().glob("report*.png"))) == 2
