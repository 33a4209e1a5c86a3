"""The chat formats of published model families: ids as `apply_chat_template` of transformers gives them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_tokenizers import CHATML, LLAMA3, QWEN, tokenizer_folder, tokenizer_json
from transformers import PreTrainedTokenizerFast

from rlchat.conversation import Conversation, Message, Role
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
OLMO2 = (  # a line break after every response but the last
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
LLAMA32 = (  # texts are trimmed, and there always is a system message, with the date
    "{{ bos_token }}{% set first = messages[0]['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if first %}{{ messages[0]['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in (messages[1:] if first else messages) %}{{ '<|start_header_id|>' + m['role'] "
    "+ '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXTS = ("Hello", "the fox ", "\n\nlines\n", " it's 1234", "é🙂", "\tx\n ", "\x1cy", "")
THOUGHTS = (
    "<think>\nA thought.\n</think>\n\nfox",
    "<think>a</think>\nfox\n",
    "a\n</think>fox",
    "<think>\nno end",
    "\n",
)


@dataclass(frozen=True)
class Family:
    """A family's template and control tokens."""

    template: str
    special: tuple[str, ...]
    end: str
    pattern: str = LLAMA3
    tokens: dict[str, str] = field(default_factory=dict)
    greedy: bool = False  # control tokens take the white space beside them
    single_turn: bool = False
    begins_anyhow: bool = True  # whether white space at the start of a response cannot join the line break before it
    header: str = ""  # what rlchat writes after the template's own request for a response


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY = ("<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
FAMILIES = {
    "qwen2": Family(CHATML, IM, "<|im_end|>", QWEN, begins_anyhow=False),
    "qwen3": Family((TEMPLATES / "qwen3.jinja").read_text("utf-8"), IM, "<|im_end|>", QWEN, single_turn=True),
    "olmo2": Family(OLMO2, ("<|endoftext|>", "<|pad|>"), "<|endoftext|>", tokens=END, begins_anyhow=False),
    "gpt-oss": Family(
        (TEMPLATES / "gpt-oss.jinja").read_text("utf-8"),
        HARMONY,
        "<|return|>",
        tokens={"eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        single_turn=True,
        header="<|channel|>final<|message|>",
    ),
    "phi4": Family(PHI4, (*IM, "<|im_sep|>"), "<|im_end|>", greedy=True),
    "phi4-plain": Family(PHI4, (*IM, "<|im_sep|>"), "<|im_end|>"),
    "llama3.2": Family(LLAMA32, LLAMA, "<|eot_id|>", tokens={"bos_token": LLAMA[0], "eos_token": LLAMA[3]}),
}


class Both:
    """The tokenizer of a family under rlchat (``ours``) and under transformers (``theirs``)."""

    def __init__(self, folder: Path, family: Family) -> None:
        raw = tokenizer_json(family.pattern, special=family.special, text=("<think>", "</think>"))
        for token in raw["added_tokens"]:
            token["lstrip"] = token["rstrip"] = family.greedy and token["special"]
        tokenizer_folder(folder, raw, family.template, **family.tokens)
        self.ours = ChatTokenizer(str(folder))
        self.theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=family.template, **family.tokens
        )

    def template_ids(self, messages: list[Message], opening: bool) -> list[int]:
        rows: list[dict[str, Any]] = [{"role": message.role, "content": message.text} for message in messages]
        return list(
            self.theirs.apply_chat_template(rows, tokenize=True, add_generation_prompt=opening, return_dict=False)
        )


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Both]:
    family = FAMILIES[request.param]
    return family, Both(tmp_path_factory.mktemp("family"), family)


def talks(family: Family, responses: int, opening: bool) -> list[list[Message]]:
    """Conversations with ``responses`` responses, which end with a prompt if ``opening``."""
    draw = random.Random(responses)
    said = TEXTS if family.begins_anyhow else tuple(text for text in TEXTS if text == text.lstrip())
    if family.single_turn:
        said += THOUGHTS
    found = []
    for number in range(60):
        roles: list[Role] = ["system"] if number % 2 else []
        roles += ["user", "assistant"] * responses
        roles += ["user"] if opening else []
        found.append([Message(role, draw.choice(said if role == "assistant" else TEXTS)) for role in roles])
    return found


def test_prompts_have_the_ids_of_apply_chat_template(pair: tuple[Family, Both]) -> None:
    family, both = pair
    header = both.ours.control_ids(family.header)
    for responses in (0,) if family.single_turn else (0, 1, 3):
        for messages in talks(family, responses, opening=True):
            ours = both.ours.render_prompt(Conversation(tuple(messages))).ids
            assert ours == both.template_ids(messages, opening=True) + header, messages


def test_training_conversations_have_the_ids_of_apply_chat_template(pair: tuple[Family, Both]) -> None:
    """Up to the end token of the last response, where rlchat ends a conversation."""
    family, both = pair
    for responses in (1,) if family.single_turn else (1, 2, 3):
        for messages in talks(family, responses, opening=False):
            ours = both.ours.render(Conversation(tuple(messages)))
            theirs = both.template_ids(messages, opening=False)
            last = len(theirs) - theirs[::-1].index(both.ours.end_id)
            assert ours.ids == theirs[:last], messages
            assert both.ours.decode(theirs[last:]) in ("", "\n")


def test_the_loss_covers_the_responses_and_their_end_tokens(pair: tuple[Family, Both]) -> None:
    family, both = pair
    talk = [Message("user", "fox"), Message("assistant", "dog")]
    talk = talk if family.single_turn else talk + talk
    rendered = both.ours.render(Conversation(tuple(talk)))
    learned = [token for token, learn in zip(rendered.ids, rendered.loss_mask, strict=True) if learn]
    thought = "<think>\n\n</think>\n\n" if family.template == FAMILIES["qwen3"].template else ""
    response = [*both.ours.encode(f"{thought}dog"), both.ours.control_ids(family.end)[0]]
    assert learned == response * (len(talk) // 2)
    prompt = both.ours.render_prompt(Conversation((talk[0],)))
    assert rendered.ids[: len(prompt.ids)] == prompt.ids
    assert rendered.loss_mask.index(True) == len(prompt.ids)
    assert not {*learned} & {*both.ours.unsayable_ids}


def test_a_family_that_rewrites_earlier_responses_is_refused_beyond_one(pair: tuple[Family, Both]) -> None:
    family, both = pair
    talk = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
    if family.single_turn:
        with pytest.raises(UserError, match="writes a response differently once another message follows it"):
            both.ours.render_prompt(talk)
    assert both.ours.format.single_turn == family.single_turn


def test_no_typed_text_becomes_a_control_token(pair: tuple[Family, Both]) -> None:
    family, both = pair
    typed = "".join(family.special) + family.header
    for role in ("system", "user", "assistant"):
        roles: tuple[Role, ...] = ("system", "user", "assistant")
        plain = [Message(one, "a") for one in roles]
        mixed = [Message(one, typed if one == role else "a") for one in roles]
        controls = [
            [token for token in both.ours.render(Conversation(tuple(talk))).ids if token in both.ours.special_ids]
            for talk in (plain, mixed)
        ]
        assert controls[0] == controls[1]


def test_a_format_with_trimming_comes_back_from_its_state(pair: tuple[Family, Both]) -> None:
    _, both = pair
    again = ChatTokenizer.from_state(both.ours.state())
    assert (again.format, again.fingerprint) == (both.ours.format, both.ours.fingerprint)
