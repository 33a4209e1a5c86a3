"""The number of threads that a measurement recommends."""

from __future__ import annotations

import pytest
import torch

from rlchat.utils.threads import fastest_threads


@pytest.mark.parametrize(
    ("seconds", "gain", "best"),
    [
        ({1: [3, 2, 9, 4, 4], 4: [1, 1, 1, 1, 1]}, 1.5, 4),  # 2 / 1
        ({1: [3, 2, 9, 4, 4], 4: [9, 9, 1.4, 9, 9]}, 1.5, 1),  # 2 / 1.4 = 1.43
        ({1: [3, 2, 9, 4, 4], 4: [9, 9, 1.4, 9, 9]}, 1.4, 4),
        ({1: [1, 1, 1, 1, 1], 4: [8, 8, 8, 8, 8]}, 1.0, 1),
    ],
)
def test_more_threads_have_to_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]], gain: float, best: int
) -> None:
    now = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: now.__setitem__(0, threads))
    monkeypatch.setattr("rlchat.utils.threads._seconds", lambda *_: seconds[now[0]].pop(0))
    assert fastest_threads(gain=gain) == best
    assert now == [4]  # it only measures


def test_it_measures_layers_of_the_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()

    class Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.add((*x.shape, self.out_features))
            return super().forward(x)

    monkeypatch.setattr(torch.nn, "Linear", Linear)
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert fastest_threads(1, rows=3, width=32) in (1, 2)
    finally:
        torch.set_num_threads(usual)
    assert sizes == {(3, 32, 86), (3, 86, 32)}
