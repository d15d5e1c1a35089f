"""A few tries of each fault that is done to real processes; `make faults` has many."""

import pytest

from tests.faults import checkpoints, disk, kills, processes


def assert_nothing_is_lost(outcomes):
    for outcome in outcomes:
        assert outcome.lost == 0, f"{outcome.fault}: {outcome.note}"


def test_damaged_checkpoints_are_noticed_or_harmless(quick_compiler):
    assert_nothing_is_lost(checkpoints.campaign(tries=4, seed=1))


@pytest.mark.slow
def test_interrupted_runs_end_as_undisturbed_ones():
    assert_nothing_is_lost(kills.campaign(tries=4, seed=1))


@pytest.mark.slow
def test_two_processes_and_jumping_clocks():
    assert_nothing_is_lost(processes.campaign(tries=1, seed=1))


@pytest.mark.slow
def test_full_and_read_only_disks():
    outcomes = disk.campaign(tries=2, seed=1)
    if not outcomes[0].tries:
        pytest.skip(outcomes[0].note)
    assert_nothing_is_lost(outcomes)
