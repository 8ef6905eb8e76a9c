"""Devices and their memory. No GPU is needed: the driver and TensorFlow's list are replaced."""

import ctypes
import pathlib
import types

import pytest
import tensorflow as tf

from bn_keras import cgroups, cores
from bn_keras.distribute import devices
from bn_keras.distribute.devices import describe_devices
from bn_keras.experiments import parallel

GIB = 2**30


class Driver:
    """The three functions of libcuda that are used, for GPUs of the given memories."""

    def __init__(self, memories, status=0):
        self.memories, self.status = memories, status

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        device._obj.value = ordinal + 100
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = self.memories[device.value - 100]
        return 0


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that pretends that the machine has GPUs."""

    def pretend(memories, driver=None, visible=slice(None)):
        gpus = [types.SimpleNamespace(name=f"GPU {i}") for i in range(len(memories))]
        for function, found in (
            ("list_physical_devices", gpus),
            ("get_visible_devices", gpus[visible]),
        ):
            monkeypatch.setattr(
                tf.config, function, lambda kind, found=found: found if kind == "GPU" else []
            )
        monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda gpu: {"device_name": "H100"}
        )

        def load(name):
            assert name == "libcuda.so.1"
            if isinstance(driver, OSError):
                raise driver
            return driver or Driver(memories)

        monkeypatch.setattr(ctypes, "CDLL", load)

    return pretend


@pytest.mark.parametrize(
    "strategy, replicas, expected",
    [
        ("mirrored", 0, "GPU:0 (H100, 80.0 GiB); GPU:1 (H100, 40.0 GiB)"),
        ("mirrored", 1, "GPU:0 (H100, 80.0 GiB)"),
        ("one_device", 0, "GPU:0 (H100, 80.0 GiB)"),
        ("tpu", 0, "all cores of this machine's TPU"),
    ],
)
def test_each_gpu_in_use_has_its_memory(strategy, replicas, expected, gpus):
    gpus([80 * GIB, 40 * GIB])
    assert describe_devices(strategy, replicas) == expected


def test_a_gpu_is_described_as_tensorflow_numbers_those_that_it_sees(gpus):
    gpus([80 * GIB, 40 * GIB, 20 * GIB], visible=slice(1, 3))
    assert describe_devices("one_device", 0) == "GPU:0 (H100, 40.0 GiB)"


@pytest.mark.parametrize("driver", [OSError(), Driver([GIB], status=3)])
def test_an_unknown_memory_is_no_error(driver, gpus):
    gpus([GIB], driver)
    assert describe_devices("mirrored", 0) == "GPU:0 (H100, memory unknown)"


def test_the_cpu_has_its_memory(monkeypatch):
    monkeypatch.setattr(devices, "num_usable_cores", lambda: 2)
    monkeypatch.setattr(devices, "_cpu_memory", lambda: 3 * GIB)
    assert describe_devices("mirrored", 2) == "2 CPU replicas: CPU (2 cores, 3.0 GiB)"
    assert describe_devices("one_device", 0) == "1 CPU replica: CPU (2 cores, 3.0 GiB)"


def test_a_worker_names_its_cluster_and_its_own_devices(monkeypatch):
    monkeypatch.setattr(devices, "_format", lambda device: device.name)
    monkeypatch.setenv(
        "TF_CONFIG",
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}',
    )
    expected = "worker 1 of 2 (TF_CONFIG: a:1, b:1), on 1 CPU replica: CPU"
    assert describe_devices("multi_worker", 0) == expected


@pytest.fixture
def group(tmp_path, monkeypatch):
    """The folder of this process's control group; its parents have limits, too."""
    return control_group("0::/slurm/job", tmp_path, monkeypatch)


def control_group(line, folder, monkeypatch):
    """Moves this process to a control group whose files are below a folder."""
    monkeypatch.setattr(cgroups, "_ROOT", folder)
    read = pathlib.Path.read_text

    def read_text(path):
        return f"7:pids:/\n{line}\n" if str(path) == "/proc/self/cgroup" else read(path)

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    _, controllers, path = line.split(":")
    group = folder / controllers.partition(",")[0] / path.strip("/")
    group.mkdir(parents=True)
    return group


@pytest.mark.parametrize(
    "own, outer, expected",
    [
        ("max 100000", "max 100000", 64),
        ("250000 100000", "max 100000", 3),
        ("max 100000", "200000 100000", 2),
        ("50000 100000", "400000 100000", 1),
        ("", None, 64),
    ],
)
def test_the_cpu_quota_of_a_container_lowers_the_number_of_cores(
    own, outer, expected, group, monkeypatch
):
    monkeypatch.setattr(cores, "usable_cores", lambda: list(range(64)))
    monkeypatch.setattr(parallel, "usable_cores", lambda: list(range(64)))
    (group / "cpu.max").write_text(f"{own}\n")
    if outer is not None:
        (group.parent / "cpu.max").write_text(f"{outer}\n")
    assert cores.num_usable_cores() == expected
    assert len(parallel.divide_machine([("one_device", 0)] * 99)) == expected


@pytest.mark.parametrize(("own", "outer", "expected"), [(-1, -1, 64), (250_000, -1, 3)])
def test_quotas_of_control_groups_of_version_1(own, outer, expected, tmp_path, monkeypatch):
    group = control_group("1:cpu,cpuacct:/docker/a", tmp_path, monkeypatch)
    monkeypatch.setattr(cores, "usable_cores", lambda: list(range(64)))
    for folder, quota in ((group, own), (group.parent, outer)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.num_usable_cores() == expected


def test_limits_of_control_groups_of_version_1(tmp_path, monkeypatch):
    group = control_group("4:memory:/docker/a", tmp_path, monkeypatch)
    # Inside a container, its own group is the root.
    (group.parent.parent / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert devices.cpu().memory == GIB


def test_the_limit_of_a_container_lowers_the_memory(group):
    total = devices.cpu().memory
    (group / "memory.max").write_text("max\n")
    assert devices.cpu().memory == total
    (group.parent / "memory.max").write_text(f"{GIB}\n")
    assert devices.cpu().memory == GIB
