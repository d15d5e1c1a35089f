"""The life of a sweep, killed thirty times."""

import pytest

from tests.faults import sweeps


@pytest.mark.slow
def test_a_sweeps_life():
    pytest.importorskip("submitit", reason="submitit is not installed")
    (outcome,) = sweeps.campaign(30, seed=0)
    assert outcome.lost == 0, outcome.note
