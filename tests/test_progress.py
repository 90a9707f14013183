"""A progress bar counts what there is to do, and says how long the rest will take."""

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_model

import qcompile
from qcompile import calibrate
from qcompile.progress import progress_bar

DATA = torch.arange(3, 131).reshape(8, 16)


def test_a_bar_shows_steps_and_the_remaining_time(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr("time.monotonic", iter(range(1000)).__next__)
    with progress_bar("quantizing", 100, show=True) as advance:
        for step in range(4):
            advance(f"layer {step}")
    shown = capsys.readouterr().err
    assert "quantizing" in shown
    assert "4/100" in shown
    assert "layer 3" in shown


@pytest.mark.parametrize("show", [None, False])
def test_none_is_shown_in_a_pipe_or_unasked(show, capsys):
    with progress_bar("quantizing", 3, show) as advance:
        advance("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("config", [{"scheme": "w4a16_g32", "method": "gptq"}, "w8a8_static"])
def test_all_steps_of_a_calibration_are_counted_also_of_one_that_goes_on(config, monkeypatch, tmp_path):
    counted = []

    @contextmanager
    def counting(title, total, show=None):
        steps = []
        yield steps.append
        counted.append((total, len(steps)))

    monkeypatch.setattr(calibrate, "progress_bar", counting)
    for _ in range(2):
        torch.manual_seed(0)
        qcompile.quantize(tiny_model(), config, data=DATA, sequence=16, resume=tmp_path)
    (total, steps), (later, no_more) = counted
    assert total == steps > later == no_more
