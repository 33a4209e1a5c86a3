"""The reward model: the ranking loss by hand, pairs with ties, training on one word, standardized scores."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import OASST2DataModule, RankedBatch
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import RewardBundle, load_reward_model, save_bundle
from rlchat.models.networks import RewardModel
from rlchat.rewards import Reply, Reward
from rlchat.rewards.learned import LearnedQuality
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.training.reward_model import RewardModelModule, preferred_pairs, ranking_loss
from rlchat.utils.padding import pad

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
NAN = math.nan


def batch(
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: Sequence[int],
    rank: Sequence[int] | None = None,
    quality: Sequence[float] | None = None,
    right: Sequence[int] | None = None,
) -> RankedBatch:
    rows = len(group)
    return RankedBatch(
        torch.zeros(rows, 1, dtype=torch.long) if ids is None else ids,
        torch.ones(rows, 1, dtype=torch.bool) if mask is None else mask,
        torch.tensor(group),
        torch.tensor(rank or [-1] * rows),
        torch.tensor(quality or [NAN] * rows),
        torch.tensor(right or [-1] * rows),
    )


# ---- pairs and their loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "worth", "expected"),
    [
        ([0, 0, 0], [3.0, 1.0, 2.0], {(0, 1), (0, 2), (2, 1)}),
        ([0, 0, 0], [1.0, 1.0, 2.0], {(2, 0), (2, 1)}),  # a tie forms no pair
        ([0, 0, 0], [NAN, 1.0, 2.0], {(2, 1)}),  # neither does an unranked response
        ([0, 0, 1, 1], [1.0, 2.0, 9.0, 0.0], {(1, 0), (2, 3)}),  # nor do responses to different prompts
        ([0, 1, 2], [1.0, 2.0, 3.0], set()),
        ([0, 0], [NAN, NAN], set()),
        ([], [], set()),
    ],
    ids=str,
)
def test_pairs(group: list[int], worth: list[float], expected: set[tuple[int, int]]) -> None:
    better, worse = preferred_pairs(torch.tensor(group), torch.tensor(worth))
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
    assert len(better) == len(expected)


def test_ranking_loss_of_three_replies_by_hand() -> None:
    """Scores 2, 1 and -1, ranked 0, 1 and 2; the first and the last labelled."""
    scores = torch.tensor([2.0, 1.0, -1.0], requires_grad=True)
    part = ranking_loss(scores, batch(group=[0, 0, 0], rank=[0, 1, 2], quality=[1.0, NAN, 0.25]))
    assert part.prompts == 1

    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    # The mean over K(K - 1)/2 = 3 pairs.
    assert part.pair_loss.tolist() == pytest.approx([(softplus(-1) + softplus(-3) + softplus(-2)) / 3])
    # -q·ln σ(s) - (1 - q)·ln(1 - σ(s)), for q = 1 at 2 and q = 1/4 at -1.
    assert part.label_loss.tolist() == pytest.approx([(softplus(-2) + 0.25 * softplus(1) + 0.75 * softplus(-1)) / 2])
    part.pair_loss.sum().backward()
    sigmoid = torch.tensor([-1.0, -3.0, -2.0]).sigmoid()  # of worse - better: the pairs (0, 1), (0, 2), (1, 2)
    expected = [-sigmoid[0] - sigmoid[1], sigmoid[0] - sigmoid[2], sigmoid[1] + sigmoid[2]]
    torch.testing.assert_close(scores.grad, torch.stack(expected) / 3)


def test_each_prompt_has_the_same_weight_in_the_ranking_loss() -> None:
    """InstructGPT's equation 1 divides the pairs of a prompt by K(K - 1)/2. Here K is 2 and 4, and a third has none."""
    scores = torch.zeros(8)
    part = ranking_loss(scores, batch(group=[0, 0, 1, 1, 1, 1, 2, 2], rank=[0, 1, 0, 1, 2, 3, 0, 0]))
    assert part.pair_loss.tolist() == pytest.approx([math.log(2), math.log(2)])
    assert len(part.label_loss) == 0
    assert part.prompts == 2
    labels = ranking_loss(scores[:4], batch(group=[0, 0, 1, 2], quality=[1.0, 0.0, NAN, 0.5]))
    assert (len(labels.pair_loss), len(labels.label_loss), labels.prompts) == (0, 2, 2)


def test_a_batch_without_pairs_or_labels_costs_nothing_and_has_a_gradient() -> None:
    scores = torch.zeros(2, requires_grad=True)
    part = ranking_loss(scores, batch(group=[0, 1], rank=[0, 0]))
    assert (len(part.pair_loss), len(part.label_loss), part.prompts) == (0, 0, 0)
    (part.pair_loss.sum() + part.label_loss.sum()).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0, 0]


# ---- training --------------------------------------------------------------------------------------------------------


def judge(encoding: str, **options: Any) -> RewardModelModule:
    torch.manual_seed(0)
    options = {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0, **options}
    return RewardModelModule(LLAMA, encoding, max_length=32, **options)


def replies_batch(tokenizer: ChatTokenizer, replies: Sequence[Sequence[str]], labelled: bool = False) -> RankedBatch:
    """Each of ``replies`` answers one prompt, the best first."""
    texts = [(group, rank, text) for group, texts in enumerate(replies) for rank, text in enumerate(texts)]
    rows = [tokenizer.render(Conversation((Message("user", "?"), Message("assistant", t)))).ids for _, _, t in texts]
    group, rank = [g for g, _, _ in texts], [r for _, r, _ in texts]
    return batch(
        *pad(rows, tokenizer.pad_id, "right"),
        group=group,
        rank=rank,
        quality=[1.0 if r == 0 else 0.0 for r in rank] if labelled else None,
        right=[int(r == 0) for r in rank],
    )


def serve(batches: Sequence[RankedBatch]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


class Log(L.Callback):
    """Records the metrics of every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        enable_model_summary=False,
        max_epochs=1,
        log_every_n_steps=1,
        **{**quiet, **options},
    )


FRUIT = [("a plum", "a stone"), ("plum it is", "it is not"), ("one plum", "one nail", "one"), ("my plum", "my shoe")]
HELD_OUT = [("the plum here", "the rock here"), ("plum", "rust")]


def test_the_reward_model_learns_a_word(encoding: str) -> None:
    module, log = judge(encoding), Log()
    training = replies_batch(module.tokenizer, FRUIT, labelled=True)
    held_out = replies_batch(module.tokenizer, HELD_OUT, labelled=True)
    trainer(callbacks=[log]).fit(module, serve([training] * 40), serve([held_out]))
    # A new head scores 0 everywhere: every pair costs ln 2, and so does every label.
    first, last = log.rows[0], log.rows[-1]
    assert first["train/pair_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["train/label_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["train/pair_accuracy"] == 0
    assert last["train/pair_accuracy"] == 1
    assert last["train/pair_loss"] < 0.1
    found = trainer().validate(module, serve([held_out]), verbose=False)[0]
    assert found["val/pair_accuracy"] == found["val/right_over_wrong"] == 1.0
    assert found["val/pair_loss"] < 0.5
    assert found["val/label_error"] < 0.5


def test_label_coef_weights_the_label_loss(encoding: str) -> None:
    def loss(coefficient: float, labelled: bool) -> dict[str, float]:
        module, log = judge(encoding, label_coef=coefficient), Log()
        torch.nn.init.normal_(module.model.score_head.weight)  # type: ignore[arg-type]
        trainer(callbacks=[log]).fit(module, serve([replies_batch(module.tokenizer, FRUIT, labelled)]))
        return log.rows[0]

    with_labels, without = loss(0.25, True), loss(0.25, False)
    assert with_labels["train/pair_loss"] == pytest.approx(without["train/pair_loss"])
    combined = with_labels["train/pair_loss"] + 0.25 * with_labels["train/label_loss"]
    assert with_labels["train/loss"] == pytest.approx(combined)
    assert without["train/loss"] == pytest.approx(without["train/pair_loss"])


@torch.no_grad()
def test_held_out_metrics_give_every_pair_the_same_weight(encoding: str) -> None:
    """For any batches; and the model keeps the scale of the held-out scores."""
    module = judge(encoding)
    torch.nn.init.normal_(module.model.score_head.weight)  # type: ignore[arg-type]
    rows = [("ab", "c", "def"), ("gh", "i"), ("j", "kl"), ("m", "n")]
    whole = replies_batch(module.tokenizer, rows, labelled=True)
    scores = module.model.eval()(whole.ids, whole.attention_mask)
    better, worse = torch.tensor([0, 0, 1, 3, 5, 7]), torch.tensor([1, 2, 2, 4, 6, 8])
    expected = {
        "val/pair_accuracy": float((scores[better] > scores[worse]).float().mean()),
        "val/pair_loss": float((scores[worse] - scores[better]).exp().log1p().mean()),
        "val/label_error": float((scores.sigmoid() - whole.quality).abs().mean()),
        # The first response of each prompt is correct, the others are wrong.
        "val/right_over_wrong": float((scores[[0, 0, 3, 5, 7]] > scores[[1, 2, 4, 6, 8]]).float().mean()),
    }
    for cuts in ([rows], [rows[:1], rows[1:]], [rows[:3], rows[3:]]):
        module.model.mean.fill_(0.0)
        batches = [replies_batch(module.tokenizer, part, labelled=True) for part in cuts]
        assert trainer().validate(module, serve(batches), verbose=False)[0] == pytest.approx(expected, abs=1e-5)
        assert float(module.model.mean) == pytest.approx(float(scores.mean()), abs=1e-5)
        assert float(module.model.std) == pytest.approx(float(scores.std()), abs=1e-5)


def fitted_on_rows(encoding: str, folder: Path, **data: Any) -> tuple[RewardModelModule, list[float]]:
    """A reward model trained for two batches on eight pairs, and its final scores of all responses."""
    pairs = [(f"{n} plus 1?", f"It is {n + 1}.", "No" * (n + 1)) for n in range(8)]
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = judge(encoding)
    served = OASST2DataModule(str(folder / "d.jsonl"), batch_size=4, cache_dir=str(folder / "cache"), **data)
    trainer().fit(module, datamodule=served)
    scores = []
    for prompt, *responses in pairs:
        for text in responses:
            ids = torch.tensor(
                [module.tokenizer.render(Conversation((Message("user", prompt), Message("assistant", text)))).ids]
            )
            scores.append(module.model.eval()(ids, torch.ones_like(ids, dtype=torch.bool)).item())
    return module, scores


def test_without_validation_training_scores_standardize_and_a_line_says_so(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, scores = fitted_on_rows(encoding, tmp_path, val_fraction=0, test_fraction=0)
    assert float(module.model.mean) == pytest.approx(statistics.mean(scores), abs=1e-5)
    assert float(module.model.std) == pytest.approx(statistics.stdev(scores), abs=1e-5)
    assert 1e-3 < float(module.model.std) < 1
    assert "no validation was run, so the reward model's scores are standardized on 16 training responses" in (
        caplog.text
    )


def test_with_validation_held_out_scores_standardize(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, scores = fitted_on_rows(encoding, tmp_path, val_fraction=0.5, test_fraction=0)
    assert float(module.model.mean) != pytest.approx(statistics.mean(scores), abs=1e-5)
    assert "no validation was run" not in caplog.text


def test_training_batches_of_a_script_cannot_standardize(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    module = judge(encoding)
    trainer().fit(module, serve([replies_batch(module.tokenizer, FRUIT)]))
    assert (float(module.model.mean), float(module.model.std)) == (0, 1)
    assert "scores are not standardized (mean 0, standard deviation 1)" in caplog.text


def test_testing_does_not_change_the_scale(encoding: str) -> None:
    module = judge(encoding)
    module.model.mean.fill_(7.0)
    found = trainer().test(module, serve([replies_batch(module.tokenizer, HELD_OUT)]), verbose=False)[0]
    assert "test/pair_accuracy" in found
    assert float(module.model.mean) == 7.0


def test_equal_scores_have_a_finite_scale(encoding: str) -> None:
    module = judge(encoding)  # its head is zero: all scores are equal
    trainer().validate(module, serve([replies_batch(module.tokenizer, HELD_OUT)]), verbose=False)
    assert float(module.model.std) == pytest.approx(1e-3)


def test_an_untied_policy_head_is_not_trained(encoding: str) -> None:
    module = judge(encoding)
    head = module.model.backbone.head
    assert head is not None
    before = head.weight.clone()
    trainer().fit(module, serve([replies_batch(module.tokenizer, FRUIT)] * 2))
    assert torch.equal(head.weight, before)


def test_the_model_file_is_a_reward_model(encoding: str, tmp_path: Path) -> None:
    module = judge(encoding)
    trainer().fit(
        module, serve([replies_batch(module.tokenizer, FRUIT)]), serve([replies_batch(module.tokenizer, HELD_OUT)])
    )
    module.save_bundle(tmp_path / "reward_model.pt")
    loaded = load_reward_model(tmp_path / "reward_model.pt")
    assert float(loaded.model.mean) == float(module.model.mean)
    assert loaded.about == {"stage": "RewardModelModule", "batches": 1}


def test_it_continues_from_a_reward_model(encoding: str, tmp_path: Path) -> None:
    """Its scores are those of the file; an option that contradicts the file is refused, as for a chat model."""
    module = judge(encoding)
    batch = replies_batch(module.tokenizer, FRUIT, labelled=True)
    trainer().fit(module, serve([batch] * 5))
    module.save_bundle(tmp_path / "reward.pt")
    again = RewardModelModule(init_from=str(tmp_path / "reward.pt"))
    found, before = (m.model.eval()(batch.ids, batch.attention_mask) for m in (again, module))
    torch.testing.assert_close(found, before)
    assert found.std() > 0.01
    assert again.max_length == 32
    with pytest.raises(UserError, match="invalid value 64 for max_length"):
        RewardModelModule(init_from=str(tmp_path / "reward.pt"), max_length=64)
    with pytest.raises(UserError, match="cannot be combined"):
        RewardModelModule(LLAMA, init_from=str(tmp_path / "reward.pt"))


# ---- the factor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> RewardBundle:
    torch.manual_seed(0)
    model = RewardModel(Backbone({**LLAMA, "initializer_range": 0.3}, byte_tokenizer.vocab_size, 32)).eval()
    torch.nn.init.normal_(model.score_head.weight, std=3.0)  # type: ignore[arg-type]
    model.mean.fill_(0.5)
    model.std.fill_(2.0)
    save_bundle(tmp_path / "reward.pt", RewardBundle(model, byte_tokenizer, 32))
    return RewardBundle(model, byte_tokenizer, 32)


SAID = ["", "yes", "a rather long reply", "no", "x" * 100, "so", "it goes"]
ASKED = [Conversation((Message("user", "why " * (i % 3)),)) for i in range(len(SAID))]
REPLIES = [Reply(text, len(text), True) for text in SAID]


@torch.no_grad()
def test_learned_quality_standardises_and_clips(bundle: RewardBundle, tmp_path: Path) -> None:
    raw = []
    for prompt, text in zip(ASKED, SAID, strict=True):
        ids = bundle.tokenizer.render(prompt.say("assistant", text), 32).ids
        ids[-1] = bundle.tokenizer.end_id  # truncated responses also end with it
        raw.append(float(bundle.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))))
    standardised = [(score - 0.5) / 2 for score in raw]
    limit = sorted(abs(x) for x in standardised)[3]  # so that some are clipped and others are not
    for clip in (100.0, limit):
        found = LearnedQuality(str(tmp_path / "reward.pt"), clip=clip, device="cpu")(ASKED, REPLIES)
        assert found.tolist() == pytest.approx([max(-clip, min(clip, x)) for x in standardised], abs=1e-5)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@torch.no_grad()
def test_truncation_by_max_length_and_by_max_new_tokens_give_the_same_score(
    bundle: RewardBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt "why" has 5 ids, so a response of 100 letters keeps marker, 25 letters and the end marker."""
    prompt = Conversation((Message("user", "why"),))
    factor = LearnedQuality(str(tmp_path / "reward.pt"), clip=100.0, device="cpu")
    long, generated = factor([prompt] * 2, [Reply("x" * 100, 100, True), Reply("x" * 25, 25, False)]).tolist()
    assert long == pytest.approx(generated, abs=1e-6)
    ids = torch.tensor([[258, *b"why", 260, 259, *b"x" * 25, 260]])
    assert ids.shape == (1, 32)
    score = float(bundle.model(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert generated == pytest.approx((score - 0.5) / 2, abs=1e-5)
    assert (factor.cut.rows, factor.cut.found) == (2, 1)
    factor([prompt] * 9, [Reply("x" * 26, 26, True)] * 9)
    assert [record.getMessage().partition(" of the")[0] for record in caplog.records] == [
        "LearnedQuality: 1 of 2 responses were longer than max_length 32",
        "LearnedQuality: 10 of 11 responses were longer than max_length 32",
    ]


def test_learned_quality_scores_do_not_depend_on_the_batch(bundle: RewardBundle, tmp_path: Path) -> None:
    path = str(tmp_path / "reward.pt")
    together = LearnedQuality(path, clip=100.0, device="cpu")(ASKED, REPLIES)
    order = [4, 2, 0, 6, 5, 1, 3]
    for size in (1, 2, 64):
        factor = LearnedQuality(path, clip=100.0, batch_size=size, device="cpu")
        shuffled = factor([ASKED[i] for i in order], [REPLIES[i] for i in order])
        torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    assert LearnedQuality(path, device="cpu")([], []).tolist() == []


def test_learned_quality_is_a_factor(bundle: RewardBundle, tmp_path: Path) -> None:
    factor = LearnedQuality(str(tmp_path / "reward.pt"), weight=0.5, device="cpu")
    found = Reward([factor]).breakdown(ASKED, REPLIES)
    torch.testing.assert_close(found["learned_quality"], 0.5 * factor(ASKED, REPLIES))


@pytest.mark.parametrize(("device", "moved"), [("auto", "meta"), ("cpu", "cpu")])
def test_learned_quality_follows_the_policy_unless_a_device_is_set(
    bundle: RewardBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, moved: str
) -> None:
    """It starts on the CPU, independently of LOCAL_RANK and of GPUs that the Trainer does not use."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    factor = LearnedQuality(str(tmp_path / "reward.pt"), device=device)
    assert factor.reward_model.model.mean.device == torch.device("cpu")
    Reward([factor]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in factor.reward_model.model.state_dict().values()} == {moved}
    assert factor.describe()["init_args"]["device"] == device


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"batch_size": 0}], ids=str)
def test_learned_quality_rejects_invalid_options(bundle: RewardBundle, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"clip .* and batch_size .* must be above 0"):
        LearnedQuality(str(tmp_path / "reward.pt"), **options)
    with pytest.raises(UserError, match="no such model"):
        LearnedQuality(str(tmp_path / "nothing.pt"))
