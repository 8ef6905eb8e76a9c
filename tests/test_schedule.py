"""The learning rate follows its definition in examples, whatever the batch size."""

import keras
import numpy as np
import pytest

from bn_keras.errors import UsageError
from bn_keras.schedule import ExamplesSchedule
from bn_keras.train import make_schedule
from configs import bn_x5, bn_x30, inception

IMAGENET = 1_281_167


def test_rate_falls_by_its_factor_after_every_decay():
    schedule = ExamplesSchedule(0.5, 32, decay_factor=0.9, decay_examples=320)
    rates = [float(schedule(step)) for step in (0, 9, 10, 19, 20, 100)]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.45, 0.45, 0.405, 0.5 * 0.9**10], rtol=1e-6)


def test_batch_size_scales_the_rate_and_not_the_moments():
    small = ExamplesSchedule(0.5, 32, decay_factor=0.9, decay_examples=3200)
    large = ExamplesSchedule(0.5, 320, decay_factor=0.9, decay_examples=3200)
    for step in (0, 5, 9, 10, 25):
        np.testing.assert_allclose(large(step), 10 * small(10 * step), rtol=1e-6)


def test_warm_up_is_linear_and_ends():
    schedule = ExamplesSchedule(1.0, 32, warmup_examples=320)
    rates = [float(schedule(step)) for step in range(12)]
    np.testing.assert_allclose(rates, [*np.arange(1, 11) / 10, 1, 1], rtol=1e-6)


def test_decays_are_counted_exactly_beyond_what_float32_holds():
    schedule = ExamplesSchedule(1.0, 32, decay_factor=0.5, decay_examples=2**30)
    boundary = 2**30 // 32
    assert float(schedule(boundary - 1)) == 1.0
    assert float(schedule(boundary)) == 0.5


@pytest.mark.parametrize(
    "config, start, steps, share",
    # About 2% and 1% of the initial rate are left at the end, with GoogLeNet's decay.
    [
        (inception, 0.0015, 31_000_000, 0.02),
        (bn_x5, 0.0075, 6_000_000, 0.01),
        (bn_x30, 0.045, 6_000_000, 0.01),
    ],
)
def test_the_papers_schedules(config, start, steps, share):
    schedule = make_schedule(config.get_config(), IMAGENET)
    assert float(schedule(0)) == pytest.approx(start)
    assert float(schedule(steps)) / start == pytest.approx(share, abs=0.004)


def test_accelerated_networks_decay_six_times_faster():
    slow, fast = (make_schedule(c.get_config(), IMAGENET) for c in (inception, bn_x5))
    assert slow.decay_examples == pytest.approx(6 * fast.decay_examples, rel=1e-6)


def test_a_decay_without_its_examples_is_refused():
    with pytest.raises(UsageError, match="decay_examples has to be given"):
        ExamplesSchedule(0.5, 32, decay_factor=0.9)


def test_it_survives_serialization():
    schedule = ExamplesSchedule(0.5, 64, decay_factor=0.9, decay_examples=320, warmup_examples=99)
    config = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(config)
    assert float(again(7)) == float(schedule(7))
