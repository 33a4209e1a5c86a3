"""DPO: its losses by hand and as in TRL, the first loss, learning from pairs, the reference model, the model file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.command_line import rlchat
from helpers.small_ppo import QUESTIONS, Log, prompts, sequences, serve, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from prove.runs import QUIET, metrics, write_talk
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import DataNeeds, JudgedBatch, OASST2DataModule, PreferenceBatch
from rlchat.errors import UserError
from rlchat.models.adapters import share_frozen
from rlchat.models.model_file import load_policy
from rlchat.models.sampling import Sampling, addressed_uniforms
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.training.base import VALIDATION_STREAM
from rlchat.training.dpo import DPOModule, LossType, dpo_loss, implicit_rewards
from rlchat.utils.padding import pad

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DROPOUT = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "dropout": 0.5}
LOSSES: tuple[LossType, ...] = get_args(LossType)
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 2}
FRUIT = [("a plum", "a stone"), ("plum it is", "it is not"), ("one plum", "one nail", "one"), ("my plum", "my shoe")]


def dpo(encoding: str, base: dict[str, Any] = LLAMA, **options: Any) -> DPOModule:
    torch.manual_seed(0)
    options = {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0, **options}
    return DPOModule(base, encoding, max_length=32, **options)


def pairs_batch(tokenizer: ChatTokenizer, replies: Sequence[Sequence[str]]) -> PreferenceBatch:
    """Each of ``replies`` answers one prompt, the best first."""
    texts = [(group, rank, text) for group, texts in enumerate(replies) for rank, text in enumerate(texts)]
    rows = [tokenizer.render(Conversation((Message("user", "?"), Message("assistant", t)))) for _, _, t in texts]
    ids, mask = pad([row.ids for row in rows], tokenizer.pad_id, "right")
    response_mask = pad([row.loss_mask for row in rows], False, "right")[0].bool()
    group, rank = (torch.tensor([entry[i] for entry in texts]) for i in (0, 1))
    return PreferenceBatch(ids, mask, response_mask, group, rank)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_the_losses_by_hand() -> None:
    """Log-ratios -1.75 + 2.1 = 0.35 of three tokens and -3 + 2.75 = -0.25 of two; β = 1/10."""
    logprobs, ref, tokens = double(-1.75, -3), double(-2.1, -2.75), torch.tensor([3, 2])
    expected = {
        "sigmoid": ([0.035, -0.025], math.log1p(math.exp(-0.06))),
        "sigmoid_norm": ([0.035 / 3, -0.0125], math.log1p(math.exp(-(0.035 / 3 + 0.0125)))),
        "ipo": ([0.035 / 3, -0.0125], (0.35 / 3 + 0.125 - 5) ** 2),  # 1 / 2β = 5
    }
    for loss_type, (rewards, loss) in expected.items():
        found = implicit_rewards(logprobs, ref, tokens, 0.1, loss_type)  # type: ignore[arg-type]
        torch.testing.assert_close(found, double(*rewards))
        torch.testing.assert_close(dpo_loss(found[:1] - found[1:], 0.1, loss_type), double(loss))  # type: ignore[arg-type]


def test_the_losses_of_trl() -> None:
    """``DPOTrainer._compute_loss`` of TRL 1.12.0 for the log-probs (-1, -1/2, -1/4) of the better response and (-2, -1)
    of the worse one, under the reference model (-1.2, -0.8, -0.1) and (-1.5, -1.25), with β = 0.1."""
    logprobs, ref, tokens = double(-1.75, -3), double(-2.1, -2.75), torch.tensor([3, 2])
    trl = {"sigmoid": 0.6635971130761409, "ipo": 22.641736111111108, "sigmoid_norm": 0.681136848922401}
    assert trl.keys() == set(LOSSES)
    for loss_type in LOSSES:
        rewards = implicit_rewards(logprobs, ref, tokens, 0.1, loss_type)
        loss = dpo_loss(rewards[:1] - rewards[1:], 0.1, loss_type)
        assert float(loss) == pytest.approx(trl[loss_type], rel=1e-9)


def test_label_smoothing_by_hand() -> None:
    """A margin of log 3: σ is 3/4, and of the reverse 1/4."""
    found = dpo_loss(double(math.log(3)), 0.1, label_smoothing=0.2)
    torch.testing.assert_close(found, double(-0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4)))


@given(st.floats(0.01, 5), st.floats(-3, 3))
@settings(deadline=None, max_examples=60)
def test_where_the_losses_are_lowest(beta: float, margin: float) -> None:
    """ipo: at a margin of 1/2 (a log-ratio of 1 / 2β). Smoothed: at log((1 - ε) / ε). sigmoid: nowhere."""
    for loss_type, lowest, smoothing in (("ipo", 0.5, 0.0), ("sigmoid_norm", math.log(9), 0.1)):
        at, other = (float(dpo_loss(double(x), beta, loss_type, smoothing)) for x in (lowest, margin))  # type: ignore[arg-type]
        assert at <= other + 1e-12
    assert dpo_loss(double(margin + 1), beta) < dpo_loss(double(margin), beta)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [LLAMA, DROPOUT], ids=["llama", "distilbert"])
@pytest.mark.parametrize("options", [{}, LORA, {"train_layers": 1}], ids=["all", "lora", "layers"])
def test_the_first_loss_is_log_2(encoding: str, base: dict[str, Any], options: dict[str, Any]) -> None:
    """The policy is the reference model, also with dropout."""
    module, log = dpo(encoding, base, **options), Log()
    batch = pairs_batch(module.tokenizer, FRUIT)
    trainer(callbacks=[log]).fit(module, serve([batch] * 2))
    assert log.rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log.rows[0]["train/reward_margin"] == pytest.approx(0, abs=1e-6)
    assert log.rows[1]["train/loss"] < math.log(2) - 1e-4
    assert log.rows[1]["train/reward_margin"] > 1e-4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_it_learns_to_rank_the_pairs(encoding: str, loss_type: LossType) -> None:
    module, log = dpo(encoding, loss_type=loss_type, learning_rate=3e-3), Log()
    batch = pairs_batch(module.tokenizer, FRUIT)
    first = module.response_logprobs(module.model, batch).detach()
    trainer(callbacks=[log]).fit(module, serve([batch] * 25))
    assert log.rows[0]["train/pair_accuracy"] < 0.7  # margins of rounding size
    assert log.rows[-1]["train/pair_accuracy"] == 1
    assert log.rows[-1]["train/loss"] < log.rows[0]["train/loss"]
    assert log.rows[-1]["train/chosen_reward"] > log.rows[-1]["train/rejected_reward"]
    chosen, rejected = log.rows[-1]["train/chosen_logprob"], log.rows[-1]["train/rejected_logprob"]
    assert chosen - rejected > float(first[[0, 2, 4, 4, 5, 7]].mean() - first[[1, 3, 5, 6, 6, 8]].mean())
    # The reference model has not changed.
    torch.testing.assert_close(module.response_logprobs(module.reference, batch), first)


@torch.no_grad()
def test_log_probs_are_sums_over_the_response_whatever_the_padding(encoding: str) -> None:
    module = dpo(encoding)
    batch = pairs_batch(module.tokenizer, FRUIT)
    found = module.response_logprobs(module.model, batch)
    for row in range(len(batch.ids)):
        ids = batch.ids[row, batch.attention_mask[row]]
        hidden = module.model(ids[None], torch.ones_like(ids, dtype=torch.bool)[None])
        start = int(batch.response_mask[row].int().argmax())
        logprobs = module.model.token_stats(hidden[0, start - 1 : -1], ids[start:]).logprobs
        assert len(logprobs) == len(FRUIT[0][0]) + 1 or row  # the text and its end marker
        torch.testing.assert_close(found[row], logprobs.sum(), atol=1e-4, rtol=1e-5)


def test_the_loss_is_the_mean_over_all_pairs(encoding: str) -> None:
    """Three responses to a prompt are three pairs. A batch in two microbatches gives the gradient of the whole."""
    rows, whole = [], dpo(encoding)
    for parts in ([FRUIT], [FRUIT[:1], FRUIT[1:]]):
        module = dpo(encoding)
        torch.nn.init.normal_(module.model.backbone.head_weight, std=0.3, generator=torch.Generator().manual_seed(1))
        batches = [pairs_batch(module.tokenizer, part) for part in parts]
        trainer(accumulate_grad_batches=len(parts)).fit(module, serve(batches))
        rows.append([p.detach() for p in module.model.parameters()])
        if len(parts) == 1:
            pairs = whole.preferences(pairs_batch(whole.tokenizer, FRUIT))
            assert len(pairs.loss) == 6
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_held_out_metrics(encoding: str) -> None:
    """Pairs have the same weight in any batches, and conversations give accuracy and perplexity."""
    module = dpo(encoding)
    trainer().fit(module, serve([pairs_batch(module.tokenizer, FRUIT)] * 10))
    held_out = [
        ("plum", "stone"),
        ("a nail", "a plum", "not"),
        ("plum plum", "shoe"),
        ("x", "y"),
    ]  # the second is wrong
    with torch.no_grad():
        pairs = module.preferences(pairs_batch(module.tokenizer, held_out))
    expected = {
        "val/loss": float(pairs.loss.mean()),
        "val/pair_accuracy": float((pairs.margin > 0).float().mean()),
        "val/reward_margin": float(pairs.margin.mean()),
    }
    assert 0 < expected["val/pair_accuracy"] < 1
    for cuts in ([held_out], [held_out[:1], held_out[1:]]):
        batches = [*(pairs_batch(module.tokenizer, part) for part in cuts), sequences(module.tokenizer)]
        found = dict(trainer().validate(module, serve(batches), verbose=False)[0])
        assert found.pop("val/perplexity") > 1
        assert 0 <= found.pop("val/accuracy") < 1
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_kl_of_one_token_is_that_over_the_vocabulary(encoding: str, temperature: float) -> None:
    """Responses of one token: the mean log-ratio comes within four standard errors of Σ π (log π − log π_ref).

    The temperature of samples has no influence.
    """
    module = dpo(encoding, max_new_tokens=1, temperature=temperature, learning_rate=5e-2)
    batch = prompts(module.tokenizer, ("?",)).repeated(4000)
    measured = trainer().validate(module, serve([batch]), verbose=False)[0]
    assert measured["val/kl"] == 0
    trainer().fit(module, serve([pairs_batch(module.tokenizer, FRUIT)] * 10))
    with torch.no_grad():
        policy, reference = (
            model.logits(model(batch.ids[:1], batch.attention_mask[:1])[0, -1]).log_softmax(-1)
            for model in (module.model, module.reference)
        )
    log_ratio = (policy - reference).nan_to_num()  # unsayable ids have probability 0
    kl = float((policy.exp() * log_ratio).sum())
    spread = float((policy.exp() * (log_ratio - kl) ** 2).sum().sqrt())
    measured = trainer().validate(module, serve([batch]), verbose=False)[0]
    assert kl > 0.05
    assert measured["val/kl"] == pytest.approx(kl, abs=4 * spread / 4000**0.5)
    assert measured["val/response_length"] == 1
    assert 0 < measured["val/truncated_fraction"] <= 1


def test_the_kl_of_a_response_is_the_sum_over_its_tokens(encoding: str) -> None:
    """In batches of any size, with prompts and responses of different lengths."""
    module = dpo(encoding, max_new_tokens=6)
    trainer().fit(module, serve([pairs_batch(module.tokenizer, FRUIT)] * 5))
    whole = prompts(module.tokenizer)
    parts = [prompts(module.tokenizer, QUESTIONS[:3]), prompts(module.tokenizer, QUESTIONS[3:])]
    ways = [trainer().validate(module, serve(batches), verbose=False)[0] for batches in ([whole], parts)]
    assert ways[0] == pytest.approx(ways[1], abs=1e-5)
    uniforms = addressed_uniforms(module.seed, VALIDATION_STREAM, torch.arange(len(whole.ids)))
    generated = module.generate(whole.ids, whole.attention_mask, Sampling(6, temperature=1.0), uniforms)
    total = 0.0
    for row, mask, ids, sampled in zip(whole.ids, whole.attention_mask, generated.ids, generated.mask, strict=True):
        before, said = row[mask], ids[sampled]
        thread = torch.cat([before, said])[None]
        for sign, model in ((1, module.model), (-1, module.reference)):
            with torch.no_grad():
                logprobs = model.logits(model(thread, torch.ones_like(thread, dtype=torch.bool))).log_softmax(-1)
            total += sign * float(logprobs[0, len(before) - 1 : -1].gather(1, said[:, None]).sum())
    assert ways[0]["val/kl"] == pytest.approx(total / len(whole.ids), abs=1e-4)
    assert abs(total) > 0.1
    assert ways[0]["val/response_length"] == pytest.approx(float(generated.mask.sum(1).float().mean()))


def test_the_reference_model_shares_frozen_weights(encoding: str) -> None:
    module = dpo(encoding, **LORA)
    assert share_frozen(module.reference.backbone, module.model.backbone)
    assert not any(weight.requires_grad for weight in module.reference.parameters())
    assert not share_frozen(dpo(encoding).reference, module.model)


def test_the_reference_model_runs_once_per_response(encoding: str) -> None:
    """With keep_ref_logprobs, in any batch and with any padding; the policy is the same up to rounding."""
    policies, passes = [], []
    for keep in (False, True):
        module = dpo(encoding, keep_ref_logprobs=keep, **LORA)
        whole, first, last = (pairs_batch(module.tokenizer, rows) for rows in (FRUIT, FRUIT[:1], FRUIT[1:]))
        calls: list[int] = []
        module.reference.register_forward_hook(lambda _, args, __, calls=calls: calls.append(len(args[0])))
        trainer().fit(module, serve([whole, first, last, whole]))
        policies.append([weight.detach() for weight in module.model.parameters()])
        passes.append(calls)
    assert passes == [[9, 2, 7, 9], [9]]
    for one, other in zip(*policies, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_kept_log_probs_depend_on_the_prompt_and_its_response(encoding: str) -> None:
    """The same tokens with another response mask are another response."""
    module = dpo(encoding, keep_ref_logprobs=True)
    batch = pairs_batch(module.tokenizer, FRUIT)
    module.ref_logprobs(batch)
    shorter = batch._replace(response_mask=batch.response_mask.clone())
    shorter.response_mask[:, :-2] = False
    assert not torch.equal(shorter.response_mask, batch.response_mask)
    expected = module.response_logprobs(module.reference, shorter).detach()
    torch.testing.assert_close(module.ref_logprobs(shorter), expected)


# ---- labels and imitation --------------------------------------------------------------------------------------------


def judged_batch(tokenizer: ChatTokenizer) -> JudgedBatch:
    """A pair, a response of rank 0 alone, and two labelled responses."""
    pairs = pairs_batch(tokenizer, [("a plum", "a stone"), ("one plum",), ("good",), ("bad",)])
    rank = torch.tensor([0, 1, 0, -1, -1])
    return JudgedBatch(*pairs._replace(rank=rank), torch.tensor([torch.nan, torch.nan, torch.nan, 1.0, 0.25]))


def test_labels_and_imitation_are_terms_of_the_mean(encoding: str) -> None:
    """With the reference model as the policy, a pair and a label cost log 2 each."""
    module = dpo(encoding, label_coef=0.5, sft_coef=2.0)
    batch = judged_batch(module.tokenizer)
    with torch.no_grad():
        found = module.preferences(batch)
        logprobs = module.response_logprobs(module.model, batch)[[0, 2]] / batch.response_mask.sum(1)[[0, 2]]
    torch.testing.assert_close(found.loss, torch.full((1,), math.log(2)))
    torch.testing.assert_close(found.label_loss, torch.full((2,), math.log(2)))
    torch.testing.assert_close(found.sft_loss, -logprobs)
    for options, expected in (
        ({"label_coef": 0.5, "sft_coef": 2.0}, (2 * math.log(2) - 2 * float(logprobs.sum())) / 5),
        ({"label_coef": 0.5}, 2 * math.log(2) / 3),
        ({}, math.log(2)),
    ):
        log = Log()
        trainer(callbacks=[log]).fit(dpo(encoding, **options), serve([batch]))  # type: ignore[arg-type]
        assert log.rows[0]["train/loss"] == pytest.approx(expected, abs=1e-5)


def test_a_validation_without_pairs_is_measured_by_the_loss(encoding: str) -> None:
    module = dpo(encoding, label_coef=0.5)
    assert module.monitor == ("val/loss", "min")
    whole = judged_batch(module.tokenizer)
    labels = JudgedBatch(*(part[3:] for part in whole))  # the two labelled responses
    measured = trainer().validate(module, serve([labels]), verbose=False)[0]
    assert measured["val/loss"] == pytest.approx(0.5 * math.log(2), abs=1e-5)
    assert "val/pair_accuracy" not in measured
    assert dpo(encoding).monitor == ("val/pair_accuracy", "max")


def test_the_label_loss_by_hand(encoding: str) -> None:
    """An implicit reward r costs log(1 + exp(-r)) with label 1, and that plus 3/4 r with label 1/4."""
    module = dpo(encoding, label_coef=1.0)
    batch = judged_batch(module.tokenizer)
    trainer().fit(module, serve([batch] * 5))
    with torch.no_grad():
        found = module.preferences(batch).label_loss
        both = [module.response_logprobs(model, batch)[3:] for model in (module.model, module.reference)]
    good, bad = (0.1 * (both[0] - both[1])).tolist()
    assert good > 0.01
    expected = [math.log1p(math.exp(-good)), math.log1p(math.exp(-bad)) + 0.75 * bad]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_it_learns_from_labels_and_imitates_without_a_pair(encoding: str) -> None:
    module = dpo(encoding, label_coef=1.0, sft_coef=1.0, learning_rate=3e-3)
    batch = judged_batch(module.tokenizer)
    first = module.response_logprobs(module.model, batch).detach()
    trainer().fit(module, serve([batch] * 25))
    change = module.response_logprobs(module.model, batch).detach() - first
    assert change[2] > 1  # the response of rank 0 alone
    assert change[3] > 0.5 + change[4]  # the label 1 against the label 1/4


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LORA, {"train_layers": 1}], ids=["all", "lora", "layers"])
def test_a_checkpoint_has_no_reference_model_and_is_checked_for_it(
    encoding: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    module = dpo(encoding, **options)
    fitted = trainer()
    batch = pairs_batch(module.tokenizer, FRUIT)
    fitted.fit(module, serve([batch] * 3))
    fitted.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert not any(name.startswith("reference.") for name in saved)
    again = dpo(encoding, **options)
    trainer().validate(again, serve([batch]), ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=True)
    for (name, one), other in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    torch.manual_seed(1)
    other = DPOModule(LLAMA, encoding, max_length=32, **options)
    with pytest.raises(UserError, match="differ from those that the checkpoint was trained with; pass the same base"):
        trainer().validate(other, serve([batch]), ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=True)


@pytest.mark.slow
def test_the_command_trains_a_chat_model(workplace: Path) -> None:
    """From SFT's model file to a chat model, with metrics of both splits, samples, a plot and predictions."""
    write_talk(workplace / "talk.jsonl", 60)
    data = [
        "--data.path=talk.jsonl",
        "--data.val_fraction=0.2",
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
        *QUIET,
    ]
    new = ["--model.base_model", json.dumps(LLAMA), "--model.tiktoken_encoding=rlchat_1k", "--model.max_length=64"]
    rlchat("fit", "--model=rlchat.SFTModule", *new, *data, "--trainer.limit_train_batches=2")
    more = ["--trainer.val_check_interval=1.0", "--model.max_new_tokens=8", "--model.learning_rate=3e-3"]
    rlchat("fit", "--config=dpo", *data, *more)
    logged: dict[str, list[float]] = {}
    for _, name, value in metrics(workplace):
        logged.setdefault(name, []).append(value)
    assert logged["val/pair_accuracy"][-1] > 0.9
    assert {"val/loss", "val/reward_margin", "val/accuracy", "val/perplexity", "train/grad_norm"} <= logged.keys()
    assert logged["val/kl"][-1] > 0
    (run,) = Path("lightning_logs/dpo").iterdir()
    assert "It is" in (run / "samples.jsonl").read_text() or (run / "samples.jsonl").stat().st_size > 0
    assert Path("checkpoints/rl_chat_model_tiktoken_stats.png").is_file()
    bundle = load_policy("checkpoints/rl_chat_model_tiktoken.pt")
    assert bundle.about["stage"] == "DPOModule"
    Path("questions.txt").write_text("How about 3?\nAnd 4?\n")
    rlchat("predict", "--config=dpo", "--data.predict_path=questions.txt", "--ckpt_path=best", *more[1:2])
    assert len(Path("replies.jsonl").read_text().splitlines()) == 2
    rlchat("test", "--config=dpo", *data[:3], "--ckpt_path=best", "--trainer.enable_progress_bar=false")


# ---- data and options ------------------------------------------------------------------------------------------------


def test_batches_have_the_ranked_responses_with_their_tokens_marked(
    tmp_path: Path, byte_tokenizer: ChatTokenizer
) -> None:
    """A prompt of two turns, whose own response is not marked; labels alone are no rank; a tie forms no pair."""
    user, bot, end = 258, 259, 260
    talk = [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "y"), ("user", "z"))]
    rows = [
        {
            "prompt": talk,
            "chosen": [{"role": "assistant", "content": "ab"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        {"text": "abc", "quality": 0.5},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = OASST2DataModule(str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path), val_fraction=0.0, test_fraction=0.0)
    data.needs = DataNeeds("dpo", byte_tokenizer, max_length=32)
    data.setup()
    (batch,) = data.train_dataloader()
    assert isinstance(batch, PreferenceBatch)
    before = [user, *b"x", end, bot, *b"y", end, user, *b"z", end, bot]
    found = {
        int(rank): (ids[mask].tolist(), ids[marked].tolist()) for ids, mask, marked, _, rank in zip(*batch, strict=True)
    }
    assert found == {0: ([*before, *b"ab", end], [*b"ab", end]), 1: ([*before, *b"c", end], [*b"c", end])}
    assert batch.group.tolist() == [0, 0]


def test_validation_responds_to_the_prompts_that_have_ranks(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    """They leave room for a response, and ``max_val_prompts`` limits them."""
    pairs = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    rows = [*pairs, *({"prompt": f"talk {i}", "response": "hm"} for i in range(20))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for limit in (None, 4):
        data = OASST2DataModule(
            str(tmp_path / "d.jsonl"),
            cache_dir=str(tmp_path),
            val_fraction=0.5,
            test_fraction=0.0,
            max_val_prompts=limit,
        )
        data.needs = DataNeeds("dpo", byte_tokenizer, max_length=24, max_new_tokens=12)
        data.setup()
        ranked, _, loader = data.val_dataloader()
        batches = list(loader)
        texts = [c.messages[0].text for batch in batches for c in batch.conversations]
        pairs_in_split = sum(int(batch.group.max()) + 1 for batch in ranked)
        assert pairs_in_split > 4
        assert len(texts) == (limit or pairs_in_split)
        assert all(text.startswith("question") for text in texts)
        assert max(batch.ids.shape[1] for batch in batches) == 12  # of 14 and more


def test_data_without_ranks_is_refused(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "x", "response": "y", "quality": 0.5}\n')
    data = OASST2DataModule(str(tmp_path / "d.jsonl"), cache_dir=str(tmp_path))
    data.needs = DataNeeds("dpo", byte_tokenizer, max_length=32)
    data.setup()
    with pytest.raises(UserError, match="no responses with different ranks to train on; pass other data"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 0.0}, "invalid value 0.0 for beta: expected a positive number"),
        ({"loss_type": "hinge"}, "invalid value 'hinge' for loss_type: expected one of sigmoid, ipo, sigmoid_norm"),
        ({"label_smoothing": 0.5}, r"invalid value 0.5 for label_smoothing: expected a number in \[0, 0.5\)"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "loss_type ipo has no label_smoothing"),
        ({"temperature": -1.0}, "invalid value -1.0 for temperature: expected 0 or"),
        ({"max_new_tokens": 32}, "invalid value 32 for max_new_tokens: it leaves no room"),
    ],
    ids=str,
)
def test_invalid_options_are_errors(encoding: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dpo(encoding, **options)
