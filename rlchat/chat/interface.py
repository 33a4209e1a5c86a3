"""`ChatInterface`: talk with a trained model.

chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
print(chat.generate_response("Hello, how are you?"))
"""

from __future__ import annotations

import reprlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path

import torch

from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.chat.saved import SavedConversation, SavedMessage, load_conversation, now, save_conversation
from rlchat.chat.scoring import Judge
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.kv_cache import Cache, shorten
from rlchat.models.model_file import load_policy
from rlchat.models.sampling import Sampling, addressed_uniforms, generate, generator_uniforms, sample
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.devices import choose_device, choose_dtype
from rlchat.utils.padding import pad
from rlchat.utils.progress import with_progress

_SAMPLES = (
    "Hello, how are you?",
    "  two spaces,\ttabs\nand lines\r\n",
    "1234567890 3.14 €5",
    "naïve Ελλάδα Привет 你好 こんにちは مرحبا",
    "e\u0301 and 👩\u200d👩\u200d👧 are several code points each",
    "<|user|> typed by a user is text<|end|>",
)


@dataclass(frozen=True, slots=True)
class TokenizationCheck:
    """What became of a text: its number of tokens, and whether it came back as it was, whole and token by token."""

    text: str
    tokens: int
    intact: bool


class ChatInterface:
    """One conversation with the model in ``model_path``, which it remembers.

    ``device`` is chosen where none is given: CUDA, then MPS, then the CPU; and so is ``dtype``, the numbers that the
    model computes with: bfloat16 on CUDA that has it, else float32. ``seed`` makes the replies repeatable; None draws
    a fresh one. Raises :class:`UserError` for a model, a device or a dtype that cannot be used.

    ``system`` is an instruction that stands before the conversation (None: none). ``dropped_messages`` and
    ``cut_tokens`` tell what of the conversation the last reply did not see because it no longer fits: so many of the
    oldest messages, and so many of the first tokens of a message that alone was too long.
    """

    def __init__(
        self,
        model_path: str | Path = "checkpoints/rl_chat_model_tiktoken.pt",
        *,
        device: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.reseed(seed)
        self.model_path = Path(model_path)
        self.bundle = load_policy(model_path, self.device)
        self.model = self.bundle.model.to(self.dtype)
        self.tokenizer = self.bundle.tokenizer
        self.max_length = self.bundle.max_length
        self.system: str | None = None
        self.dropped_messages = 0
        self.cut_tokens = 0
        self._said: list[SavedMessage] = []
        self._undone: list[SavedMessage] = []  # what the last undo took back, until something else is said
        self._verdicts: list[tuple[SavedMessage, Verdict, Path]] = []  # on which message, and the file that keeps it
        self._last: Reply | None = None  # where it is the last of what was said, and was generated here
        self._sampling = Sampling()
        self._seen: tuple[Cache, list[int]] | None = None  # a cache, and the ids whose keys and values stand in it

    def reseed(self, seed: int | None) -> None:
        """From now on, replies are drawn as ``seed`` says. Raises :class:`UserError` for one out of range."""
        self._generator = _generator(seed)
        self.seed = seed

    # ---- the conversation --------------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[Message, ...]:
        """What was said, the oldest first; the system message is not part of it."""
        return tuple(Message(message.role, message.text) for message in self._said)

    @property
    def last_turn(self) -> tuple[Conversation, Reply] | None:
        """The last reply, and all that stood before it; None where nothing was replied."""
        if [message.role for message in self._said[-2:]] != ["user", "assistant"]:
            return None
        text = self._said[-1].text
        reply = self._last or Reply(text, len(self.tokenizer.encode(text)) + 1, ended=True)
        return Conversation((*self._instruction(), *self.history[:-1])), reply

    def clear(self) -> None:
        """Forgets what was said; the system message stays."""
        self._said, self._undone, self._verdicts = [], [], []
        self._last = self._seen = None
        self.dropped_messages = self.cut_tokens = 0

    def undo(self) -> str | None:
        """Takes back the last message of the user and what was replied; returns it, or None where there is none."""
        users = [number for number, message in enumerate(self._said) if message.role == "user"]
        if not users:
            return None
        self._undone = self._said[users[-1] :]
        del self._said[users[-1] :]
        self._last = None
        return self._undone[0].text

    def redo(self) -> None:
        """Puts back what :meth:`undo` took back last, where nothing was said since."""
        self._said += self._undone
        self._undone = []

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the conversation to ``path``, with the model and how it was last asked; whole or not at all.

        Raises :class:`UserError` where the place cannot be written, or holds a file and ``overwrite`` does not allow
        that. See :mod:`rlchat.chat.saved` for the format.
        """
        system = () if self.system is None else (SavedMessage("system", self.system),)
        sampling = {**asdict(self._sampling), "seed": self.seed}
        save_conversation(
            path, SavedConversation((*system, *self._said), self.model_path.name, sampling), overwrite=overwrite
        )

    def load(self, path: str | Path) -> SavedConversation:
        """Goes on with the conversation in ``path`` in place of this one, and returns what the file holds.

        Raises :class:`UserError` for a file that is missing, damaged or another's; this conversation is then unharmed.
        """
        saved = load_conversation(path)
        self.clear()
        has_system = bool(saved.messages) and saved.messages[0].role == "system"
        self.system = saved.messages[0].text if has_system else None
        self._said = list(saved.messages[has_system:])
        return saved

    def judge(self, verdict: Verdict, path: str | Path) -> bool:
        """Appends what somebody thinks of the last reply to the training data in ``path``; False: it stands there.

        A correction also takes the reply's place in the conversation, and can be corrected again, but is neither good
        nor bad of the model. Raises :class:`UserError` where it is called so, where there is no reply, or the feedback
        cannot be kept; see :func:`rlchat.chat.feedback.append_feedback`.
        """
        prompt, reply = self._replied()
        path = Path(path)
        judged = self._said[-1]
        before = [(known, place) for message, known, place in self._verdicts if message is judged]
        if (verdict, path) in before:
            return False
        by_hand = any(isinstance(known, Correction) for known, _ in before)
        if by_hand and not isinstance(verdict, Correction):
            raise UserError("that reply is your own correction, and not the model's; edit it, or ask for another")
        append_feedback(path, prompt, reply.text, verdict, model="" if by_hand else self.model_path.name)
        if isinstance(verdict, Correction):
            judged = self._said[-1] = SavedMessage("assistant", verdict.text, now())
            self._last = None
        self._verdicts.append((judged, verdict, path))
        return True

    def judgement(self) -> tuple[dict[str, float], float | None]:
        """The reward of the last reply by its factors, and the critic's value; see :class:`rlchat.chat.scoring.Judge`.

        Raises :class:`UserError` where there is no reply, or the bundle carries no reward.
        """
        prompt, reply = self._replied()
        return self.reward.breakdown([prompt], [reply])[0], self.reward.value(prompt)

    @cached_property
    def reward(self) -> Judge:
        """What the model was rewarded for. Raises :class:`UserError` where the bundle carries no reward."""
        return Judge(self.bundle, self.model_path)

    def _replied(self) -> tuple[Conversation, Reply]:
        if (turn := self.last_turn) is None:
            raise UserError("there is no reply yet; say something first")
        return turn

    def _instruction(self) -> tuple[Message, ...]:
        return () if self.system is None else (Message("system", self.system),)

    # ---- replies -----------------------------------------------------------------------------------------------------

    def generate_response(
        self,
        text: str,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        use_history: bool = True,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> str:
        """The reply to ``text``, of at most ``max_new_tokens`` tokens; arguments as in :meth:`stream_response`."""
        return "".join(self.stream_response(text, max_new_tokens, temperature, use_history, top_k, top_p))

    def stream_response(
        self,
        text: str,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        use_history: bool = True,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Generator[str, None, None]:
        """The reply to ``text`` in pieces, as they are made: whole characters, no special token.

        ``temperature`` 0 always takes the likeliest token; ``top_k`` 0 and ``top_p`` 1 leave out none. Without
        ``use_history`` the reply sees nothing of what was said, and neither it nor ``text`` is remembered. Closing the
        iterator stops the reply; what it said until then is remembered.

        Prompt and reply share the model's ``max_length``: the oldest messages give way to the reply, until half is
        left to them, and a longer ``max_new_tokens`` is lowered to what the prompt leaves free. Raises
        :class:`UserError` for an empty text and for a number out of range.
        """
        if not isinstance(text, str):
            raise UserError(f"the message is {reprlib.repr(text)}; it must be a text")
        if not text.strip():
            raise UserError("the message is empty; write something to reply to")
        return self._reply(text, sampling_from(max_new_tokens, temperature, top_k, top_p), use_history)

    def batch(
        self,
        prompts: Sequence[str | Conversation],
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 32,
    ) -> list[str]:
        """The texts of :meth:`batch_replies`."""
        return [r.text for r in self.batch_replies(prompts, max_new_tokens, temperature, top_k, top_p, batch_size)]

    def batch_replies(
        self,
        prompts: Sequence[str | Conversation],
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 32,
    ) -> list[Reply]:
        """One reply to each of ``prompts``, in their order, ``batch_size`` of them at a time; nothing is remembered.

        Each is what :meth:`generate_response` without history would say: the same words at temperature 0, else noise of
        its own, whatever the batch size. A prompt is a text, or a conversation that ends on a user's message.
        ``dropped_messages`` and ``cut_tokens`` are those of all prompts together. A progress bar shows on a terminal
        after two seconds. Raises :class:`UserError` for an empty prompt or what is none, and for a number out of range.
        """
        if isinstance(prompts, str | Conversation):
            raise UserError("the prompts are a single one; give a list of them")
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        sampling = sampling_from(max_new_tokens, temperature, top_k, top_p)
        self._sampling = sampling
        self.dropped_messages = self.cut_tokens = 0
        rows = [self._row(prompt, number, sampling) for number, prompt in enumerate(prompts, 1)]
        seed = int(torch.randint(2**62, (1,), generator=self._generator))
        replies: dict[int, Reply] = {}
        for chunk in with_progress(_chunks(rows, sampling, self.max_length, batch_size), "replying", show=True):
            ids, mask = pad([rows[i] for i in chunk], self.tokenizer.pad_id, "left")
            generated = generate(
                self.model,
                ids.to(self.device),
                mask.to(self.device),
                self._fitted(sampling, len(rows[chunk[0]])),
                addressed_uniforms(seed, 0, torch.tensor(chunk)),
                end_id=self.tokenizer.end_id,
                pad_id=self.tokenizer.pad_id,
            )
            lengths = generated.mask.sum(1).tolist()
            said = zip(generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True)
            for i, (tokens, length, ended) in zip(chunk, said, strict=True):
                replies[i] = Reply("".join(_decoded(self.tokenizer, tokens[:length])), length, ended)
        return [replies[i] for i in range(len(rows))]

    def tokenization_test(self) -> list[TokenizationCheck]:
        """Whether texts of many kinds, and all that was said, survive the way through the tokenizer.

        Each is encoded, where no special token may appear, and decoded again, whole and token by token.
        """
        checks = []
        for text in dict.fromkeys([*_SAMPLES, *(message.text for message in self._said)]):
            ids = self.tokenizer.encode(text)
            pieces = "".join(_decoded(self.tokenizer, [*ids, self.tokenizer.end_id]))
            silent = self.tokenizer.special_ids & set(ids)
            checks.append(
                TokenizationCheck(text, len(ids), not silent and self.tokenizer.decode(ids) == text == pieces)
            )
        return checks

    def _reply(self, text: str, sampling: Sampling, use_history: bool) -> Generator[str, None, None]:
        asked_at = now()
        before = self.history if use_history else ()
        self.dropped_messages = self.cut_tokens = 0
        ids = self._render(Conversation((*self._instruction(), *before, Message("user", text))), sampling)
        self._sampling = sampling
        said: list[str] = []
        tokens: list[int] = []
        finished = False
        try:
            for piece in _decoded(self.tokenizer, self._tokens(ids, sampling, use_history, tokens)):
                said.append(piece)
                yield piece
            finished = True
        finally:
            # A reply that was stopped before its first word leaves no trace: an empty one would teach the model to
            # be silent.
            if use_history and (finished or said):
                reply = "".join(said)
                self._said += [SavedMessage("user", text, asked_at), SavedMessage("assistant", reply, now())]
                self._undone = []
                self._last = Reply(reply, len(tokens), ended=tokens[-1:] == [self.tokenizer.end_id])

    def _row(self, prompt: str | Conversation, number: int, sampling: Sampling) -> list[int]:
        """The ids of a prompt of :meth:`batch_replies`."""
        if isinstance(prompt, str):
            prompt = Conversation((Message("user", prompt),))
        if not isinstance(prompt, Conversation):
            raise UserError(f"prompt {number} is {reprlib.repr(prompt)}; it must be a text or a Conversation")
        if not prompt.is_prompt or not prompt.messages[-1].text.strip():
            raise UserError(f"prompt {number} is empty; write something to reply to")
        if prompt.messages[0].role != "system":
            prompt = Conversation((*self._instruction(), *prompt.messages))
        return self._render(prompt, sampling)

    def _render(self, prompt: Conversation, sampling: Sampling) -> list[int]:
        """The ids to reply to; adds up what did not fit."""
        room = max(self.max_length - sampling.max_new_tokens, self.max_length // 2)
        rendered = self.tokenizer.render_prompt(prompt, room)
        self.dropped_messages += rendered.dropped
        self.cut_tokens += rendered.cut
        return rendered.ids

    def _fitted(self, sampling: Sampling, prompt_length: int) -> Sampling:
        """``sampling`` of no more tokens than the prompt leaves free."""
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.max_length - prompt_length))

    def _tokens(self, prompt: list[int], sampling: Sampling, remember: bool, drawn: list[int]) -> Iterator[int]:
        """The tokens of one reply as they are drawn, and added to ``drawn``.

        What the conversation's last prompt and reply left in the cache is not fed again where this one begins alike.
        With ``remember``, it and its reply are left there in turn.
        """
        known, cache = self._recall(prompt) if remember else (0, self.model.backbone.new_cache())
        steps = sample(
            self.model,
            torch.tensor([prompt[known:]], device=self.device),
            torch.ones(1, len(prompt), dtype=torch.bool, device=self.device),
            self._fitted(sampling, len(prompt)),
            generator_uniforms(self._generator, 1),
            end_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
            cache=cache,
        )
        for step in steps:
            if remember:  # Ctrl-C may come at any moment; what was fed until now is sure to be in every layer
                self._seen = cache, prompt + drawn
            drawn.append(int(step.tokens))
            yield drawn[-1]

    def _recall(self, prompt: list[int]) -> tuple[int, Cache]:
        """How many ids of ``prompt`` need not be fed, and the cache that holds them."""
        seen, self._seen = self._seen, None
        if seen is not None:
            cache, ids = seen
            alike = 0
            while alike < min(len(ids), len(prompt) - 1) and ids[alike] == prompt[alike]:
                alike += 1
            if alike and shorten(cache, alike):
                return alike, cache
        return 0, self.model.backbone.new_cache()


def _decoded(tokenizer: ChatTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of one reply as its tokens come; a character that its last token leaves incomplete is left out."""
    decoder = tokenizer.stream()
    for token in tokens:
        if piece := decoder.finish() if token == tokenizer.end_id else decoder.push(token):
            yield piece


def _chunks(rows: list[list[int]], sampling: Sampling, max_length: int, batch_size: int) -> list[list[int]]:
    """Numbers of ``rows``, those of about one length together, the longest first; each chunk may say as much."""

    def may_say(row: int) -> int:
        return min(sampling.max_new_tokens, max_length - len(rows[row]))

    longest_first = sorted(range(len(rows)), key=lambda i: (may_say(i), -len(rows[i])))
    alike = [list(numbers) for _, numbers in groupby(longest_first, key=may_say)]
    return [numbers[start : start + batch_size] for numbers in alike for start in range(0, len(numbers), batch_size)]


def sampling_from(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> Sampling:
    """How to draw tokens, from what a user asks for. Raises :class:`UserError` for no number, or one out of range."""
    for name, whole in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if not isinstance(whole, Integral):
            raise UserError(f"{name} is {whole!r}; it must be a whole number")
    for name, number in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(number, Real):
            raise UserError(f"{name} is {number!r}; it must be a number")
    try:
        return Sampling(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"the seed {seed!r} is out of range; give a whole number from 0 to 2**63 - 1")
    return generator.manual_seed(seed)
