"""What `--check` finds, by hand, and how it is asked for."""

import numpy as np
import pytest

from experiments import convert as command
from experiments import exits
from switchmoe.interop import check


def logits(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 6, 9)).astype(np.float32)


def batch(encoder):
    """Three rows of six tokens, of which the last has four."""
    real_BL = np.ones((3, 6), bool)
    real_BL[2, 4:] = False
    tokens_BL = np.ones((3, 6), int)
    return check.Batch(tokens_BL, real_BL, tokens_BL if encoder else None)


@pytest.mark.parametrize("encoder", [True, False])
def test_the_largest_difference_and_its_place_are_told(encoder):
    one_BLV = logits()
    one_BLV[0, 0, 0] = 8.0  # the scale
    other_BLV = one_BLV.copy()
    other_BLV[1, 3, 2] += 0.25
    other_BLV[2, 3, 7] -= 0.5
    found = check.compared(one_BLV, other_BLV, batch(encoder))
    assert found.place == (2, 3, 7) and found.largest == pytest.approx(0.5) and found.scale == 8.0
    assert str(found) == "logits differ by 0.5 at most, 0.06 of the largest (row 2, position 3, id 7)"


@pytest.mark.parametrize("encoder", [True, False])
def test_padding_of_a_decoder_alone_is_not_compared(encoder):
    """An encoder's padding has no logits: those of the decoder's tokens all count."""
    one_BLV = logits()
    other_BLV = one_BLV.copy()
    other_BLV[2, 5, 7] += 100.0
    found = check.compared(one_BLV, other_BLV, batch(encoder))
    assert found.place == (2, 5, 7) if encoder else found.largest == 0.0
    assert found.scale > 90 if encoder else found.scale < 10


def test_what_is_no_number_differs_by_all(capsys):
    other_BLV = logits()
    other_BLV[1, 2, 3] = np.nan
    found = check.compared(logits(), other_BLV, batch(True))
    assert found.largest == np.inf and found.place == (1, 2, 3)


def test_an_option_without_a_value_asks_for_it(tmp_path, monkeypatch, capsys):
    given = ["--source=a", "--target=b"]
    assert command.parse([*given, "--check"])["check"] == "True"
    monkeypatch.setattr(check, "available", lambda: False)
    assert command.main(["convert", f"--source={tmp_path}", "--target=b", "--check"]) == exits.EXIT_BAD_INPUT
    assert "--check=True: accepted with transformers" in capsys.readouterr().err
