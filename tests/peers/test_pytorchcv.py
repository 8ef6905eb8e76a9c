"""Converted weights compute the logits of the PyTorch ports (make test-peers installs them)."""

import keras
import numpy as np
import pytest

from bn_keras import convert
from bn_keras.errors import UsageError

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-peers")
port = pytest.importorskip(
    "pytorchcv.models.bninception", reason="pytorchcv is not installed: make test-peers"
)


@pytest.fixture(scope="module")
def network():
    """pytorchcv's network in inference mode, without tensors that are all 0 or all 1."""
    torch.manual_seed(0)
    network = port.bninception()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("bn.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.3)
    return network.eval()


def _images(side):
    return np.random.default_rng(side).normal(size=(2, side, side, 3)).astype(np.float32)


def _theirs(network, images):
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def _assert_same_logits(model, network, images):
    expected = _theirs(network, images)
    assert expected.std() > 0.3
    np.testing.assert_allclose(model(images), expected, rtol=0, atol=1e-4)


def _in_cadenes_names(state):
    """Renames tensors; both ports define their layers in the order of Caffe's prototxt."""
    names = ["conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"]
    for module in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        kinds = ["3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2"]
        if module not in ("3c", "4e"):
            kinds = ["1x1", *kinds, "pool_proj"]
        names += [f"inception_{module}_{kind}" for kind in kinds]
    renamed = {}
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    theirs = [*(n + end for n in names for end in ("", "_bn")), "last_linear"]
    new = dict(zip(owners, theirs, strict=True))
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        renamed[f"{new[owner]}.{kind}"] = tensor
    return renamed


@pytest.mark.parametrize("side", [224, 230])
def test_logits_of_a_pth_agree(side, network, tmp_path):
    """With 230 pixels, their pools round up and their last 7x7 average still has one position."""
    torch.save(network.state_dict(), tmp_path / "bninception.pth")
    model = convert.from_pytorch(tmp_path / "bninception.pth", input_shape=(side, side, 3))
    assert sum(np.prod(v.shape) for v in model.trainable_variables) == 11_295_240
    _assert_same_logits(model, network, _images(side))


def test_logits_of_an_npz_with_cadenes_names_agree(network, tmp_path):
    state = {k: v.numpy() for k, v in _in_cadenes_names(network.state_dict()).items()}
    np.savez(tmp_path / "bninception.npz", **state)
    model = convert.from_pytorch(tmp_path / "bninception.npz")
    _assert_same_logits(model, network, _images(224))


@pytest.mark.parametrize("side", [96, 160])
def test_logits_agree_at_other_sizes_with_an_adaptive_average(side, network, monkeypatch):
    model = convert.from_pytorch(network.state_dict(), input_shape=(None, None, 3))
    adaptive = torch.nn.AdaptiveAvgPool2d(1)
    monkeypatch.setitem(network.features._modules, "final_pool", adaptive)
    _assert_same_logits(model, network, _images(side))


def test_training_checkpoints_and_old_files_are_read(network, tmp_path):
    """DataParallel's names, a state dict inside a checkpoint, half precision, BN as [1, C]."""
    state = {
        f"module.{name}": (tensor[None] if "bn." in name else tensor).bfloat16()
        for name, tensor in _in_cadenes_names(network.state_dict()).items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 3, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    model = convert.from_pytorch(path, input_shape=(64, 64, 3))
    expected = convert.from_pytorch(network.state_dict(), input_shape=(64, 64, 3))
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2**-8)


def test_other_classes_survive_a_round_trip_through_keras(tmp_path):
    theirs = port.bninception(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "seven.pth")
    convert.convert_weights(tmp_path / "seven.pth", tmp_path / "seven.keras")
    model = keras.models.load_model(tmp_path / "seven.keras")
    _assert_same_logits(model, theirs, _images(224))


@pytest.mark.parametrize(
    "content, part",
    [
        (lambda network: network, "more than tensors"),
        (lambda network: [1, 2], "contains a list: expected a state dict"),
        (lambda network: torch.nn.Conv2d(3, 4, 3).state_dict(), "missing"),
    ],
)
def test_other_files_are_rejected(content, part, network, tmp_path):
    torch.save(content(network), tmp_path / "wrong.pth")
    with pytest.raises(UsageError, match=part) as raised:
        convert.from_pytorch(tmp_path / "wrong.pth")
    assert len(str(raised.value).splitlines()) == 1


def test_a_truncated_file_is_rejected(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for fraction in (0, 0.5, 0.999):
        (tmp_path / "part.pth").write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(UsageError, match="part.pth") as raised:
            convert.from_pytorch(tmp_path / "part.pth")
        assert len(str(raised.value).splitlines()) == 1
