"""`HFReward`: a sequence-classification model of transformers as a factor."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.errors import at_least_one, one_line
from rlchat.models.families import positions_of
from rlchat.rewards.base import Factor, Reply, RowCount
from rlchat.utils.hub import reachable_source

_log = logging.getLogger("rlchat")

Texts = Literal["auto", "chat", "pair", "response"]
Output = Literal["auto", "logit", "probability"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Turn = dict[str, str]

# For a model and a tokenizer that state no limit.
_DEFAULT_LENGTH = 2048


class HFReward(Factor):
    """The output of a sequence-classification model of transformers, which reads text with its own tokenizer.

    The model is loaded when the first response is scored, and then runs on the policy's device unless ``device`` is
    set. Only safetensors or ``weights_only`` files are read. Control tokens inside a message are broken up by a space,
    so that no response can end its own turn.

    Truncation: what exceeds ``max_length`` loses its oldest messages first, then a leading system message, then the
    beginning of the last user message, then the end of the response. A warning counts such responses, at the first and
    then at each power of ten.

    Args:
        model: a folder, or the name of a model on the hub.
        weight: of the factor.
        text: what the model reads. ``chat``: prompt and response in the tokenizer's chat template; ``pair``: the
            prompt's messages, joined by empty lines, and the response as a pair of texts; ``response``: the response
            alone. ``auto``: ``chat`` if the tokenizer has a template, else ``pair``.
        label: the name or number of the label whose output is the score; required if the model has several.
        output: ``logit``, or ``probability`` (the softmax over the labels; with one label, the sigmoid). ``auto``:
            the logit of a model with one label, else the probability.
        clip: scores are clipped to ± this value, which bounds what an error of the model can earn.
        max_length: tokens in one row; by default the model's limit.
        batch_size: responses per forward pass.
        device: of the model; ``auto`` is the device of the policy that is trained or evaluated.
        dtype: of the weights; ``auto`` is that of the file.
        trust_remote_code: whether to run code that comes with the model.
        name: the name in logs and errors; by default ``hf_reward``.

    Raises:
        UserError: for invalid options; when called, if the model cannot be loaded or used.
    """

    def __init__(
        self,
        model: str,
        weight: float = 1.0,
        text: Texts = "auto",
        label: int | str | None = None,
        output: Output = "auto",
        clip: float = 10.0,
        max_length: int | None = None,
        batch_size: int = 16,
        device: str = "auto",
        dtype: DType = "auto",
        trust_remote_code: bool = False,
        name: str = "",
    ) -> None:
        super().__init__(weight)
        self._name = name
        self.model = model
        self.text = text
        self.label = label
        self.output = output
        self.clip = clip
        self.max_length = max_length
        self.batch_size = at_least_one("HFReward", "batch_size", batch_size)
        self.device = device
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.cut = RowCount()
        """The responses that did not fit into ``max_length`` with their prompts."""
        self._device = self.device_named(device) or torch.device("cpu")
        self._loaded: _Classifier | None = None
        if not clip > 0:
            raise self.error(f"invalid value {clip} for clip: expected a number above 0")
        if max_length is not None:
            at_least_one("HFReward", "max_length", max_length)

    def to(self, device: torch.device) -> None:
        """Moves the model to ``device``, now or when it is loaded, unless the configuration sets another."""
        if self.device == "auto":
            self._device = device
            if self._loaded is not None:
                self._loaded.model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Scores ``[batch]``, clipped."""
        if not replies:
            return torch.zeros(0)
        classifier = self._classifier()
        rows = [self._row(classifier, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        if self.cut.add(sum(cut for _, cut in rows), len(rows)):
            _log.warning(
                "reward factor '%s': %d of %d responses exceed max_length %d of %s with their prompts and were cut",
                self.name,
                self.cut.found,
                self.cut.rows,
                classifier.max_length,
                self.model,
            )
        scores = []
        for start in range(0, len(rows), self.batch_size):
            batch = classifier.tokenizer.pad(
                [encoded for encoded, _ in rows[start : start + self.batch_size]], return_tensors="pt"
            ).to(self._device)
            # The same numbers in training, whose precision may be lower, and in a chat.
            with torch.autocast(self._device.type, enabled=False):
                logits = classifier.model(**batch).logits.float()
            scores.append(self._score(logits, classifier.label).cpu())
        return torch.cat(scores).clamp(-self.clip, self.clip)

    def _score(self, logits: Tensor, label: int) -> Tensor:
        """[batch] from the logits [batch, labels]."""
        several = logits.shape[1] > 1
        if self.output == "logit" or (self.output == "auto" and not several):
            return logits[:, label]
        return logits.softmax(1)[:, label] if several else logits[:, 0].sigmoid()

    def _row(self, classifier: _Classifier, prompt: Conversation, reply: Reply) -> tuple[dict[str, Any], bool]:
        """The encoded prompt and response, and whether something was cut."""
        turns = [{"role": m.role, "content": classifier.plain(m.text)} for m in prompt.messages]
        response = classifier.plain(reply.text)

        def encode(turns: list[Turn], response: str) -> dict[str, Any]:
            try:
                return classifier.encode(turns, response)
            except Exception as error:  # a chat template raises jinja2's errors, and its own
                if classifier.text != "chat":
                    raise
                raise self.error(
                    f"the chat template of {self.model} refuses the conversation ({error}); set text to pair"
                ) from error

        encoded = encode(turns, response)
        cut = len(encoded["input_ids"]) > classifier.max_length
        while (excess := len(encoded["input_ids"]) - classifier.max_length) > 0:
            shorter = shortened(turns, response, excess / len(encoded["input_ids"]), classifier.text != "response")
            if shorter is None:
                raise self.error(f"max_length {classifier.max_length} leaves no room for text; raise it")
            turns, response = shorter
            encoded = encode(turns, response)
        return encoded, cut

    def _classifier(self) -> _Classifier:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> _Classifier:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # slow to import

        try:
            source = reachable_source(self.model)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=self.trust_remote_code)
            dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, trust_remote_code=self.trust_remote_code, dtype=dtype, output_loading_info=True
            )
        except Exception as error:  # of many kinds: no file, no network, no package, a damaged file
            if Path(self.model).is_dir():
                where = "the folder holds no model and tokenizer that transformers can load"
            else:
                where = "it is neither a folder nor a model that could be downloaded"
            raise self.error(f"model {self.model}: {where}: {one_line(error)[:300]}") from error
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one from nothing
            raise self.error(
                f"model {self.model}: it comes without a vocabulary; add the files of its tokenizer, such as "
                f"tokenizer.json"
            )
        if missing := sorted(info["missing_keys"]):
            raise self.error(
                f"model {self.model} has no trained classification head: {', '.join(missing[:3])} missing in its file"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise self.error(f"model {self.model}: its tokenizer has no token for padding; set pad_token in its files")
        if model.config.pad_token_id is None:  # decoders look for the last token that is no padding
            model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = "right"  # the positions of a row then do not depend on the rows beside it
        text = self.text
        if text == "auto":
            text = "chat" if tokenizer.chat_template else "pair"
        if text == "chat" and not tokenizer.chat_template:
            raise self.error(f"model {self.model}: its tokenizer has no chat template; set text to pair or response")
        limit = _limit(model.config, tokenizer)
        if self.max_length is not None and self.max_length > limit:
            raise self.error(f"max_length {self.max_length} is more than the {limit} tokens of model {self.model}")
        return _Classifier(
            model.eval().requires_grad_(False).to(self._device),
            tokenizer,
            text,
            self._label(model.config),
            self.max_length or limit,
        )

    def _label(self, config: Any) -> int:
        """The column of the logits that is the score."""
        labels = {int(number): str(name) for number, name in config.id2label.items()}
        if self.label is None and len(labels) == 1:
            return 0
        number = next((n for n, name in labels.items() if self.label in (n, str(n), name)), None)
        if number is None:
            what = "label is not set" if self.label is None else f"invalid value {self.label!r} for label"
            named = ", ".join(f"{number} ({name})" for number, name in labels.items())
            raise self.error(f"{what}: expected one of the labels of {self.model}: {named}")
        return number


@dataclass(frozen=True, slots=True)
class _Classifier:
    """A model with its tokenizer, and how to use them."""

    model: Any
    tokenizer: Any
    text: Texts
    label: int
    max_length: int

    def plain(self, text: str) -> str:
        """``text`` with a space inside each control token, which is then ordinary text."""
        for token in sorted(self.tokenizer.all_special_tokens, key=len, reverse=True):
            if len(token) > 1:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def encode(self, turns: list[Turn], response: str) -> dict[str, Any]:
        """The ids of one row, and what else the model reads."""
        options: dict[str, Any] = {"verbose": False}  # no warning about long texts, which are cut later
        if self.text == "chat":
            whole = [*turns, {"role": "assistant", "content": response}]
            rendered = self.tokenizer.apply_chat_template(whole, tokenize=False)
            return dict(self.tokenizer(rendered, add_special_tokens=False, **options))
        if self.text == "pair":
            prompt = "\n\n".join(turn["content"] for turn in turns)
            # As a batch: as single texts, an empty response would not make a pair.
            return {name: rows[0] for name, rows in self.tokenizer([(prompt, response)], **options).items()}
        return dict(self.tokenizer(response, **options))


def shortened(
    turns: list[Turn], response: str, fraction: float, with_prompt: bool = True
) -> tuple[list[Turn], str] | None:
    """``turns`` and ``response`` with the next part removed that truncation removes; None if nothing is left.

    Args:
        turns: the messages of the prompt.
        response: the response.
        fraction: of the text that is too much; so many characters are cut where a message is cut.
        with_prompt: False if the model does not read the prompt.
    """
    if with_prompt:
        system = turns[:1] if turns and turns[0]["role"] == "system" else []
        rest = turns[len(system) :]
        # The oldest message, and the response to it.
        following = next((i for i, turn in enumerate(rest) if i and turn["role"] == "user"), 0)
        if following:
            return [*system, *rest[following:]], response
        if system:
            return rest, response
        if turns and (last := turns[-1]["content"]):
            characters = math.ceil((len(last) + len(response)) * fraction)
            return [*turns[:-1], {**turns[-1], "content": last[characters:]}], response
    if response:
        return turns, response[: -math.ceil(len(response) * fraction)]
    return None


def _limit(config: Any, tokenizer: Any) -> int:
    """The largest number of tokens that model and tokenizer take."""
    limit = min(positions_of(config) or tokenizer.model_max_length, tokenizer.model_max_length)
    return int(limit) if limit < 1 << 30 else _DEFAULT_LENGTH
