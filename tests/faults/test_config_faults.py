"""Impossible values of config fields, through the command line: a share of what `make faults` does."""

from tests.faults import config_values


def test_impossible_values_are_refused_in_one_message():
    (outcome,) = config_values.campaign(tries=6, seed=5)
    assert outcome.lost == 0, outcome.note
