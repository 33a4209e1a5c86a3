"""`ChatInterface`: talk with a trained model.

chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
print(chat.generate_response("Hello, how are you?"))
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from rlchat.checkpoint import load_policy
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.generation import Sampling, generator_uniforms, sample


class ChatInterface:
    """One conversation with the model in ``model_path``, which it remembers.

    ``device`` is chosen where none is given: CUDA, then MPS, then the CPU. ``seed`` makes the replies repeatable; None
    draws a fresh one. Raises :class:`UserError` for a model or a device that cannot be used.

    ``system`` is an instruction that stands before the conversation (None: none). ``dropped_messages`` and
    ``cut_tokens`` tell what of the conversation the last reply did not see because it no longer fits: so many of the
    oldest messages, and so many of the first tokens of a message that alone was too long.
    """

    def __init__(
        self,
        model_path: str | Path = "checkpoints/rl_chat_model_tiktoken.pt",
        *,
        device: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self._generator = _generator(seed)
        bundle = load_policy(model_path, self.device)
        self.model = bundle.model
        self.tokenizer = bundle.tokenizer
        self.max_length = bundle.max_length
        self.system: str | None = None
        self.dropped_messages = 0
        self.cut_tokens = 0
        self._history: tuple[Message, ...] = ()

    @property
    def history(self) -> tuple[Message, ...]:
        """What was said, the oldest first; the system message is not part of it."""
        return self._history

    def clear(self) -> None:
        """Forgets what was said; the system message stays."""
        self._history = ()
        self.dropped_messages = self.cut_tokens = 0

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
        if not text.strip():
            raise UserError("the message is empty; write something to reply to")
        return self._reply(text, sampling_from(max_new_tokens, temperature, top_k, top_p), use_history)

    def _reply(self, text: str, sampling: Sampling, use_history: bool) -> Generator[str, None, None]:
        ids = self._prompt(text, sampling.max_new_tokens, use_history)
        said: list[str] = []
        finished = False
        try:
            for piece in self._pieces(ids, sampling):
                said.append(piece)
                yield piece
            finished = True
        finally:
            # A reply that was stopped before its first word leaves no trace: an empty one would teach the model to
            # be silent.
            if use_history and (finished or said):
                self._history += (Message("user", text), Message("assistant", "".join(said)))

    def _prompt(self, text: str, max_new_tokens: int, use_history: bool) -> list[int]:
        """The ids to reply to; notes what did not fit."""
        system = () if self.system is None else (Message("system", self.system),)
        before = self._history if use_history else ()
        room = max(self.max_length - max_new_tokens, self.max_length // 2)
        rendered = self.tokenizer.render_prompt(Conversation((*system, *before, Message("user", text))), room)
        self.dropped_messages, self.cut_tokens = rendered.dropped, rendered.cut
        return rendered.ids

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """The text of one reply as its tokens come; a character that its last token leaves incomplete is left out."""
        ids = torch.tensor([prompt], device=self.device)
        room = self.max_length - len(prompt)
        steps = sample(
            self.model,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            Sampling(min(sampling.max_new_tokens, room), sampling.temperature, sampling.top_k, sampling.top_p),
            generator_uniforms(self._generator, 1),
            end_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
        )
        decoder = self.tokenizer.stream()
        for step in steps:
            token = int(step.tokens)
            if piece := decoder.finish() if token == self.tokenizer.end_id else decoder.push(token):
                yield piece


def sampling_from(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> Sampling:
    """How to draw tokens, from what a user asks for. Raises :class:`UserError` for a number out of range."""
    try:
        return Sampling(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_device(name: str | None) -> torch.device:
    """The device of that name; where none is given, CUDA, then MPS, then the CPU. Raises :class:`UserError`."""
    if name is None:
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise UserError(f"the device {name!r} is not to be had on this machine; give another, as cpu") from error


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    try:
        return generator.manual_seed(seed)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the seed {seed} is out of range; give a whole number from 0 to 2**63 - 1") from error
