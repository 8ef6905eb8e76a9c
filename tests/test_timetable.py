"""The timetable stops training exactly where metrics, evaluations and checkpoints are due."""

import pytest

from bn_keras.training.timetable import Timetable


def stops(timetable, step=0):
    """All stops of a run that starts after a step."""
    profile_from = timetable.profile_from(step)
    found = []
    while step < timetable.steps:
        step = timetable.next_stop(step, profile_from)
        found.append(step)
    return found


def test_a_run_stops_at_the_multiples_of_every_period_and_at_its_end():
    timetable = Timetable(65, steps_per_loop=20, evaluation_steps=30, checkpoint_steps=25)
    assert stops(timetable) == [20, 25, 30, 40, 50, 60, 65]
    assert stops(timetable, 33) == [40, 50, 60, 65]
    assert all(timetable.is_loop_end(step) for step in stops(timetable))
    assert not timetable.is_loop_end(33)


def test_recordings_interrupt_the_training_without_ending_a_loop():
    timetable = Timetable(30, 10, 15, 30, record_steps=7)
    assert stops(timetable) == [7, 10, 14, 15, 20, 21, 28, 30]
    assert [step for step in range(1, 31) if timetable.is_recording(step)] == [7, 14, 21, 28]
    assert [step for step in range(1, 31) if timetable.is_loop_end(step)] == [10, 15, 20, 30]
    assert not any(Timetable(30, 10, 15, 30).is_recording(step) for step in range(31))


def test_the_last_evaluation_is_apart_from_the_periodic_ones():
    timetable = Timetable(60, 10, 20, 25)
    assert [step for step in range(1, 61) if timetable.is_evaluation(step)] == [20, 40]
    assert [step for step in range(1, 61) if timetable.is_checkpoint(step)] == [25, 50]


@pytest.mark.parametrize(
    "start, profile_steps, profile_from, first_stops",
    [
        (0, 0, None, [10, 20]),
        (0, 4, 6, [6, 10]),
        (13, 4, 16, [16, 20]),
        (18, 4, 18, [20, 25]),
        (0, 99, 0, [10, 20]),
    ],
)
def test_the_last_steps_before_the_first_stop_are_profiled(
    start, profile_steps, profile_from, first_stops
):
    timetable = Timetable(60, 10, 20, 25, profile_steps=profile_steps)
    assert timetable.profile_from(start) == profile_from
    assert stops(timetable, start)[:2] == first_stops
