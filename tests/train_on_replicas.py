"""Trains the same steps on 1, 2 and 4 CPU replicas; run by test_replicas."""

import sys

import numpy as np

from bn_keras.data import pipeline
from bn_keras.distribute import make_strategy
from bn_keras.models import bn_inception as inception
from bn_keras.training.build import build_trainer_for
from configs import digits_bn_x5_sigmoid

LOOPS, STEPS_PER_LOOP = 4, 2


def main():
    # Part of one module instead of ten, because the graphs take most of the time. The network is
    # smooth: rounding could switch a ReLU or a maximum.
    inception.FIGURE_5 = [inception.FIGURE_5[0]._replace(conv1x1=0, projection=0)]
    config = digits_bn_x5_sigmoid.get_config()
    config.data.crop, config.data.mirror, config.data.distortion = "shift", True, 1.0
    config.model.modules = ()
    config.model.width, config.model.dropout = 0.03, 0.3
    config.batch_norm.synchronized, config.batch_norm.momentum = True, 0.9
    config.train.global_batch_size = 8
    # The CPU is split into logical devices before its first operation: the largest number first.
    strategies = {replicas: make_strategy("mirrored", replicas) for replicas in (4, 2, 1)}
    data = pipeline.open_data(config.data, seed=config.seed)
    results = {}
    for replicas, strategy in strategies.items():
        trainer = build_trainer_for(config, strategy, data)
        batches = iter(data.train_batches(strategy, config.train.global_batch_size))
        losses = [trainer.train(batches, STEPS_PER_LOOP)[0] for _ in range(LOOPS)]
        results[f"{replicas} losses"] = losses
        for i, variable in enumerate(trainer.variables):
            copies = strategy.experimental_local_results(variable.value)
            results[f"{replicas} {i:03} {variable.name}"] = np.stack([c.numpy() for c in copies])
    np.savez(sys.argv[1], **results)


if __name__ == "__main__":
    main()
