"""The factors of docs/rewards.md through the command line: `fit` with all of them, then the chat with the result."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.command_line import rlchat
from helpers.reward_service import Service, lengths
from helpers.small_classifier import save_bert, word_tokenizer

from rlchat.__main__ import main
from rlchat.models.model_file import load_policy

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
MODEL = "checkpoints/rl_chat_model_tiktoken.pt"
NAMES = ["polite", "verified", "hf_reward", "helpfulness"]


def factors_of_docs(url: str, classifier: str) -> list[dict[str, object]]:
    """The list entries of the YAML blocks in the documentation, with an address and a model that exist here."""
    blocks = re.findall(r"```yaml\n(- class_path.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    factors = [factor for block in blocks for factor in yaml.safe_load(block)]
    assert [factor["class_path"].rpartition(".")[2] for factor in factors] == [
        "FunctionReward",
        "Verified",
        "HFReward",
        "HTTPReward",
    ]
    factors[2]["init_args"]["model"] = classifier
    factors[3]["init_args"]["url"] = url
    return factors


def write_run(folder: Path, url: str) -> list[str]:
    """The data and configuration of a short run in ``folder``; returns its command line."""
    word_tokenizer(folder / "bert")
    config = {"model": {"init_args": {"reward": {"class_path": "rlchat.Reward"}}}}
    config["model"]["init_args"]["reward"]["init_args"] = {"factors": factors_of_docs(url, save_bert(folder / "bert"))}  # type: ignore[dict-item]
    Path("rewards.yaml").write_text(yaml.safe_dump(config))
    source = re.search(r"```python\n(def polite.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None
    Path("my_rewards.py").write_text(source[1])
    rows = [{"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(12)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["fit", "--config", "smoke", "--config", "rewards.yaml", "--data.path", "sums.jsonl", "--data.batch_size=2"]


@pytest.mark.slow
def test_every_factor_of_the_documentation_trains_and_chats(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.syspath_prepend(str(workplace))
    with Service(lengths) as service:
        rlchat(*write_run(workplace, service.url))
        asked = {item["messages"][-1]["content"] for body in service.requests for item in body["items"]}
        assert asked <= {f"What is {n} + 1?" for n in range(12)}
        (metrics,) = Path("lightning_logs").glob("*/*/metrics.csv")
        with metrics.open() as file:
            columns = {name for row in csv.DictReader(file) for name, value in row.items() if value}
        assert {f"reward/{name}" for name in NAMES} <= columns
        assert "val/answer_accuracy" in columns
        described = load_policy(MODEL).about["reward"]
        assert [row["init_args"].get("name") for row in described] == ["polite", None, "hf_reward", "helpfulness"]
        # The chat scores with the same factors: Verified only where the row has an answer.
        Path("ask.jsonl").write_text('{"prompt": "What is 1 + 1?", "answer": 2}\n{"prompt": "Hello"}\n')
        capsys.readouterr()
        assert main(["chat", MODEL, "--prompts", "ask.jsonl", "--max_new_tokens", "4"]) == 0
        out, err = capsys.readouterr()
    with_answer, without = json.loads(out)
    assert list(with_answer["factors"]) == NAMES
    assert "unscored" not in with_answer
    assert list(without["factors"]) == ["polite", "hf_reward", "helpfulness"]
    assert without["unscored"] == ["verified"]
    assert "verified does not score 1 of 2 responses (the prompt has no answer to check)" in err


def test_a_service_that_fails_stops_the_run_with_its_name(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.syspath_prepend(str(workplace))
    with Service(lambda *_: (200, b'{"scores": []}')) as service:
        assert main(write_run(workplace, service.url)) == 2
    assert f"reward factor 'helpfulness': {service.url} answered 0 scores for" in capsys.readouterr().err
