"""`rlchat study overoptimization` with tiny models: its pieces, continuing, the results and the figure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlchat.__main__ import main
from rlchat.conversation import Check
from rlchat.errors import UserError
from rlchat.study import main as study
from rlchat.study.data import make_study_world
from rlchat.study.figure import draw
from rlchat.study.fits import Form
from rlchat.study.gold import gold_points, known_words
from rlchat.study.pieces import Piece, all_pieces, run_piece
from rlchat.study.results import Curve, collect, frontier, group_of, make_curve
from rlchat.study.schedule import ready
from rlchat.study.settings import QUICK, Settings
from rlchat.study.tables import markdown, rows_of, with_range

TINY = replace(
    QUICK,
    policy_width=16,
    widths=(16,),
    amounts=(8, 16),
    amount=16,
    kl_coefs=(0.0, 0.5),
    questions=60,
    held_out=20,
    tested_pairs=16,
    sft_epochs=1,
    proxy_rows=32,
    best_of=8,
    best_of_prompts=4,
    max_new_tokens=6,
    ppo_iterations=4,
    ppo_batch=8,
    critic_warmup=1,
    record_every=1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny study of seed 0."""
    folder = tmp_path_factory.mktemp("study") / "out"
    study.open_folder(folder, TINY)
    study.run_all(folder, TINY, all_pieces(TINY, (0,)), 1, Console(quiet=True))
    return folder


def test_every_piece_leaves_its_file(finished: Path) -> None:
    names = {piece.name for piece in all_pieces(TINY, (0,))}
    assert {str(path.relative_to(finished).with_suffix("")) for path in finished.glob("seed0/*.json")} == names
    assert len(names) == 3 + 2 * 2 + 3


def test_a_curve_starts_at_the_initial_policy(finished: Path) -> None:
    points = json.loads((finished / "seed0/ppo-16-16-kl0.json").read_text())["points"]
    assert [point["iteration"] for point in points] == [0, 1, 2, 3, 4]
    assert points[0]["kl"] == points[1]["kl"] == 0  # the first iteration trains the critic only
    assert points[-1]["kl"] != 0
    assert all(math.isfinite(point[name]) for point in points for name in ("kl", "gold", "proxy", "tokens"))


def test_best_of_one_is_the_mean_and_best_of_all_the_maximum_of_the_proxy(finished: Path) -> None:
    found = json.loads((finished / "seed0/best_of-16-8.json").read_text())
    pool = json.loads((finished / "seed0/pool.json").read_text())
    assert found["n"] == [1, 2, 4, 8]
    assert found["kl"][0] == 0
    assert found["gold"][0] == pytest.approx(np.mean(pool["gold"]))
    assert found["proxy"] == sorted(found["proxy"])


def test_the_same_piece_gives_the_same_numbers_again(finished: Path) -> None:
    piece = Piece("ppo", 0, 16, 16, 0.5)
    before = json.loads((finished / f"{piece.name}.json").read_text())
    assert run_piece(finished, TINY, piece)["points"] == before["points"]


def test_the_report_of_a_finished_study(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.report(finished, TINY, (0,), Console(width=200))
    results = json.loads((finished / "results.json").read_text())
    assert [(g["method"], g["comparisons"], g["kl_coef"]) for g in results["groups"]] == [
        ("best_of", 8, 0.0),
        ("best_of", 16, 0.0),
        ("rl", 8, 0.0),
        ("rl", 16, 0.0),
        ("rl", 16, 0.5),
    ]
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len((finished / "table.md").read_text().splitlines()) == 2 + 5 + 1 + 2 + 1
    assert "best of n" in capsys.readouterr().out


def test_a_study_continues_where_it_stopped(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Settings", lambda: TINY)
    monkeypatch.setattr("rlchat.study.schedule.run_piece", lambda *_: pytest.fail("a finished piece is done again"))
    assert main(["study", "overoptimization", "--out", str(finished), "--seeds", "0", "--jobs", "1"]) == 0


def test_other_settings_are_refused(finished: Path) -> None:
    with pytest.raises(UserError, match=r"other settings: ppo_iterations is 4 there and 5 here; set another --out"):
        study.open_folder(finished, replace(TINY, ppo_iterations=5))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not the folder of a study; set another --out"):
        study.open_folder(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_broken_settings_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / study.SETTINGS_FILE).write_text("[1")
    with pytest.raises(UserError, match="does not hold the settings"):
        study.open_folder(tmp_path, TINY)


@pytest.mark.parametrize("words", [["overoptimization", "--jobs", "0"], ["overoptimization", "--seeds", "x"], []])
def test_wrong_options_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *words]) == 2
    assert "usage: rlchat study" in capsys.readouterr().err


def test_pieces_come_after_what_they_need() -> None:
    for settings in (Settings(), QUICK, TINY):
        known: set[str] = set()
        for piece in all_pieces(settings, (0, 3)):
            assert set(piece.needs(settings)) <= known
            known.add(piece.name)


def test_only_pieces_whose_needs_are_finished_start() -> None:
    pieces = all_pieces(TINY, (0,))
    assert [piece.kind for piece in ready(TINY, pieces, [])] == ["sft"]
    assert [piece.kind for piece in ready(TINY, pieces[1:], [])] == ["pairs", "pool"]
    assert ready(TINY, pieces[1:], pieces[:1]) == []


# ---- the gold reward -------------------------------------------------------------------------------------------------

BEE = Check(("hive",), ("nest", "barn"))
KNOWN = known_words(["a bee lives in a hive nest i do not know you fool hive hive home of"] * 3)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("A bee lives in a hive.", 2 + 1 - 0.25),
        ("Hive.", 2 + 0.2),
        ("Hive", 2 + 0.2 - 0.5),
        ("A bee lives in a nest.", -1 + 1 - 0.25),
        ("Hive, you fool.", 2 + 0.6 - 1.5),
        ("I do not know.", 0.8),
        ("A bee livves in a hive.", 2 + 1 - 0.25 - 0.5),
        ("Hive hive hive.", 2 + 0.2 - 0.5),
        ("A bee lives in a hive I do not know.", 2 + 1 - 0.25 - 2 * 0.25),
        ("", -0.5),
    ],
)
def test_points_by_hand(text: str, points: float) -> None:
    assert gold_points(BEE, text, KNOWN) == pytest.approx(points)


def test_rare_words_are_not_known() -> None:
    assert known_words(["Moo moo", "moo, mo"]) == {"moo"}


def test_held_out_questions_are_not_trained_on() -> None:
    world = make_study_world(60, 20, seed=1)
    held_out, training = ({one.prompt.messages[0].text for one in part} for part in (world.held_out, world.training))
    assert (len(held_out), len(training)) == (20, 40)
    assert not held_out & training


# ---- curves ----------------------------------------------------------------------------------------------------------


FORMS: tuple[Form, ...] = ("best_of", "rl")


def curve(seed: int, d: list[float], gold: list[float]) -> Curve:
    return Curve(seed, np.array(d), np.array(gold), np.array(gold) * 2)


def test_a_curve_is_relative_to_the_initial_policy() -> None:
    made = make_curve(0, kl=[-0.01, 4.0], gold=[1.0, 3.0], proxy=[0.5, 2.5], gold_std=4.0)
    assert made.d.tolist() == [0.0, 2.0]
    assert made.gold.tolist() == [0.0, 0.5]
    assert made.proxy.tolist() == [0.0, 2.0]
    assert made.best == (2.0, 0.5)


def test_the_penalty_is_compared_at_the_same_kl() -> None:
    free = [curve(0, [0, 1, 3], [0.0, 1.0, 0.0]), curve(1, [0, 1, 2], [0.0, 2.0, 1.0])]
    bound = [curve(0, [0, 1, 2], [0.0, 1.0, 0.75]), curve(1, [0, 1, 2.5], [0.0, 1.5, 1.25])]
    groups = [group_of("rl", 16, 8, coef, 0.7, curves) for coef, curves in ((0.0, free), (0.1, bound))]
    # At √KL 2, seed 0 without a penalty is halfway from 1 to 0; seed 1 never gets to 2.5 and ends at 1.
    assert frontier(groups) == [(0.1, 2.25, 1.0, (0.5 + 1.0) / 2)]


def test_the_table_shows_ranges_over_seeds() -> None:
    assert with_range(1.234, [1.0, 2.5]) == "1.23 (1.00 to 2.50)"
    assert with_range(math.inf, [math.inf, 2.0]) == "none (2.00 to none)"
    assert with_range(0.5, [0.5]) == "0.50"
    group = group_of("best_of", 16, 8, 0.0, 0.7, [curve(0, [0, 1, 2, 3], [0.0, 1.5, 2.0, 1.5])])  # d (2 - d / 2)
    (row,) = rows_of([group])
    assert row[:9] == ("best of n", "16", "8", "–", "0.70", "2.00", "0.50", "1.00", "2.00")
    assert "| best of n | 16 | 8 |" in markdown([group])


def test_the_figure_has_a_line_per_group() -> None:
    d, gold = [0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 2.0, 1.5]
    kinds: list[tuple[Form, int, int, float]] = [(form, 16, n, 0.0) for form in FORMS for n in (8, 16)]
    kinds += [("rl", 32, 8, 0.0), ("rl", 64, 8, 0.0), ("rl", 16, 8, 0.1)]
    groups = [group_of(*kind, 0.7, [curve(0, d, gold)]) for kind in kinds]
    axes = draw(groups, amount=8, width=16).axes
    labels = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in axes]
    assert labels == [["8", "16"], ["8", "16"], ["16", "32", "64"], ["0", "0.1"]]


@pytest.mark.slow
def test_gold_and_proxy_part_in_the_quick_study(tmp_path: Path) -> None:
    """What the proxy promises is more than what the gold reward gains, for best-of-n and for PPO without a penalty."""
    out = tmp_path / "quick"
    assert main(["study", "overoptimization", "--quick", "--out", str(out)]) == 0
    groups = [group for group in collect(out, QUICK, (0,)) if group.amount == 64 and group.kl_coef == 0]
    assert [group.form for group in groups] == ["best_of", "rl"]
    for group in groups:
        (measured,) = group.curves
        assert measured.proxy[-1] > measured.gold[-1] + 0.3
