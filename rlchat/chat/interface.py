"""`ChatInterface`: chat with a trained model.

chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
print(chat.generate_response("Hello, how are you?"))
"""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch

from rlchat.chat.context import FittedPrompt, as_prompt, fit_prompt
from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.chat.generation import (
    ResponseGenerator,
    TokenizationCheck,
    check_tokenization,
    decode_stream,
    exclusively,
    generator_from,
    positive_integer,
    sampling_from,
)
from rlchat.chat.saved import SavedConversation, SavedMessage, load_conversation, now, save_conversation
from rlchat.chat.scoring import RewardScorer
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle, identity, load_policy
from rlchat.models.sampling import Sampling
from rlchat.rewards import Reply
from rlchat.utils.devices import choose_device, choose_dtype


class ChatInterface:
    """One conversation with the model in ``model_path``.

    ``device`` defaults to CUDA if available, else MPS, else the CPU. ``dtype`` defaults to bfloat16 on CUDA devices
    that support it, else float32. ``seed`` makes the responses repeatable; None draws a fresh seed. ``base_model`` is
    the path of the base of an adapter file, if it has moved. Raises :class:`UserError` for a model, device, dtype or
    seed that cannot be used.

    ``system`` is the system message (None: none). After each response, ``dropped_messages``, ``dropped_system`` and
    ``cut_tokens`` describe what did not fit into the model's context: the number of oldest messages, whether the system
    message was left out, and the number of tokens cut from a message that was too long on its own.

    Of ``best_of`` responses to each message, the one with the highest reward is kept (by the reward in the model file).
    Above 1, a response arrives in one piece.

    A ChatInterface generates one response at a time. Starting another response or changing the conversation while a
    stream is open or another thread is generating raises :class:`UserError`.
    """

    def __init__(
        self,
        model_path: str | Path = "checkpoints/rl_chat_model_tiktoken.pt",
        *,
        device: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        base_model: str | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        generator = generator_from(seed)
        self.seed = seed
        self._model_ids: dict[str, str] = {}  # of each model file that has been in use
        self._use(load_policy(model_path, self.device, base_model), Path(model_path), generator)
        self._reset_dropped()
        self._system: str | None = None
        self._best_of = 1
        self._busy = threading.Lock()
        self._messages: list[SavedMessage] = []
        self._undone: list[SavedMessage] = []  # the messages that the last undo removed, until the next response
        # For each rated message: the model's response, the verdict, and the feedback file.
        self._ratings: list[tuple[SavedMessage, Reply, Verdict, Path]] = []
        self._last: Reply | None = None  # the last message, if it was generated here
        self._last_reward = self._reward  # of the model that generated it
        self._sampling = Sampling()

    def swap(self, bundle: PolicyBundle, path: str | Path) -> None:
        """Generate the responses that follow with ``bundle``, the model in ``path``; its KV cache begins empty.

        The conversation and the random generator stay. Raises :class:`UserError` during a response.
        """
        with self._exclusive():
            self._use(bundle, Path(path), self._generator.generator)

    def _use(self, bundle: PolicyBundle, path: Path, generator: torch.Generator) -> None:
        self.bundle, self.model_path, self.model = bundle, path, bundle.model.to(self.dtype)
        self.tokenizer, self.max_length = bundle.tokenizer, bundle.max_length
        self._generator = ResponseGenerator(bundle, self.device, generator)
        self._reward = cache(partial(RewardScorer, bundle, path))
        self._model_ids[path.name] = identity(bundle)

    @property
    def system(self) -> str | None:
        """The system message; None if there is none."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise UserError(f"invalid system message {reprlib.repr(text)}: expected a string or None")
        self._system = text

    @property
    def best_of(self) -> int:
        """See the class. Setting it raises :class:`UserError` for an invalid number, or without a usable reward."""
        return self._best_of

    @best_of.setter
    def best_of(self, number: int) -> None:
        if positive_integer("best_of", number) > 1:
            _ = self.reward  # raises if the model file contains none
        self._best_of = int(number)

    def reseed(self, seed: int | None) -> None:
        """Seed the responses that follow. Raises :class:`UserError` for an invalid seed."""
        self._generator.generator = generator_from(seed)
        self.seed = seed

    # ---- the conversation --------------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[Message, ...]:
        """The user and assistant messages, oldest first. The system message is not included."""
        return tuple(Message(message.role, message.text) for message in self._messages)

    @property
    def last_turn(self) -> tuple[Conversation, Reply] | None:
        """The prompt of the last response and the response; None if there is no response."""
        if [message.role for message in self._messages[-2:]] != ["user", "assistant"]:
            return None
        text = self._messages[-1].text
        reply = self._last or Reply(text, len(self.tokenizer.encode(text)) + 1, ended=True)
        return Conversation((*self._system_messages(), *self.history[:-1])), reply

    def clear(self) -> None:
        """Delete the messages. The system message stays."""
        with self._exclusive():
            self._clear()

    def _clear(self) -> None:
        self._messages, self._undone, self._ratings = [], [], []
        self._last = None
        self._generator.forget()
        self._reset_dropped()

    def undo(self) -> str | None:
        """Remove the last user message and its response. Return the user message, or None if there is none."""
        with self._exclusive():
            users = [number for number, message in enumerate(self._messages) if message.role == "user"]
            if not users:
                return None
            self._undone = self._messages[users[-1] :]
            del self._messages[users[-1] :]
            self._last = None
            return self._undone[0].text

    def redo(self) -> None:
        """Restore the messages that :meth:`undo` removed last, unless a response was generated since."""
        with self._exclusive():
            self._messages += self._undone
            self._undone = []

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the conversation, the model's name and the last sampling options to ``path``, atomically.

        Raises :class:`UserError` if the file cannot be written, or exists and ``overwrite`` is False. See
        :mod:`rlchat.chat.saved` for the format.
        """
        system = () if self.system is None else (SavedMessage("system", self.system),)
        seed = None if self.seed is None else int(self.seed)  # a NumPy integer is not JSON
        sampling = {**asdict(self._sampling), "seed": seed}
        saved = SavedConversation((*system, *self._messages), self.model_path.name, sampling)
        save_conversation(path, saved, overwrite=overwrite)

    def load(self, path: str | Path) -> SavedConversation:
        """Replace this conversation by the one in ``path``, and return the content of the file.

        Raises :class:`UserError` for a file that is missing, damaged or in another format; this conversation is then
        unchanged.
        """
        saved = load_conversation(path)
        with self._exclusive():
            self._clear()
            has_system = bool(saved.messages) and saved.messages[0].role == "system"
            self.system = saved.messages[0].text if has_system else None
            self._messages = list(saved.attributed[has_system:])
        return saved

    # ---- feedback and reward -----------------------------------------------------------------------------------------

    def add_feedback(self, verdict: Verdict, path: str | Path) -> bool:
        """Append a verdict on the last response to the feedback file ``path``; False if it is the current verdict.

        A response has one verdict: a new one replaces the previous one, also in the file. A correction also replaces
        the response in the conversation. Raises :class:`UserError` if there is no response, if a correction is rated,
        or if the file cannot be written; see :func:`rlchat.chat.feedback.append_feedback`.
        """
        with self._exclusive():
            prompt, reply = self._required_turn()
            path, rated = Path(path), self._messages[-1]
            for message, generated, known, place in reversed(self._ratings):
                if message is rated:
                    if (known, place) == (verdict, path):
                        return False
                    if isinstance(known, Correction):
                        reply = generated
                        if not isinstance(verdict, Correction):
                            raise UserError(
                                "the last response is your correction: edit it again, or generate another with retry"
                            )
                    break
            model = rated.model or self.model_path.name
            model_id = self._model_ids.get(model, "")  # not known for a conversation that another model had
            append_feedback(path, prompt, reply.text, verdict, model=model, model_id=model_id)
            if isinstance(verdict, Correction):
                rated = self._messages[-1] = SavedMessage("assistant", verdict.text, now(), model)
                self._last = None
            self._ratings.append((rated, reply, verdict, path))
            return True

    def score_last_response(self) -> tuple[dict[str, float], float | None]:
        """The reward factors of the last response, and the critic's value of its prompt; see :attr:`last_reward`.

        Raises :class:`UserError` if there is no response, or if the model file contains no reward.
        """
        prompt, reply = self._required_turn()
        return self.last_reward.score(prompt, reply), self.last_reward.value(prompt)

    @property
    def reward(self) -> RewardScorer:
        """The reward that the model was trained with. Raises :class:`UserError` if the file contains none."""
        return self._reward()

    @property
    def last_reward(self) -> RewardScorer:
        """As :attr:`reward`, but of the model that generated the last response, if that was here and since ``undo``."""
        return self.reward if self._last is None else self._last_reward()

    def _required_turn(self) -> tuple[Conversation, Reply]:
        if (turn := self.last_turn) is None:
            raise UserError("there is no response yet: send a message first")
        return turn

    def _system_messages(self) -> tuple[Message, ...]:
        return () if self.system is None else (Message("system", self.system),)

    # ---- responses ---------------------------------------------------------------------------------------------------

    def generate_response(
        self,
        text: str,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        use_history: bool = True,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> str:
        """The response to ``text``, at most ``max_new_tokens`` tokens. Arguments as in :meth:`stream_response`."""
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
        """The response to ``text`` in pieces of whole characters, as they are generated; no special tokens.

        ``temperature`` 0 always selects the most likely token. ``top_k`` 0 or -1, and ``top_p`` 1, exclude no token.
        Without ``use_history``, the model sees only the system message and ``text``, and neither ``text`` nor the
        response is added to the history. Closing the iterator stops the response; its text so far is kept.

        Prompt and response share ``max_length`` tokens; see :func:`rlchat.chat.context.fit_prompt`. Raises
        :class:`UserError` for an empty text or an invalid option, and, from the first piece on, if this interface is
        generating another response.
        """
        if not isinstance(text, str):
            raise UserError(f"invalid message {reprlib.repr(text)}: expected a string")
        if not text.strip():
            raise UserError("the message is empty: enter some text")
        return self._respond(text, sampling_from(max_new_tokens, temperature, top_k, top_p), use_history)

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
        """One response to each of ``prompts``, in their order; the history is neither used nor changed.

        A prompt is a string, or a conversation that ends with a user message. ``batch_size`` prompts are generated
        together. Each response is the one the prompt would get in any other batch, up to floating-point rounding: at
        temperature 0 two nearly equal logits, and otherwise a random number at the border of two tokens, may round the
        other way. ``dropped_messages`` and ``cut_tokens`` are totals. Raises :class:`UserError` for an invalid prompt
        or option.
        """
        if isinstance(prompts, str | Conversation):
            raise UserError("invalid prompts: expected a list of prompts, got a single one")
        positive_integer("batch_size", batch_size)
        with self._exclusive():
            self._sampling = sampling = sampling_from(max_new_tokens, temperature, top_k, top_p)
            self._reset_dropped()
            system = self._system_messages()
            conversations = [as_prompt(prompt, i, system) for i, prompt in enumerate(prompts, 1)]
            fitted = [self._fit(conversation, sampling) for conversation in conversations]
            if self.best_of > 1:
                return self._best_replies(conversations, fitted, sampling, int(batch_size))
            return self._generator.batch(fitted, sampling, int(batch_size))

    def tokenization_test(self) -> list[TokenizationCheck]:
        """Encode and decode sample texts and all messages; see :func:`rlchat.chat.generation.check_tokenization`."""
        return check_tokenization(self.tokenizer, (message.text for message in self._messages))

    def _respond(self, text: str, sampling: Sampling, use_history: bool) -> Generator[str, None, None]:
        with self._exclusive():
            asked_at = now()
            before = self.history if use_history else ()
            self._reset_dropped()
            self._sampling = sampling
            prompt = Conversation((*self._system_messages(), *before, Message("user", text)))
            fitted = self._fit(prompt, sampling)
            if self.best_of > 1:
                (best,) = self._best_replies([prompt], [fitted], sampling, self.best_of)
                self._add_turn(text, asked_at, best, use_history)
                yield best.text
                return
            pieces: list[str] = []
            tokens: list[int] = []
            finished = False
            try:
                sampled = self._generator.stream(fitted, sampling, use_history, tokens)
                for piece in decode_stream(self.tokenizer, sampled):
                    pieces.append(piece)
                    yield piece
                finished = True
            finally:
                # A response that was stopped before its first character is discarded: an empty assistant message would
                # make another empty response likely.
                if finished or pieces:
                    ended = tokens[-1:] == [self.tokenizer.end_id]
                    self._add_turn(text, asked_at, Reply("".join(pieces), len(tokens), ended), use_history)

    def _add_turn(self, text: str, asked_at: str, reply: Reply, use_history: bool) -> None:
        if use_history:
            response = SavedMessage("assistant", reply.text, now(), self.model_path.name)
            self._messages += [SavedMessage("user", text, asked_at), response]
            self._undone, self._last, self._last_reward = [], reply, self._reward

    def _best_replies(
        self, prompts: Sequence[Conversation], fitted: Sequence[FittedPrompt], sampling: Sampling, batch_size: int
    ) -> list[Reply]:
        if sampling.temperature == 0:
            raise UserError("best_of needs different responses to a message: set temperature above 0")
        copies = [one for one in fitted for _ in range(self.best_of)]
        return self.reward.best(prompts, self._generator.batch(copies, sampling, batch_size))

    def _fit(self, prompt: Conversation, sampling: Sampling) -> FittedPrompt:
        """Fit ``prompt`` into the context, and add the dropped messages and tokens to the totals."""
        fitted = fit_prompt(self.tokenizer, prompt, self.max_length, sampling.max_new_tokens)
        self.dropped_messages += fitted.dropped_messages
        self.dropped_system |= fitted.dropped_system
        self.cut_tokens += fitted.cut_tokens
        return fitted

    def _reset_dropped(self) -> None:
        self.dropped_messages, self.dropped_system, self.cut_tokens = 0, False, 0

    def _exclusive(self) -> AbstractContextManager[None]:
        """Lock the model, its cache and the messages. Raises :class:`UserError` if they are locked already."""
        return exclusively(self._busy)
