"""The model card of an exported model: README.md with the metadata that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlchat.errors import UserError
from rlchat.models.base.source import BaseSource
from rlchat.models.model_file import PolicyBundle

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
        "Data": facts.data or "not known",
        "Critic": str(about.get("critic", "")),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    parts = [
        _front_matter(licence, source.hub if source else ""),
        f"# {name}\n\nA chat model trained with rlchat.\n",
        f"| | |\n|---|---|\n{table}\n",
        _reward(about.get("reward")),
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
    options = dict(factor.get("init_args", {}))
    for name, value in options.items():
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
            options[name] = Path(value).name
    return options


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
