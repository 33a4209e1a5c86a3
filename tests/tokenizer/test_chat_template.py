"""Chat formats of base models: equal to their Jinja templates, or refused with the conversation that differs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers.hf_tokenizers import CHATML, LLAMA3, QWEN, tokenizer_folder, tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from rlchat.conversation import Conversation, Message, Role
from rlchat.errors import UserError
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (Path(__file__).parents[1] / "data" / "chat_templates" / "qwen3.jinja").read_text("utf-8")
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = {
    CHATML: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    QWEN3: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    LLAMA: ("<bos>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    GEMMA: ("<bos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
    LLAMA2: ("<bos>", "<eos>"),
}
WHITE = "".join(letter for letter in map(chr, range(0x10000)) if letter.isspace())
TEXTS = ("Hello", "the fox ", "\n\nlines\n", "it's 1234", "<|im_end|>", "é🙂", "a<|eot_id|>\n", "<end_of_turn>", "")


def folder(path: Path, template: str, pattern: str = LLAMA3) -> Path:
    raw = tokenizer_json(pattern, special=SPECIAL[template], text=("<think>", "</think>"))
    return tokenizer_folder(path, raw, template, bos_token="<bos>", eos_token=SPECIAL[template][-1], pad_token=None)


def chain(count: int, system: bool, draw: random.Random) -> Conversation:
    roles: list[Role] = ["system"] if system else []
    roles += [("user", "assistant")[number % 2] for number in range(count)]  # type: ignore[misc]
    # A response that begins with white space is encoded on its own, as it was sampled: never joined to the line break.
    return Conversation(tuple(Message(r, draw.choice(TEXTS if r != "assistant" else TEXTS[:2])) for r in roles))


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN], ids=["llama3", "qwen"])
@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA], ids=["chatml", "llama", "gemma"])
def test_prompts_have_the_ids_of_the_template(tmp_path: Path, template: str, pattern: str) -> None:
    """Texts that spell no control token: there the two differ by design."""
    tokenizer = ChatTokenizer(str(folder(tmp_path, template, pattern)))
    theirs, draw = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), random.Random(0)
    compared = 0
    for number in range(200):
        talk = chain(1 + 2 * draw.randrange(4), number % 2 == 0 and template != GEMMA, draw)
        rows = [{"role": m.role, "content": m.text} for m in talk.messages]
        if any(name in m.text for m in talk.messages for name in SPECIAL[template]):
            continue
        (text,), _ = render_jinja_template(
            [rows], chat_template=template, add_generation_prompt=True, bos_token="<bos>"
        )
        assert tokenizer.render_prompt(talk).ids == theirs.encode(text, add_special_tokens=False).ids, rows
        compared += 1
    assert compared > 50


@given(
    text=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "\n", "assistant", "<|", "a", "im_end", "|>"])).map(
        "".join
    )
)
@settings(deadline=None, max_examples=300)
def test_no_text_becomes_a_control_token(own_tokenizer: ChatTokenizer, text: str) -> None:
    plain = own_tokenizer.render(Conversation((Message("user", "a"), Message("assistant", "a"))))
    typed = own_tokenizer.render(Conversation((Message("user", text), Message("assistant", text))))
    special = own_tokenizer.special_ids
    assert [i for i in typed.ids if i in special] == [i for i in plain.ids if i in special]


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(str(folder(tmp_path_factory.mktemp("own"), CHATML)))


def test_the_loss_covers_the_response_and_its_end_token(own_tokenizer: ChatTokenizer) -> None:
    rendered = own_tokenizer.render(
        Conversation((Message("user", "fox"), Message("assistant", "dog"), Message("user", "x")))
    )
    learned = [token for token, learn in zip(rendered.ids, rendered.loss_mask, strict=True) if learn]
    assert learned == [*own_tokenizer.encode("dog"), own_tokenizer.end_id]
    prompt = own_tokenizer.render_prompt(Conversation((Message("user", "fox"),)))
    assert rendered.ids[: len(prompt.ids)] == prompt.ids
    turn = own_tokenizer.render_turn([Message("user", "x")], ended=True)
    again = own_tokenizer.render_prompt(
        Conversation((Message("user", "fox"), Message("assistant", "dog"), Message("user", "x")))
    )
    assert [*prompt.ids, *learned, *turn] == again.ids
    assert own_tokenizer.render_turn([Message("user", "x")], ended=False) == [own_tokenizer.end_id, *turn]


def test_the_default_system_message_stays_when_old_turns_are_dropped(own_tokenizer: ChatTokenizer) -> None:
    turns = [Message("user", "old"), Message("assistant", "old"), Message("user", "new")]
    last = own_tokenizer.render_prompt(Conversation((turns[2],)))
    whole = own_tokenizer.render_prompt(Conversation(tuple(turns)))
    for room in range(len(last.ids), len(whole.ids)):
        cut = own_tokenizer.render_prompt(Conversation(tuple(turns)), room)
        assert (cut.ids, cut.dropped) == (last.ids, 2)
    for room in range(12, len(last.ids)):
        assert len(own_tokenizer.render_prompt(Conversation(tuple(turns)), room).ids) <= room


def test_padding_is_an_id_that_no_response_contains(tmp_path: Path, own_tokenizer: ChatTokenizer) -> None:
    assert own_tokenizer.special_tokens()[own_tokenizer.pad_id] == "<|endoftext|>"
    assert own_tokenizer.pad_id in own_tokenizer.unsayable_ids
    assert own_tokenizer.end_id not in own_tokenizer.unsayable_ids
    llama = ChatTokenizer(str(folder(tmp_path, LLAMA)))  # every special token is in use: a new one follows
    assert llama.special_tokens()[llama.pad_id] == "<|rlchat_pad|>"
    assert llama.pad_id == llama.vocab_size - 1


def test_a_format_comes_back_from_its_state_and_is_part_of_the_fingerprint(
    tmp_path: Path, own_tokenizer: ChatTokenizer
) -> None:
    again = ChatTokenizer.from_state(own_tokenizer.state())
    assert (again.state(), again.fingerprint) == (own_tokenizer.state(), own_tokenizer.fingerprint)
    kinder = ChatTokenizer(str(tokenizer_folder(tmp_path, tokenizer_json(), CHATML.replace("Be kind.", "Be kinder."))))
    plain = ChatTokenizer(str(tokenizer_folder(tmp_path, tokenizer_json(), CHATML)))
    own = ChatTokenizer(str(tmp_path), own_format=False)
    assert len({kinder.fingerprint, plain.fingerprint, own.fingerprint}) == 3
    assert own.vocab_size == plain.vocab_size + 5


def test_a_template_with_a_thought_before_the_last_response(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(str(folder(tmp_path, QWEN3)))
    assert tokenizer.format.single_turn
    user, reply = Message("user", "fox"), Message("assistant", "dog")
    prompt, whole = tokenizer.render_prompt(Conversation((user,))), tokenizer.render(Conversation((user, reply)))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    written = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids == theirs.encode(written).ids
    assert whole.ids == theirs.encode(written + "<think>\n\n</think>\n\ndog<|im_end|>").ids
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.loss_mask.index(True) == len(prompt.ids)
    thought = tokenizer.render(Conversation((user, Message("assistant", "<think>\nx\n</think>\n\ndog"))))
    assert thought.ids == theirs.encode(written + "<think>\nx\n</think>\n\ndog<|im_end|>").ids
    with pytest.raises(
        UserError, match=r"writes a response differently once another message follows it.*user assistant"
    ):
        tokenizer.render_prompt(Conversation((user, reply, user)))
    with pytest.raises(UserError, match="writes a response differently once another message follows it"):
        tokenizer.render_turn([user], ended=True)


def test_a_line_break_that_the_template_does_not_ask_with_belongs_to_the_response(tmp_path: Path) -> None:
    template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant' }}")
    tokenizer = ChatTokenizer(str(tokenizer_folder(tmp_path, tokenizer_json(), template)))
    rendered = tokenizer.render(Conversation((Message("user", "fox"), Message("assistant", "dog"))))
    learned = [token for token, learn in zip(rendered.ids, rendered.loss_mask, strict=True) if learn]
    assert learned == [*tokenizer.encode("\ndog"), tokenizer.end_id]


def test_a_thought_is_written_as_the_template_writes_it(tmp_path: Path) -> None:
    form = ChatTokenizer(str(folder(tmp_path, QWEN3))).format
    assert form.response("dog") == "<think>\n\n</think>\n\ndog"
    assert form.response("\n\ndog\n") == "<think>\n\n</think>\n\ndog\n"
    assert form.response("<think>x</think>dog") == "<think>\nx\n</think>\n\ndog"
    assert form.response("<think>\ncut") == "<think>\n\n</think>\n\n<think>\ncut"


def test_a_format_of_an_older_model_file_stays_as_it_is(own_tokenizer: ChatTokenizer) -> None:
    """Parts that it lacks are neither written to its state nor part of its fingerprint."""
    older = {"name", "start", "start_system", "before", "after", "opening", "end", "pad", "strips", "late_system"}
    older |= {"single_turn", "template"}
    state = own_tokenizer.state()["chat_format"]
    assert state.keys() == older
    before = {**state["before"], "assistant": state["opening"] + "<think>\n\n</think>\n\n"}
    thinks = ChatFormat.from_state({**state, "before": before, "single_turn": True})
    assert thinks.state().keys() == older
    assert thinks.response("dog") == "<think>\n\n</think>\n\ndog"
    assert thinks.response("<think>x</think>dog") == "<think>x</think>dog"
    with pytest.raises(TypeError, match="strip_end of the chat format is not text"):
        ChatFormat.from_state({**state, "strip_end": {"user": 1}})


@pytest.mark.parametrize(
    ("trimmed", "start", "end"),
    [
        ("m['content'].lstrip('\n')", "\n", ""),
        ("m['content'].rstrip('\n')", "", "\n"),
        ("m['content'].strip('\n')", "\n", "\n"),
        ("m['content'].lstrip()", WHITE, ""),
        ("m['content'].rstrip()", "", WHITE),
    ],
)
def test_what_a_template_trims_is_part_of_the_table(tmp_path: Path, trimmed: str, start: str, end: str) -> None:
    template = LLAMA.replace("m['content'] | trim", trimmed)
    raw = tokenizer_json(special=SPECIAL[LLAMA])
    form = ChatTokenizer(str(tokenizer_folder(tmp_path, raw, template, eos_token="<|eot_id|>"))).format
    assert not form.strips
    for role in ("system", "user", "assistant"):
        assert (set(form.strip_start.get(role, "")), set(form.strip_end.get(role, ""))) == (set(start), set(end))


def test_control_tokens_that_take_the_white_space_of_the_template_are_refused(tmp_path: Path) -> None:
    raw = tokenizer_json()
    for token in raw["added_tokens"]:
        token["rstrip"] = True
    tokenizer_folder(tmp_path, raw, CHATML)
    reason = (
        r"on \(user 'Hello'\) its tokenizer makes \['<\|im_start\|>', .* writes, where rlchat has \['\\n', '<\|im_start"
    )
    with pytest.raises(UserError, match=reason):
        ChatTokenizer(str(tmp_path))


def test_roles_that_a_template_does_not_have_are_refused(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(str(folder(tmp_path, GEMMA)))
    with pytest.raises(UserError, match="has no system message; remove it"):
        tokenizer.render_prompt(Conversation((Message("system", "a"), Message("user", "b"))))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LLAMA2, "after a response, expected a special token"),
        ("{{ messages[0]['content'] }}<|im_end|>", "repeats, moves or leaves out messages of user assistant"),
        ("{{ raise_exception('no') }}", r"refuses a conversation of user \(no\)"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "repeats, moves or leaves out"),
        (
            CHATML.replace("message['content']", "message['content'] | replace('x', 'y')"),
            r"depends on more than the role of a message: on \(.*'xxx.*it writes 'yyy.*where the table has 'xxx",
        ),
    ],
)
def test_a_template_that_no_table_can_replace_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    raw = tokenizer_json(special=("<bos>", "<eos>", "<|im_start|>", "<|im_end|>"))
    tokenizer_folder(tmp_path, raw, template, bos_token="<bos>", eos_token="<eos>")
    with pytest.raises(UserError, match=reason + ".*--model.chat_format rlchat"):
        ChatTokenizer(str(tmp_path))
    assert not ChatTokenizer(str(tmp_path), own_format=False).has_own_format


def test_a_template_in_the_options_is_found(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, tokenizer_json(), None, chat_template=[{"name": "default", "template": CHATML}])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert ChatTokenizer(str(tmp_path)).format.start == "<|im_start|>system\nBe kind.<|im_end|>\n"
