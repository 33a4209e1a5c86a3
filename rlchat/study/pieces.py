"""The pieces of a study of one seed, and the work of each. A finished piece is a JSON file, and is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlchat.study.settings import Settings
from rlchat.utils.files import write_atomically


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of work.

    Attributes:
        kind: ``sft``, ``pairs``, ``pool``, ``proxy``, ``best_of`` or ``ppo``.
        seed: of everything in it.
        width: of the network that is trained, or of the proxy.
        amount: comparisons that the proxy has learned from.
        kl_coef: of PPO.
        cost: the expected share of the time, in seconds on one core of 2024.
    """

    kind: str
    seed: int
    width: int = 0
    amount: int = 0
    kl_coef: float = 0.0
    cost: float = 1.0

    @property
    def name(self) -> str:
        """The path of its file within the folder of the study, without the ending."""
        parts = {
            "sft": f"sft-{self.width}",
            "proxy": f"proxy-{self.width}-{self.amount}",
            "best_of": f"best_of-{self.width}-{self.amount}",
            "ppo": f"ppo-{self.width}-{self.amount}-kl{self.kl_coef:g}",
        }
        return f"seed{self.seed}/{parts.get(self.kind, self.kind)}"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        """The names of the pieces that this one reads."""
        start = f"seed{self.seed}/"
        policy = f"{start}sft-{settings.policy_width}"
        proxy = f"{start}proxy-{self.width}-{self.amount}"
        return {
            "sft": (),
            "pairs": (policy,),
            "pool": (policy,),
            "proxy": (f"{start}sft-{self.width}", f"{start}pairs"),
            "best_of": (f"{start}pool", proxy),
            "ppo": (policy, proxy),
        }[self.kind]


def all_pieces(settings: Settings, seeds: tuple[int, ...]) -> list[Piece]:
    """All pieces, each after those that it needs; those of the lowest seed first."""
    pieces = []
    for seed in seeds:
        pieces += [
            Piece("sft", seed, width, cost=settings.questions * settings.sft_epochs * (width + 16) / 16e3)
            for width in dict.fromkeys([settings.policy_width, *settings.widths])
        ]
        samples = settings.best_of * settings.best_of_prompts
        pieces.append(Piece("pairs", seed, cost=max(settings.amounts) / 700))
        pieces.append(Piece("pool", seed, cost=samples / 1800))
        for width, amount in settings.proxies:
            rows = amount * settings.proxy_epochs(amount)
            pieces.append(Piece("proxy", seed, width, amount, cost=rows / 900 + 2))
            pieces.append(Piece("best_of", seed, width, amount, cost=samples / 8000))
        pieces += [Piece("ppo", seed, *run, cost=settings.ppo_iterations / 3) for run in settings.ppo_runs]
        pieces.sort(key=lambda piece: _order(settings, piece))
    return pieces


def _order(settings: Settings, piece: Piece) -> tuple[int, ...]:
    """Sorts by seed, then what all need, then proxy by proxy with its best-of-n and PPO, then the KL penalties."""
    kinds = ("sft", "pairs", "pool", "proxy", "best_of", "ppo")
    place = settings.proxies.index((piece.width, piece.amount)) + 1 if piece.amount else 0
    if piece.kl_coef:
        place = len(settings.proxies) + 1
    return piece.seed, place, kinds.index(piece.kind)


def run_piece(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    """Does ``piece``, writes its files to ``folder`` and returns its result; the JSON file comes last, atomically."""
    import torch  # importing it takes seconds

    torch.set_num_threads(1)
    began = time.monotonic()
    result = _WORK[piece.kind](folder, settings, piece)
    result["seconds"] = round(time.monotonic() - began, 1)
    write_json(folder / f"{piece.name}.json", result)
    return result


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` to ``path``, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=None) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sft(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    from rlchat.study.train import train_sft

    world = _world(settings, piece)
    metrics = train_sft(folder / f"{piece.name}.pt", piece.width, world.training, settings, piece.seed)
    return {"loss": metrics["train/loss"]}


def _pairs(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    """Comparisons of responses of the initial policy: noisy ones to learn from, and exact ones to test proxies."""
    from rlchat.study.samples import compare

    world, policy = _world(settings, piece), _policy(folder, settings, piece)
    prompts = [one.prompt for one in world.training], [one.prompt for one in world.held_out]
    size = settings.max_new_tokens
    noisy = compare(policy, prompts[0], max(settings.amounts), size, piece.seed, 1000, world.known, noisy=True)
    exact = compare(policy, prompts[1], settings.tested_pairs, size, piece.seed, 2000, world.known, noisy=False)
    numbers = {one.prompt.messages[0].text: i for i, one in enumerate([*world.held_out, *world.training])}

    def rows(pairs: list[Any]) -> list[list[Any]]:
        return [[numbers[pair.prompt.messages[0].text], pair.better, pair.worse] for pair in pairs]

    return {"training": rows(noisy), "test": rows(exact)}


def _pool(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    """Responses of the initial policy to held-out prompts, for best-of-n, with their gold rewards."""
    from rlchat.study.gold import gold_points
    from rlchat.study.samples import sample_replies

    world, policy = _world(settings, piece), _policy(folder, settings, piece)
    prompts = [one.prompt for one in world.held_out[: settings.best_of_prompts]]
    every = [prompt for prompt in prompts for _ in range(settings.best_of)]
    replies = sample_replies(policy, every, settings.max_new_tokens, piece.seed, 3000)
    texts = [reply.text for reply in replies]
    gold = [gold_points(p.check, t, world.known) for p, t in zip(every, texts, strict=True) if p.check is not None]
    return {
        "texts": [texts[i : i + settings.best_of] for i in range(0, len(texts), settings.best_of)],
        "gold": np.reshape(gold, (len(prompts), settings.best_of)).round(4).tolist(),
        "gold_std": float(np.std(gold)),
    }


def _proxy(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    from rlchat.study.data import Comparison
    from rlchat.study.train import train_proxy

    world, rows = _world(settings, piece), read_json(folder / f"seed{piece.seed}/pairs.json")
    prompts = [one.prompt for one in (*world.held_out, *world.training)]
    training, test = (
        [Comparison(prompts[number], better, worse) for number, better, worse in part]
        for part in (rows["training"][: piece.amount], rows["test"])
    )
    start = folder / f"seed{piece.seed}/sft-{piece.width}.pt"
    metrics = train_proxy(folder / f"{piece.name}.pt", start, training, test, settings, piece.seed)
    return {"pair_accuracy": metrics["val/pair_accuracy"], "pair_loss": metrics["val/pair_loss"]}


def _best_of(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    """Gold and proxy reward of the best of n by the proxy, and the KL of choosing it."""
    from rlchat.rewards import LearnedQuality, Reply
    from rlchat.rewards.best_of import best_of_kl
    from rlchat.study.fits import best_of_curve
    from rlchat.study.train import NO_CLIP

    world, pool = _world(settings, piece), read_json(folder / f"seed{piece.seed}/pool.json")
    reward = LearnedQuality(str(_proxy_file(folder, piece)), clip=NO_CLIP, batch_size=256)
    scores = []
    for one, texts in zip(world.held_out, pool["texts"], strict=False):
        different = sorted(set(texts), key=len)
        found = reward([one.prompt] * len(different), [Reply(text, 1, True) for text in different]).tolist()
        score_of = dict(zip(different, found, strict=True))
        scores.append([score_of[text] for text in texts])
    proxy, gold = np.array(scores), np.array(pool["gold"])
    counts = [2**k for k in range(settings.best_of.bit_length())]
    return {
        "n": counts,
        "kl": [best_of_kl(n) for n in counts],
        "gold": best_of_curve(proxy, gold, counts),
        "proxy": best_of_curve(proxy, proxy, counts),
    }


def _ppo(folder: Path, settings: Settings, piece: Piece) -> dict[str, Any]:
    from rlchat.study.gold import Gold
    from rlchat.study.train import Recorder, train_ppo

    world = _world(settings, piece)
    recorder = Recorder(
        [one.prompt for one in world.held_out for _ in range(settings.recorded)],
        Gold(world.known),
        settings.record_every,
        settings.most_kl,
    )
    start = folder / f"seed{piece.seed}/sft-{settings.policy_width}.pt"
    prompts = [one.prompt for one in world.training]
    train_ppo(start, _proxy_file(folder, piece), prompts, recorder, settings, piece.kl_coef, piece.seed)
    return {"points": recorder.points}


def _world(settings: Settings, piece: Piece) -> Any:
    from rlchat.study.data import make_study_world

    return make_study_world(settings.questions, settings.held_out, piece.seed)


def _policy(folder: Path, settings: Settings, piece: Piece) -> Any:
    from rlchat.models.model_file import load_policy

    return load_policy(folder / f"seed{piece.seed}/sft-{settings.policy_width}.pt")


def _proxy_file(folder: Path, piece: Piece) -> Path:
    return folder / f"seed{piece.seed}/proxy-{piece.width}-{piece.amount}.pt"


_WORK: dict[str, Callable[[Path, Settings, Piece], dict[str, Any]]] = {
    "sft": _sft,
    "pairs": _pairs,
    "pool": _pool,
    "proxy": _proxy,
    "best_of": _best_of,
    "ppo": _ppo,
}
