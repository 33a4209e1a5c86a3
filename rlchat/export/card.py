"""The model card of an exported model: README.md with the metadata that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from rlchat.errors import UserError
from rlchat.models.base.source import BaseSource
from rlchat.models.model_file import PolicyBundle
from rlchat.runs.report import Change, Report

_HOW_TO_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
messages = [{"role": "user", "content": "Hello, how are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

In transformers, the name of a control token in the text of a message becomes that token. Remove such names from the
text of users. rlchat itself never does this.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the user knows about a model and its file does not contain. Empty values are left out of the card."""

    data: str = ""
    license: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    run: Report | None = None  # the training run


def model_card(bundle: PolicyBundle, name: str, facts: CardFacts) -> str:
    """The text of README.md for the model ``name``: base model, training, data, reward, figures and licence."""
    about, config = bundle.about, bundle.model.backbone.transformer.config
    source = _source(config)
    licence = facts.license or (source.license if source else "")
    parameters = sum(weight.numel() for weight in bundle.model.backbone.parameters())
    rows = {
        "Base model": _base_row(source, config.model_type),
        "License of the base model": "" if source is None else source.license or "not known; see the base model",
        "Parameters": f"{parameters:,}",
        "Longest conversation": f"{bundle.max_length} tokens",
        "Tokenizer": f"{_code(bundle.tokenizer.name)}, {bundle.tokenizer.vocab_size:,} ids",
        "Last training stage": _code(str(about["stage"])) if about.get("stage") else "not known",
        "Batches in that stage": str(about.get("batches", "")),
        "Data": facts.data or _data_of(facts.run) or "not known",
        "Critic": str(about.get("critic", "")),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    parts = [
        _front_matter(licence, source.hub if source else ""),
        f"# {name}\n\nA chat model trained with rlchat.\n",
        f"| | |\n|---|---|\n{table}\n",
        _reward(about.get("reward")),
        _training(facts.run) if facts.run else "",
        _figures(facts.figures),
        _HOW_TO_USE,
    ]
    return "\n".join(part for part in parts if part)


def _source(config: Any) -> BaseSource | None:
    """Where the base model comes from; None for a model with random initial weights."""
    name = str(getattr(config, "name_or_path", "") or "")
    if (known := BaseSource.from_values(getattr(config, "rlchat_base", None))) is not None:
        return known
    return BaseSource.of(name) if name else None  # a model file of an earlier version has the name or the path only


def _base_row(source: BaseSource | None, family: str) -> str:
    if source is None:
        return f"none: a {family} model with random initial weights"
    if source.hub:
        return _code(source.hub)
    return f"a local model of the architecture {family}" + (f", called {source.title}" if source.title else "")


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of a JSON file such as ``checkpoints/report.json``. Raises :class:`UserError` for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); use a file such as checkpoints/report.json") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains no JSON object; use a file such as checkpoints/report.json")
    return content


def _front_matter(licence: str, base: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [rlchat, rlhf]"]
    lines += [f"license: {licence}"] if licence else []
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join([*lines, "---", ""])


def _reward(factors: Any) -> str:
    """The factors of the reward of PPO with their options."""
    if not factors:
        return ""
    lines = [
        f"- {_code(str(factor['class_path']))}: {_code(json.dumps(_without_places(factor), ensure_ascii=False))}"
        for factor in factors
    ]
    return "\n".join(
        ["## Reward", "", "The policy was optimized for the weighted sum of these factors:", "", *lines, ""]
    )


def _without_places(factor: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``factor``. Of an absolute path, only the name of the file remains."""
    options: dict[str, Any] = _named_only(factor.get("init_args", {}))
    return options


def _data_of(run: Report | None) -> str:
    """The names of the files that ``run`` was trained on, without their folders."""
    paths = (run.data_paths if run else None) or []
    return ", ".join(_code(PurePath(path).name) for path in paths)


def _training(run: Report) -> str:
    """The options of the run, figures before and after, alarms, versions, and the configuration that repeats it."""
    rows = [(name, value) for name, value in run.setup if name not in ("reward", "data")]  # the card has them elsewhere
    options = [f"| {name} | {_cell(_code(_named_only(value)))} |" for name, value in rows]
    parts = ["## Training run", "", "| option | value |", "|---|---|", *options, ""] if run.options else []
    for comparison, split in ((run.held_out, "held-out"), (run.rollouts, "training")):
        if comparison.changes:
            parts += [f"### Before and after, on {split} prompts", "", comparison.measured_on(split), ""]
            parts += _change_table(comparison.changes)
    if run.validation:
        parts += ["### First and last validation", "", *_change_table(run.validation)]
    if run.alarms is not None:
        alarms = [f"- Iteration {alarm['iteration']}: {_plain(str(alarm['message']))}" for alarm in run.alarms]
        parts += ["### Alarms", "", *(alarms or ["None."]), ""]
    if run.versions:
        listed = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        parts += [f"Versions: {_plain(listed)}.", ""]
    if run.options:
        config = yaml.safe_dump(_named_only(run.options), sort_keys=False, allow_unicode=True)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", config)), default=0))  # no text in it ends the block
        parts += ["To repeat the run, save this as `config.yaml`, with the places of your files:", ""]
        parts += ["```bash", "rlchat fit --config config.yaml", "```", "", f"{fence}yaml", config.rstrip(), fence, ""]
    return "\n".join(parts)


def _change_table(changes: Sequence[Change]) -> list[str]:
    rows = []
    for change in changes:
        between = "" if change.low is None else f"{change.low:+.3g} to {change.high:+.3g}"
        numbers = f"{change.before:.4g} | {change.after:.4g} | {change.after - change.before:+.3g}"
        rows.append(f"| {_cell(change.name)} | {numbers} | {between} |")
    return ["| | before | after | difference | 95 % interval |", "|---|---|---|---|---|", *rows, ""]


def _named_only(value: Any) -> Any:
    """``value`` with the name of the file instead of each absolute path."""
    if isinstance(value, Mapping):
        return {name: _named_only(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_named_only(part) for part in value]
    absolute = isinstance(value, str) and (value.startswith("~") or PurePath(value).is_absolute())
    return PurePath(value).name if absolute else value


def _plain(text: str) -> str:
    """``text`` as one line without markup: what a card could read as HTML or Markdown is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _cell(text: str) -> str:
    """``text`` within a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _figures(figures: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value:.6g} |" for name, value in _numbers(figures, "")]
    return "\n".join(["## Figures", "", "| figure | value |", "|---|---|", *rows, ""]) if rows else ""


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """All numbers of nested ``values``; the names of their places are joined by slashes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _code(text: str) -> str:
    return f"`{text}`"
