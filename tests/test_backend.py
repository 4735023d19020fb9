"""The choice of backend, and that it is never silent."""

import logging

import pytest
import torch
from torch import nn

from ema_triton import ModelEMA


def test_auto_takes_foreach_on_a_cpu_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="ema_triton"):
        ema = ModelEMA(nn.Linear(2, 2))
        ema.update(0.5)
        ema.update(0.5)
    assert ema.backend == "foreach"
    assert ema.backend_reason == "the tensors are on cpu, which Triton does not drive"
    (record,) = caplog.records
    assert record.name == "ema_triton"
    assert record.getMessage() == f"EMA backend: foreach ({ema.backend_reason})"


def test_triton_runs_where_asked_for(kernel_device: torch.device) -> None:
    pytest.importorskip("triton")
    model = nn.Linear(2, 2).to(kernel_device)
    ema = ModelEMA(model, backend="triton")
    assert (ema.backend, ema.backend_reason) == ("triton", "backend='triton' was asked for")
    model.weight.data += 1
    before = ema.ema_model.weight.clone()
    ema.update(0.25)
    torch.testing.assert_close(ema.ema_model.weight, before + 0.25)


@pytest.mark.usefixtures("no_cpu")
def test_triton_where_it_cannot_run_is_an_error() -> None:
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: .* on cpu.*backend='auto'"):
        ModelEMA(nn.Linear(2, 2), backend="triton")


def test_auto_falls_back_where_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_backend = pytest.importorskip("ema_triton.ops.triton_backend")

    def fail(plan: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(triton_backend, "prepare", fail)
    monkeypatch.setattr(triton_backend, "unsupported_reason", lambda bucket: None)
    monkeypatch.setattr(triton_backend, "unsupported_device", lambda device: None)
    ema = ModelEMA(nn.Linear(2, 2))
    assert ema.backend == "foreach"
    assert "Triton cannot compile for this device (OSError: no C compiler)" in ema.backend_reason
    with pytest.raises(RuntimeError, match="no C compiler"):
        ModelEMA(nn.Linear(2, 2), backend="triton")


def test_foreach_when_asked_for(kernel_device: torch.device) -> None:
    ema = ModelEMA(nn.Linear(2, 2).to(kernel_device), backend="foreach")
    assert (ema.backend, ema.backend_reason) == ("foreach", "backend='foreach' was asked for")


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"one of 'auto', 'triton', 'foreach', but got 'cuda'"):
        ModelEMA(nn.Linear(2, 2), backend="cuda")


def test_a_model_without_tensors_to_average() -> None:
    ema = ModelEMA(nn.Identity())
    ema.update(0.5)
    ema.sync()
    assert ema.backend == "foreach"
