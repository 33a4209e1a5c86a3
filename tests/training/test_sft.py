"""Supervised fine-tuning: the loss by hand and its decrease, and held-out metrics with equal weights for all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_ppo import Log, sequences, serve, trainer
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import OASST2DataModule, PromptBatch
from rlchat.errors import UserError
from rlchat.models.model_file import load_policy
from rlchat.training.optimizers import make_optimizer, make_scheduler
from rlchat.training.sft import SFTModule
from rlchat.training.tally import Tally
from rlchat.utils.padding import pad

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}
NAN = math.nan
TALK = [("Hi", "Hello."), ("Who?", "A machine of words"), ("x", ""), ("Why", "So."), ("", "Well")]


def sft(encoding: str, **options: Any) -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(LLAMA, encoding, max_length=32, **{"learning_rate": 1e-2, "schedule": "constant", **options})


@torch.no_grad()
def by_hand(module: SFTModule, talk: Sequence[tuple[str, str]]) -> tuple[list[float], list[float]]:
    """Nats and hits of every token of the assistant, computed one conversation and one token at a time."""
    nats, hits = [], []
    model = module.model.eval()
    for question, answer in talk:
        ids = [258, *question.encode(), 260, 259, *answer.encode(), 260]
        for place in range(len(ids) - len(answer) - 1, len(ids)):
            before = torch.tensor([ids[:place]])
            hidden = model.backbone(before, torch.ones_like(before, dtype=torch.bool))[0, -1]
            said = [*range(256), 260]  # no padding, no marker that opens a turn
            scores = (model.backbone.head_weight[said] @ hidden).double().tolist()
            weights = [math.exp(score) for score in scores]
            nats.append(math.log(sum(weights)) - scores[said.index(ids[place])])
            hits.append(float(said[scores.index(max(scores))] == ids[place]))
    module.model.train()
    return nats, hits


def test_the_loss_is_the_mean_over_the_assistants_tokens(encoding: str) -> None:
    module, log = sft(encoding), Log()
    nats, hits = by_hand(module, TALK)
    assert len(nats) == 7 + 19 + 1 + 4 + 5
    trainer(callbacks=[log]).fit(module, serve([sequences(module.tokenizer, TALK)]))
    assert log.rows[0]["train/loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    assert log.rows[0]["train/perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3)
    assert log.rows[0]["train/accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert {"train/grad_norm", "train/learning_rate"} <= set(log.rows[0])


@pytest.mark.parametrize(("every", "with_metrics"), [(2, [1, 3, 4]), (50, [4]), (0, [4])])
def test_metrics_are_computed_when_they_are_written_and_at_the_end(
    encoding: str, every: int, with_metrics: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five batches; callbacks that monitor a metric at the end of an epoch find it."""
    module, log = sft(encoding), Log()
    computed: list[int] = []
    rate = module.current_learning_rate
    monkeypatch.setattr(module, "current_learning_rate", lambda: computed.append(module.trainer.global_step) or rate())
    batches = [sequences(module.tokenizer, TALK)] * 5
    trainer(callbacks=[log], log_every_n_steps=every).fit(module, serve(batches))
    assert computed == with_metrics
    assert all("train/loss" in row for row in log.rows)
    assert {"train/perplexity", "train/grad_norm"} <= set(log.rows[-1])


def test_held_out_metrics_by_hand_for_any_batches(encoding: str) -> None:
    module = sft(encoding)
    nats, hits = by_hand(module, TALK)
    expected = {
        "val/perplexity": pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3),
        "val/accuracy": pytest.approx(sum(hits) / len(hits)),
    }
    for cuts in ([TALK], [TALK[:1], TALK[1:]], [TALK[:2], TALK[2:3], TALK[3:]]):
        batches = [sequences(module.tokenizer, part) for part in cuts]
        assert trainer().validate(module, serve(batches), verbose=False) == [expected]
    tested = trainer().test(module, serve(batches), verbose=False)[0]
    assert tested["test/perplexity"] == expected["val/perplexity"]


def test_sft_learns_a_small_corpus(encoding: str) -> None:
    module, log = sft(encoding), Log()
    batch = sequences(module.tokenizer, TALK)
    trainer(callbacks=[log]).fit(module, serve([batch] * 60), serve([batch]))
    losses = [row["train/loss"] for row in log.rows]
    assert losses[-1] < 0.3 * losses[0]
    found = trainer().validate(module, serve([batch]), verbose=False)[0]
    assert found["val/perplexity"] < math.exp(0.3 * losses[0])
    assert found["val/accuracy"] > 0.7
    (reply,) = module.respond([Conversation((Message("user", "Hi"),))])
    assert reply.text.startswith("H")  # sampled, and still the trained response
    assert reply.ended


def test_sft_does_not_train_the_critic(encoding: str) -> None:
    module = sft(encoding, hidden_dim=4)
    before = [p.clone() for p in module.model.value_head.parameters()]
    trainer().fit(module, serve([sequences(module.tokenizer, TALK)] * 2))
    for one, other in zip(module.model.value_head.parameters(), before, strict=True):
        assert torch.equal(one, other)


def test_responses_are_repeatable_and_the_training_mode_is_restored(encoding: str) -> None:
    module = sft(encoding)
    asked = [Conversation((Message("user", text),)) for text in ("Hi", "What is it that you want to know about me?")]
    module.model.train()
    first = module.respond(asked)
    assert module.model.training
    assert first == module.respond(asked)
    assert first[:1] == module.respond(asked[:1])  # independent of the other prompts
    assert all(reply.tokens <= 16 for reply in first)


def test_predictions_are_plain_values(encoding: str) -> None:
    module = sft(encoding)
    asked = tuple(Conversation((Message("user", text),)) for text in ("Hi", "Why", "So"))
    rows = [module.tokenizer.render_prompt(c).ids for c in asked]

    def batch(part: slice) -> Any:
        return PromptBatch(*pad(rows[part], module.tokenizer.pad_id, "left"), asked[part])

    def predicted(*parts: slice) -> list[dict[str, Any]]:
        loader = serve([batch(part) for part in parts])
        batches = trainer().predict(module, loader)
        assert batches is not None
        return [row for rows in batches for row in rows]

    whole = predicted(slice(0, 3))
    assert [row["messages"] for row in whole] == [[{"role": "user", "content": text}] for text in ("Hi", "Why", "So")]
    assert set(whole[0]) == {"messages", "reply", "tokens", "ended"}
    assert predicted(slice(0, 1), slice(1, 3)) == whole


def test_prompts_near_the_maximum_length_leave_room_for_the_prediction(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("What is the meaning of all these words?\nHi\n")

    def predicted(**options: Any) -> list[dict[str, Any]]:
        data = OASST2DataModule(predict_path=str(tmp_path / "prompts.txt"))
        batches = trainer().predict(sft(encoding, **options), datamodule=data)
        assert batches is not None
        return [row for rows in batches for row in rows]

    assert all(1 <= row["tokens"] <= 16 for row in predicted())  # half of max_length 32
    assert all(row["tokens"] <= 3 for row in predicted(max_new_tokens=3))
    first, again, other = (predicted(seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    cold, colder = (predicted(seed=seed, temperature=0.0) for seed in (1, 2))
    assert cold == colder  # greedy
    for options in ({"max_new_tokens": 32}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match="invalid value"):
            sft(encoding, **options)


def test_the_model_file_initializes_the_next_stage(encoding: str, tmp_path: Path) -> None:
    module = sft(encoding)
    batch = sequences(module.tokenizer, TALK)
    trainer().fit(module, serve([batch] * 3))
    module.save_bundle(tmp_path / "sft.pt")
    assert load_policy(tmp_path / "sft.pt").about == {"stage": "SFTModule", "batches": 3}
    resumed = SFTModule(init_from=str(tmp_path / "sft.pt"))
    assert resumed.max_length == 32
    before, after = (trainer().validate(m, serve([batch]), verbose=False)[0] for m in (module, resumed))
    assert before == after


def test_options_that_contradict_the_model_file_are_errors(encoding: str, tmp_path: Path) -> None:
    module = sft(encoding)
    trainer().fit(module, serve([sequences(module.tokenizer, TALK)]))
    path = str(tmp_path / "sft.pt")
    module.save_bundle(path)
    with pytest.raises(UserError, match="cannot be combined, because the model file contains a backbone"):
        SFTModule(LLAMA, init_from=path)
    with pytest.raises(UserError, match="trained with the encoding bytes, not rlchat_1k"):
        SFTModule(tiktoken_encoding="rlchat_1k", init_from=path)
    with pytest.raises(UserError, match=r"invalid value 33 for max_length: the model file .* has 32"):
        SFTModule(max_length=33, init_from=path)
    shorter = SFTModule(tiktoken_encoding=encoding, max_length=16, hidden_dim=3, init_from=path)
    assert (shorter.max_length, shorter.model.hidden_dim) == (16, 3)
    assert isinstance(shorter.model.value_head, torch.nn.Sequential)


# ---- common to all stages --------------------------------------------------------------------------------------------


def test_a_tally_gives_every_number_the_same_weight() -> None:
    tally = Tally()
    tally.add("accuracy", torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    tally.add("accuracy", torch.tensor([0.0]))
    tally.add("nll", torch.tensor([math.log(2)] * 3))
    tally.add("nll", torch.tensor([math.log(32)]))
    tally.add("hits", torch.tensor([True, False]))
    tally.add("hits", torch.tensor([], dtype=torch.bool))
    found = tally.means(torch.device("cpu"))
    # Perplexity is exp of the mean over tokens: (3 ln 2 + 5 ln 2) / 4 = ln 4.
    assert found == pytest.approx({"accuracy": 4 / 6, "hits": 0.5, "perplexity": 4.0}, rel=1e-6)
    assert tally.means(torch.device("cpu")) == {}
    tally.add("nll", torch.tensor([1e9]))  # exp of this exceeds the largest float
    assert tally.means(torch.device("cpu"))["perplexity"] == math.inf


def test_a_tally_does_not_drop_nan() -> None:
    tally = Tally()
    tally.add("nll", torch.tensor([1.0, NAN, 3.0]))  # without the NaN, the perplexity would be exp(2) = 7.39
    tally.add("accuracy", torch.tensor([1.0, 0.0]))
    found = tally.means(torch.device("cpu"))
    assert math.isnan(found["perplexity"])
    assert found["accuracy"] == 0.5
    tally.add("nll", torch.tensor([1.0, math.inf]))
    assert tally.means(torch.device("cpu"))["perplexity"] == math.inf


def rates(schedule: str, warmup: float, steps: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, schedule, warmup, steps)
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_learning_rates_by_hand() -> None:
    assert rates("constant", 0.5, 4) == pytest.approx([0, 0.5, 1, 1, 1])
    assert rates("linear", 0.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates("linear", 0.5, 4) == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert rates("cosine", 0.0, 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert rates("constant", 0.5, math.inf) == [1, 1, 1, 1, 1]
    with pytest.raises(
        UserError, match=r"invalid value 'cosine' for --model\.schedule: the length of the run is unlimited"
    ):
        rates("cosine", 0.0, math.inf)


def test_weight_decay_applies_to_matrices_only() -> None:
    parameters: list[Tensor] = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = make_optimizer([*parameters, frozen], learning_rate=0.1, weight_decay=0.5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameters[0].tolist() == [[pytest.approx(1 - 0.1 * 0.5)] * 2] * 2
    assert parameters[1].tolist() == [1, 1]
    assert frozen.tolist() == [[1, 1], [1, 1]]
