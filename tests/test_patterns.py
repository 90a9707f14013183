"""Regular expressions of a config: what they match, and that none of them is a hang."""

import pytest

from qcompile import FormatError
from qcompile.formats import _patterns

NAME = "model.layers.10.mlp.experts.127.gate_proj"


@pytest.mark.parametrize(
    ("pattern", "at_the_beginning", "anywhere"),
    [
        (r"model\.layers", True, True),
        (r"experts\.\d+", False, True),
        (r".*\.(gate|up)_proj$", True, True),
        ("y{2}", 0, 0),
    ],
)
def test_matches_as_its_writer_meant(pattern, at_the_beginning, anywhere):
    assert _patterns.matches(pattern, NAME, "ignore") == at_the_beginning
    assert _patterns.matches(pattern, NAME, "ignore", anywhere=True) == anywhere


@pytest.mark.parametrize("pattern", [r"(.|\w)+x$", r"(.*?.*?)*\d$"])
def test_one_that_would_take_for_ever_is_refused(pattern, monkeypatch):
    monkeypatch.setattr(_patterns, "LIMIT", 0.05)
    with pytest.raises(FormatError, match=r"of ignore takes more than 0.05 s for 'model\.layers\.10.*repetitions"):
        _patterns.matches(pattern, NAME, "ignore")


def test_what_is_none_is_named():
    with pytest.raises(FormatError, match=r"config.json: '\(' of dynamic is not a regular expression"):
        _patterns.matches("(", NAME, "dynamic")
