"""The Kubernetes manifests follow the published schemas and our commands; none has run."""

import pathlib

import pytest
from ml_collections import ConfigDict
from parse_commands import parse_all

from bn_keras.data.built_in import IMAGENET_TRAIN_EXAMPLES
from bn_keras.distribute.cluster import Cluster
from bn_keras.distribute.detection import find_cluster
from bn_keras.errors import TrainingDivergedError, UsageError, WorkerLostError
from bn_keras.training.config import check_config
from bn_keras.training.schedule import PAPER_BATCH_SIZE

validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

MANIFESTS = sorted((pathlib.Path(__file__).parents[1] / "launch" / "kubernetes").glob("*.yaml"))
# The first version in which every field of ours is stable, and a recent one.
VERSIONS = ("1.31", "1.36")


def load(path):
    """Returns the resources in a manifest by kind."""
    return {resource["kind"]: resource for resource in yaml.safe_load_all(path.read_text())}


def container(path):
    return load(path)["Job"]["spec"]["template"]["spec"]["containers"][0]


def test_there_are_manifests():
    assert [path.name for path in MANIFESTS] == ["gpu.yaml", "workers.yaml"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_follows_the_published_schemas(path, version):
    """Strictly: unknown fields are errors."""
    for resource in load(path).values():
        validate.validate(resource, version, strict=True)


def test_the_validation_finds_faults():
    job = load(MANIFESTS[0])["Job"]
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    with pytest.raises(validate.ValidationError, match="backofLimit"):
        validate.validate(job, VERSIONS[0], strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_arguments_are_valid(path):
    [parsed] = parse_all([container(path)["args"]])
    assert parsed.status == 0, parsed
    check_config(ConfigDict(parsed.config))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_each_gpu_has_as_many_images_as_the_papers(path):
    gpus = container(path)["resources"]["limits"]["nvidia.com/gpu"]
    gpus *= load(path)["Job"]["spec"].get("completions", 1)
    [parsed] = parse_all([container(path)["args"]])
    config = ConfigDict(parsed.config)
    assert config.train.global_batch_size == PAPER_BATCH_SIZE * gpus
    # The number of images, too, is that of the config without these settings.
    images = config.train.epochs * IMAGENET_TRAIN_EXAMPLES
    assert images == pytest.approx(config.train.steps * PAPER_BATCH_SIZE, rel=0.01)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_only_errors_that_would_recur_fail_the_job(path):
    rules = load(path)["Job"]["spec"]["podFailurePolicy"]["rules"]
    failing = next(rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob")
    assert failing["containerName"] == container(path)["name"]
    assert failing["values"] == [UsageError.status, TrainingDivergedError.status]
    assert WorkerLostError.status not in failing["values"]


def test_the_pods_of_the_service_are_the_workers(monkeypatch):
    resources = load(MANIFESTS[1])
    spec, service = resources["Job"]["spec"], resources["Service"]
    name = resources["Job"]["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"]
    port = service["spec"]["ports"][0]["port"]
    hosts = [f"{name}-{i}.{service['metadata']['name']}" for i in range(spec["completions"])]
    variables = {v["name"]: v.get("value") for v in container(MANIFESTS[1])["env"]}
    for index in range(spec["completions"]):
        # Kubernetes replaces $(NAME) by a variable defined above.
        text = variables["TF_CONFIG"].replace("$(INDEX)", str(index))
        monkeypatch.setenv("TF_CONFIG", text)
        assert find_cluster() == Cluster(tuple(f"{host}:{port}" for host in hosts), index)
    assert list(variables) == ["INDEX", "TF_CONFIG"]
