"""Compares a training step of the CIFAR-10 miniature with PyTorch's (make test-peers installs it).

    .venv-peers/bin/python benchmarks/miniature_pytorch.py

The step is that of miniature.py. PyTorch's network is built from the graph of ours and has its
weights; the logits of both are compared before the timing. PyTorch uses channels last and its fused
SGD. PyTorch's local response normalization is slow on CPUs, so the network is also measured without
it. One and two threads are measured in a process each.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from _timing import compare, print_table
from miniature import (
    CONFIG,
    RATE_FACTOR,
    ROUNDS,
    STEPS,
    build,
    measure_with_threads,
    print_rows,
    random_batch,
    requested_threads,
    run_steps,
    set_threads,
)

from bn_keras import BatchNormalization
from bn_keras.keras_internals import graph_calls
from bn_keras.models.bn_inception import LocalResponseNormalization
from bn_keras.models.dropout import Dropout
from bn_keras.runs.settings import replaced

try:
    import torch
    from torch import nn
except ModuleNotFoundError:
    torch = None

TOLERANCE = 1e-4
CONFIGS = {
    "as configured": CONFIG,
    "without LRN": replaced(CONFIG, {"model.local_response_normalization": False}),
}


def convert(model):
    """Returns a functional Keras model as a PyTorch module with the same weights, channels last.

    Args:
      model: maps [N, H, W, C] to one output; the module maps [N, C, H, W] to it.

    Raises:
      TypeError: the model has a layer that cannot be converted.
    """
    graph, modules, nodes = torch.fx.Graph(), {}, {}
    for call in graph_calls(model):
        layer, inputs = call.operation, [nodes[id(t)] for t in call.input_tensors]
        if call.is_input:
            node = graph.placeholder(layer.name)
        elif isinstance(layer, keras.layers.Concatenate):
            node = graph.call_function(torch.cat, (inputs, 1))
        else:
            # Some names of ours start with a digit.
            name = f"layer_{layer.name}"
            modules[name] = _convert_layer(layer, call.input_tensors[0].shape)
            node = graph.call_module(name, tuple(inputs))
        nodes[id(call.outputs[0])] = node
    graph.output(nodes[id(model.outputs[0])])
    return torch.fx.GraphModule(modules, graph).to(memory_format=torch.channels_last)


def _convert_layer(layer, input_shape):
    if isinstance(layer, keras.layers.Conv2D):
        return _convolution(layer, input_shape)
    if isinstance(layer, BatchNormalization):
        return _batch_norm(layer)
    if isinstance(layer, keras.layers.MaxPooling2D | keras.layers.AveragePooling2D):
        return _pool(layer, input_shape)
    if isinstance(layer, keras.layers.GlobalAveragePooling2D):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if isinstance(layer, keras.layers.Dense):
        return _dense(layer)
    if isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.relu:
        return nn.ReLU(inplace=True)
    if isinstance(layer, LocalResponseNormalization):
        # PyTorch divides alpha by the number of channels in the window.
        return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
    if isinstance(layer, Dropout):
        return nn.Dropout(layer.rate)
    raise TypeError(f"the layer {layer.name!r} of {type(layer)} cannot be converted to PyTorch")


def _convolution(layer, input_shape):
    *window, inputs, outputs = layer.kernel.shape
    (top, bottom), (left, right) = _same_padding(layer, input_shape, window)
    # Some layers of stride 2 pad only the far side, which a convolution of PyTorch does not offer.
    symmetric = (top, left) == (bottom, right)
    convolution = nn.Conv2d(
        inputs, outputs, window, layer.strides, padding=(top, left) if symmetric else 0, bias=False
    )
    _copy(layer.kernel, convolution.weight, (3, 2, 0, 1))
    if symmetric:
        return convolution
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), convolution)


def _batch_norm(layer):
    # PyTorch's momentum is the fraction that is not kept.
    module = nn.BatchNorm2d(layer.gamma.shape[0], layer.epsilon, 1 - layer.momentum)
    _copy(layer.gamma, module.weight)
    _copy(layer.beta, module.bias)
    _copy(layer.moving_mean, module.running_mean)
    _copy(layer.moving_variance, module.running_var)
    return module


def _pool(layer, input_shape):
    (top, bottom), (left, right) = _same_padding(layer, input_shape, layer.pool_size)
    # ceil_mode adds the windows that exceed the far side.
    options = dict(padding=(top, left), ceil_mode=(top, left) != (bottom, right))
    if isinstance(layer, keras.layers.AveragePooling2D):
        # Averages of Keras exclude the padding.
        return nn.AvgPool2d(layer.pool_size, layer.strides, count_include_pad=False, **options)
    return nn.MaxPool2d(layer.pool_size, layer.strides, **options)


def _dense(layer):
    module = nn.Linear(*layer.kernel.shape)
    _copy(layer.kernel, module.weight, (1, 0))
    _copy(layer.bias, module.bias)
    return module


def _same_padding(layer, input_shape, window):
    """Returns the padding before and after the height and the width: TensorFlow's "same"."""
    padding = []
    for size, side, stride in zip(input_shape[1:3], window, layer.strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        padding.append((total // 2, total - total // 2))
    return padding


def _copy(variable, parameter, order=None):
    array = np.transpose(variable.numpy(), order)
    if array.shape != tuple(parameter.shape):
        raise ValueError(f"{variable.path} has shape {array.shape}, not {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(torch.tensor(array))


def their_batch():
    images, labels = (torch.tensor(a) for a in random_batch())
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return images, labels.long()


def check_outputs(model, module):
    """Raises ValueError if both networks do not return the same logits in inference mode."""
    images, _ = random_batch()
    ours = model(images, training=False).numpy()
    with torch.inference_mode():
        theirs = module.eval()(their_batch()[0]).numpy()
    difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
    if not difference < TOLERANCE:
        raise ValueError(
            f"the logits differ by {difference:.1e} of the largest: the networks differ"
        )


def run_their_steps(module):
    """Returns a call of STEPS training steps with the loss and optimizer of the config."""
    train = CONFIG.train
    kernels = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": train.l2}, {"params": others}],
        lr=RATE_FACTOR * CONFIG.schedule.base_rate,
        momentum=train.momentum,
        fused=True,
    )
    images, labels = their_batch()
    module.train()

    def run():
        total = 0.0
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / STEPS

    return run


def measure(config):
    trainer = build(config=config)
    ours = run_steps(trainer)
    # After some steps the moving statistics are no longer the initial ones.
    ours()
    theirs = convert(trainer.model)
    check_outputs(trainer.model, theirs)
    return compare({"bn_keras": ours, "PyTorch": run_their_steps(theirs)}, ROUNDS)


def main():
    threads = requested_threads()
    if threads:
        set_threads(threads)
        torch.set_num_threads(threads)
        print_rows({case: measure(config) for case, config in CONFIGS.items()})
        return
    print(f"TensorFlow {tf.__version__}, PyTorch {torch.__version__}")
    ratios = {"speedup over PyTorch": ("PyTorch", "bn_keras")}
    print_table("A training step of the CIFAR-10 miniature", measure_with_threads(__file__), ratios)


if __name__ == "__main__":
    if torch is None:
        print("skipped: PyTorch is not installed (make test-peers installs it)")
    else:
        main()
