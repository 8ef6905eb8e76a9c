"""A config whose run takes a second, and an interruption, for tests around the training."""

import contextlib
import itertools

import pytest

from bn_keras.training.step import Trainer
from configs import mnist_bn


def small_mlp(**overrides):
    """Returns the config of a short training of the section 4.1 network on digits."""
    config = mnist_bn.get_config().copy_and_resolve_references()
    config.data.name = "digits"
    config.data.validation_split = "validation"
    config.train.steps = 60
    config.train.steps_per_loop = 10
    config.evaluation.every_steps = 20
    config.evaluation.global_batch_size = 100
    config.evaluation.per_class = False
    config.checkpoint.every_steps = 25
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.5
    config.record.layer = ""
    config.update_from_flattened_dict(overrides)
    return config


@contextlib.contextmanager
def killed_after_a_loop(monkeypatch):
    """Ends the training in the block without a save, when its second loop of steps begins."""
    loops, train = itertools.count(), Trainer.train

    def train_once(self, batches, num_steps):
        if next(loops):
            raise KeyboardInterrupt
        return train(self, batches, num_steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train", train_once)
        yield
