"""The life of a sweep, short; -m slow kills it thirty times."""

import pytest

from tests.faults import sweeps


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_sweeps_life(kills):
    pytest.importorskip("submitit", reason="submitit is not installed")
    (outcome,) = sweeps.campaign(kills, seed=0)
    assert outcome.lost == 0, outcome.note
