"""The learning rate is a function of the examples seen, whatever the batch size."""

import keras
import numpy as np
import pytest

from bn_keras.errors import UsageError
from bn_keras.training.build import build_schedule
from bn_keras.training.schedule import ExamplesSchedule
from configs import bn_x5, bn_x30, inception

IMAGENET = 1_281_167


def test_rate_falls_by_its_factor_after_every_decay():
    schedule = ExamplesSchedule(0.5, 32, decay_factor=0.9, decay_examples=320)
    rates = [float(schedule(step)) for step in (0, 9, 10, 19, 20, 100)]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.45, 0.45, 0.405, 0.5 * 0.9**10], rtol=1e-6)


def test_the_batch_size_scales_the_rate_but_not_the_decay():
    small = ExamplesSchedule(0.5, 32, decay_factor=0.9, decay_examples=3200)
    large = ExamplesSchedule(0.5, 320, decay_factor=0.9, decay_examples=3200)
    for step in (0, 5, 9, 10, 25):
        np.testing.assert_allclose(large(step), 10 * small(10 * step), rtol=1e-6)


def test_warm_up_is_linear_and_ends():
    schedule = ExamplesSchedule(1.0, 32, warmup_examples=320)
    rates = [float(schedule(step)) for step in range(12)]
    np.testing.assert_allclose(rates, [*np.arange(1, 11) / 10, 1, 1], rtol=1e-6)


def test_decays_are_counted_exactly_beyond_the_range_of_float32():
    schedule = ExamplesSchedule(1.0, 32, decay_factor=0.5, decay_examples=2**30)
    boundary = 2**30 // 32
    assert float(schedule(boundary - 1)) == 1.0
    assert float(schedule(boundary)) == 0.5


@pytest.mark.parametrize(
    "config, start, steps, share",
    # GoogLeNet's decay leaves about 2% and 1% of the initial rate at the end.
    [
        (inception, 0.0015, 31_000_000, 0.02),
        (bn_x5, 0.0075, 6_000_000, 0.01),
        (bn_x30, 0.045, 6_000_000, 0.01),
    ],
)
def test_the_papers_schedules(config, start, steps, share):
    schedule = build_schedule(config.get_config(), IMAGENET)
    assert float(schedule(0)) == pytest.approx(start)
    assert float(schedule(steps)) / start == pytest.approx(share, abs=0.004)


def test_accelerated_networks_decay_six_times_faster():
    slow, fast = (build_schedule(c.get_config(), IMAGENET) for c in (inception, bn_x5))
    assert slow.decay_examples == pytest.approx(6 * fast.decay_examples, rel=1e-6)


def test_a_decay_without_its_examples_is_refused():
    with pytest.raises(UsageError, match="decay_factor=0.9 requires decay_examples"):
        ExamplesSchedule(0.5, 32, decay_factor=0.9)


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_end_of_the_training():
    schedule = ExamplesSchedule(
        2.0, 32, decay="cosine", warmup_examples=32 * 100, cosine_examples=32 * 1100
    )
    done = np.linspace(0, 1, 1001)
    wanted = 1 + np.cos(np.pi * done)
    rates = [float(schedule(100 + i)) for i in range(1001)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-12)
    # The warm-up is the same with any decay; after the end the rate is 0.
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (0, 49, 99, 1100, 5000)], [0.02, 1, 2, 0, 0], rtol=1e-6
    )


@pytest.mark.parametrize("global_batch_size", [32, 4096, 65_536])
def test_cosine_is_exact_at_any_length(global_batch_size):
    steps = 31_000_000
    schedule = ExamplesSchedule(
        1.0,
        global_batch_size,
        reference_batch_size=global_batch_size,
        decay="cosine",
        cosine_examples=steps * global_batch_size,
    )
    for step in (1, steps // 3, steps // 2, steps - 1000, steps - 1):
        wanted = np.sin(np.pi / 2 * (steps - step) / steps) ** 2
        assert float(schedule(step)) == pytest.approx(wanted, rel=1e-6)
    assert float(schedule(steps)) == 0


def test_cosine_keeps_its_shape_at_another_batch_size():
    small, large = (
        ExamplesSchedule(0.5, n, decay="cosine", warmup_examples=3200, cosine_examples=32_000)
        for n in (32, 320)
    )
    for step in (10, 50, 99):
        np.testing.assert_allclose(large(step), 10 * small(10 * step), rtol=1e-5)


def test_a_cosine_ignores_the_settings_of_step_decay():
    plain = ExamplesSchedule(0.5, 32, decay="cosine", cosine_examples=3200)
    given = ExamplesSchedule(
        0.5, 32, decay="cosine", cosine_examples=3200, decay_factor=0.1, decay_examples=32
    )
    assert float(given(70)) == float(plain(70))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(decay="linear"), "unknown schedule.decay 'linear': expected steps or cosine"),
        (dict(decay="cosine"), "decay='cosine' requires cosine_examples"),
        (
            dict(decay="cosine", cosine_examples=320, warmup_examples=320),
            "the warm-up of 320 examples leaves none of the 320 of schedule",
        ),
    ],
)
def test_an_invalid_cosine_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        ExamplesSchedule(0.5, 32, **arguments)


@pytest.mark.parametrize(
    "schedule, steps, said",
    [
        (
            ExamplesSchedule(0.045, 32, decay_factor=0.96, decay_examples=1_708_223),
            6_000_000,
            [
                "learning rate 0.045, multiplied by 0.96 every 53,382 steps, 0.00047 at the end",
                "6,000,000 steps of 32 images = 149.9 epochs of 1,281,167 training images",
            ],
        ),
        (
            ExamplesSchedule(
                0.045, 1024, decay="cosine", warmup_examples=1_000_001, cosine_examples=102_400_000
            ),
            100_000,
            [
                "learning rate from 0.0015 up to 1.44 over 977 steps, cosine decay,"
                " 3.6e-10 at the end",
                "100,000 steps of 1,024 images = 79.9 epochs of 1,281,167 training images, as many"
                " images as 3,200,000 of the paper's steps",
            ],
        ),
        (
            ExamplesSchedule(0.1, 60, reference_batch_size=60),
            50_000,
            [
                "learning rate 0.1, 0.1 at the end",
                "50,000 steps of 60 images = 2.3 epochs of 1,281,167 training images, as many"
                " images as 93,750 of the paper's steps",
            ],
        ),
    ],
)
def test_the_description_gives_rate_and_length(schedule, steps, said):
    assert schedule.describe(steps, IMAGENET).splitlines() == said


@pytest.mark.parametrize(("examples", "period"), [(12, "0.38"), (48, "1.5"), (3200, "100")])
def test_the_description_does_not_round_short_periods(examples, period):
    schedule = ExamplesSchedule(0.1, 32, decay_factor=0.96, decay_examples=examples)
    assert f"multiplied by 0.96 every {period} steps" in schedule.describe(10, 100)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(decay_factor=0.9, decay_examples=320, warmup_examples=99),
        dict(decay="cosine", cosine_examples=2000, warmup_examples=99),
    ],
)
def test_serialization_keeps_the_schedule(arguments):
    schedule = ExamplesSchedule(0.5, 64, **arguments)
    config = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(config)
    assert float(again(7)) == float(schedule(7))
