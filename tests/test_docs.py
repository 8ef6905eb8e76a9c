"""The examples in README, CONTRIBUTING, CHANGELOG and docs/ work.

Blocks are ```python, ```text (output), ```math, or shell (```sh or indented). Python blocks run, in
the order of their page. The first word of a shell command or of `inline code` selects its check:

| bn-keras X, launch.X   | the command's own code parses it: flags, config, overrides and their
|                        | types, subcommands, a TPU job; then the config's values are checked
| make                   | make -n accepts it, and the Makefile uses the variables
| python benchmarks/X.py | the file exists and contains the arguments
| pip install            | setup.cfg has the extras
| docker                 | the Dockerfile has the ARG and setup.cfg the extra; the command in the
|                        | container is checked as above
| UNCHECKED              | none: these commands need an account or devices, or do not end

bash -n accepts every shell block, and an unknown command fails. Flags, config keys, files and names
of bn_keras in inline code exist.
"""

import configparser
import inspect
import pathlib
import pkgutil
import re
import shlex
import subprocess

import pytest
from ml_collections import ConfigDict
from parse_commands import OMITTED, parse_all

import bn_keras
from bn_keras.data.built_in import IMAGENET_TRAIN_EXAMPLES
from bn_keras.distribute import STRATEGIES
from bn_keras.errors import UsageError
from bn_keras.training.build import build_schedule
from bn_keras.training.config import check_config, default_config
from bn_keras.training.config_files import load_config
from bn_keras.training.schedule import PAPER_BATCH_SIZE
from launch.cloud.job import num_tpu_replicas
from launch.main import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$\n?", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)(?:(?: {4}.*)?\n)*")
INLINE = re.compile(r"`([^`]+)`")
PYTHON = re.compile(r"(\S+/)?python")
BN_KERAS = re.compile(r"(\S+/)?bn-keras")
UNCHECKED = (
    *("gcloud", "kubectl", "sky", "srun", "tensorboard", "curl"),
    *("source", "export", "for", "wait", "mkdir"),
)
DOCKER_FLAGS = {"--gpus", "--privileged", "--network"}
IMAGE = "bn_keras"
FILES_OF_A_RUN = ("config.json",)

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BENCHMARKS = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
FOLDERS = ("bn_keras", "launch", "configs", "tests", "benchmarks", "docs", "examples")


@EACH_PAGE
def test_python_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # A reader runs the blocks of a page in order, in one session.
    names = {}
    for kind, block in FENCE.findall(page.read_text()):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)


@EACH_PAGE
def test_links_have_targets(page):
    for file, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def anchors(page):
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.fixture(scope="module")
def problems_by_page():
    """The problems of all pages; one process parses all of their commands."""
    return dict(zip(PAGES, find_problems([page.read_text() for page in PAGES]), strict=True))


@EACH_PAGE
def test_commands_and_inline_code_are_valid(page, problems_by_page):
    assert not problems_by_page[page]


DIGITS = "bn-keras train --config=digits_bn_x5"
PLANTED_IN_BLOCKS = [
    f"{DIGITS} --wrkdir=runs/a",
    f"{DIGITS} --config.train.stepz=3 --workdir=runs/a",
    f"{DIGITS} --config.train.steps=many --workdir=runs/a",
    f"{DIGITS} --config.train.steps=0 --workdir=runs/a",
    f"{DIGITS} --config.distribution.strategy=mirored --workdir=runs/a",
    f"{DIGITS} \\\n        --config.schedule.decay=linear --workdir=runs/a",
    f"for index in 0 1; do\n        TF_CONFIG='{{'$index'}}' {DIGITS} &\n    done; wait",
    "$ bn-keras trian --workdir=runs/a\n    trained",
    "$ python -m launch.trian --workdir=runs/a\n    trained",
    "bn-keras train --config=digits_bn_x6 --workdir=runs/a",
    "python -m launch.train --config=configs/digits_bn_x6.py --workdir=runs/a",
    "bn-keras tpu sumbit --workdir=gs://bucket/a",
    "bn-keras tpu submit --workdir=runs/a --name=a --zone=us-east5-b"
    " --accelerator_type=v6e-8 --config=bn_x5 --dry_run",
    "bn-keras reproduce figure9 --workdir=runs/a",
    ".venv-pears/bin/bn-keras reproduce --workdir=runs/a",
    "make tset",
    "make data-imagenet MANUAL=folder",
    "python benchmarks/batch_nrom.py",
    "python benchmarks/batch_norm.py flaot32",
    ".venv-pears/bin/python benchmarks/batch_norm.py",
    'pip install ".[gpus]"',
    'pip install "bn_keras[cpu,trian]"',
    "docker build --build-arg EXTAR=gpu .",
    "docker build --build-arg EXTRA=cuda .",
    "docker run --rm bn_keras train --workdir=/runs",
    "docker run --rm bn-keras train --help",
    "pyhton -m launch.train",
    "make 'test",
]
PLANTED_INLINE = [
    "bn-keras train --dryrun",
    "launch.train --dryrun",
    "python -m launch.evaluate --crop=1 ...",
    "bn-keras evaluate --crop=1 ...",
    "make tset",
    "docker build --build-arg EXTRA=cpu\\|gpu\\|tpv .",
    "--verify_resme",
    "--scale=cifar11",
    "--config.data.shufle=shards",
    "train.micro_batch",
    "train.steps=many",
    "bn_keras/op.py",
    "nowhere.py",
    "bn_keras.replace_batchnorm",
    ".[gpus]",
]


def test_planted_mistakes_are_found():
    texts = [f"As in\n\n    {line}\n" for line in PLANTED_IN_BLOCKS]
    texts += [f"| as in | `{code}` |" for code in PLANTED_INLINE]
    texts.append("```sh\nmake demmo\n```\n")
    texts.append("```pyhton\nprint()\n```\n")
    counts = {text: len(found) for text, found in zip(texts, find_problems(texts), strict=True)}
    assert {text for text, count in counts.items() if count != 1} == set()


def test_the_table_of_arguments_matches_the_layer():
    text = (ROOT / "docs" / "layer.md").read_text()
    table = text.partition("## Arguments")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.+?) \| .+? \|", table, flags=re.MULTILINE)
    shown = {}
    for names, defaults in rows:
        names, defaults = re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", ")
        shown |= zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=False)
    parameters = inspect.signature(bn_keras.BatchNormalization).parameters
    assert shown.keys() == parameters.keys() - {"kwargs"}
    for name, text in shown.items():
        assert text.replace("−", "-") == str(parameters[name].default), name


def test_the_sample_log_is_that_of_the_present_config():
    text = (ROOT / "docs" / "commands.md").read_text()
    [name] = re.findall(r"\$ bn-keras train --config=(\w+)", text)
    config = load_config(name)
    assert f"config    {name}\n" in text
    assert f"devices   {config.distribution.strategy}: 1 CPU" in text
    steps = re.findall(r"(?:to step |finished  step |bn_x5: )([\d,]+)(?: steps|: |\n)", text)
    assert set(steps) == {str(config.train.steps)} and len(steps) == 3


def test_commands_for_several_devices_have_as_many_images_as_the_papers_on_each():
    text = (ROOT / "docs" / "launching.md").read_text()
    words = [words for _, words in find_commands(text, []) if OMITTED not in words]
    jobs = [w[1:] for w in words if w[:2] == ["bn-keras", "slurm"] or "submit" in w]
    assert len(jobs) == 2
    for job, parsed in zip(jobs, parse_all(jobs), strict=True):
        flags = dict(re.findall(r"--(\w+)=(\S+)", " ".join(job)))
        if job[0] == "slurm":
            devices = int(flags["nodes"]) * int(flags["gpus_per_node"])
        else:
            devices = num_tpu_replicas(flags["accelerator_type"])
        train = ConfigDict(parsed.config).train
        assert train.global_batch_size == PAPER_BATCH_SIZE * devices
        # The number of images, too, is that of the config without these settings.
        images = train.epochs * IMAGENET_TRAIN_EXAMPLES
        assert images == pytest.approx(train.steps * PAPER_BATCH_SIZE, rel=0.01)


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {bn_keras.__version__}\n" in citation
    assert f"\nlicense: {SETUP['metadata']['license']}\n" in citation


# --- The problems of a page.


def find_problems(texts):
    """Returns the problems of each text, as lists of lines."""
    problems, commands = [[] for _ in texts], []
    for found, text in zip(problems, texts, strict=True):
        for shown, words in find_commands(text, found):
            try:
                to_parse = check(words)
            except Problem as error:
                found.append(f"{shown}: {error}")
            else:
                commands += [(found, shown, to_parse)] if to_parse else []
    for (found, shown, _), parsed in zip(
        commands, parse_all([words for _, _, words in commands]), strict=True
    ):
        error = parsed.error or (parsed.config and config_problem(parsed.config))
        found += [f"{shown}: {error}"] if error else []
    return problems


def find_commands(text, problems):
    """Yields each command and inline code, as shown and as words; "..." stands for omitted ones.

    Appends invalid blocks to the problems.
    """
    blocks = INDENTED.findall(FENCE.sub("", text))
    for kind, block in FENCE.findall(text):
        if kind == "sh":
            blocks.append(block)
        elif kind not in ("python", "text", "math"):
            problems.append(f"a block of unknown kind {kind!r}")
    for block in blocks:
        lines = shell_lines(block)
        if error := run(["bash", "-n"], input="\n".join(lines)):
            problems.append(f"{block}: {error}")
            continue
        for line in lines:
            yield from ((line, words) for words in simple_commands(line))
    for code in INLINE.findall(INDENTED.sub("", FENCE.sub("", text))):
        for shown in alternatives(" ".join(code.replace("\\|", "|").split())):
            if words := inline_words(shown):
                yield shown, words


def shell_lines(block):
    """Returns a block's commands, one per line; with prompts, the other lines are output."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)).splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return prompted or lines


def simple_commands(line):
    """Yields the words of each command, without the variables that are set in front of it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield words
            words = []
        elif words or not (word in ("do", "done") or re.match(r"\w+=", word)):
            words.append(word)


def alternatives(code):
    """Returns "make A" and "make B" for "make A|B"."""
    choice = re.search(r"=(\w+(?:\|\w+)+)", code)
    if not choice:
        return [code]
    return [code.replace(choice[1], option) for option in choice[1].split("|")]


def inline_words(code):
    """Returns the words of a command, flag, config key, file or name in bn_keras, or []."""
    first, *rest = code.split()
    is_command = rest and first in ("make", "pip", "docker", "bn-keras", *UNCHECKED)
    if is_command or re.match(r"(\S+/)?python$|--\w|launch\.", first):
        return [*shlex.split(code), OMITTED]
    sections = "|".join(default_config())
    is_key = re.fullmatch(rf"config(\.\w+)+|({sections})(\.\w+)+", code.partition("=")[0])
    is_ours = re.match(rf"({'|'.join(FOLDERS)})/[\w./]*$|bn_keras(\.\w+)+|\.\[\w+\]$", code)
    is_key = is_key and code not in FILES_OF_A_RUN
    if is_key or is_ours or re.fullmatch(r"\w+\.py", code):
        return [code]
    return []


# --- The check of each kind: raises Problem, or returns what is left for a command to parse.


class Problem(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Problem(message)


def check(words):
    first, *rest = words
    if PYTHON.fullmatch(first):
        return check_python(first, rest)
    if BN_KERAS.fullmatch(first):
        check_environment(first)
        return check_command(*rest)
    if first.startswith("launch."):
        return check_module(words)
    if first.startswith("--"):
        return check_flags(words)
    if first == "make":
        check_make(rest)
    elif first == "pip":
        check_extras(",".join(re.findall(r"\[([\w,]+)\]", " ".join(rest))))
    elif first == "docker":
        return check_docker(rest)
    elif first not in UNCHECKED:
        return check_name(first)
    return None


def check_environment(program):
    folder = re.sub(r"bin/[^/]+$", "", program) if "/" in program else ""
    require(folder in MAKEFILE, f"make sets up no {folder}")


def check_python(python, words):
    check_environment(python)
    if words == [OMITTED]:
        return None
    if words[0] == "-m":
        return check_module(words[1:])
    script, *arguments = [word for word in words if word != OMITTED]
    require((ROOT / script).is_file(), f"there is no {script}")
    text = (ROOT / script).read_text()
    for word in arguments:
        known = "/" in word or word.partition("=")[0] in text
        require(known, f"{script} does not contain {word}")
    return None


def check_module(words):
    module, *rest = words
    require(module.startswith("launch."), f"{module} is not a command")
    return check_command(module.removeprefix("launch."), *rest)


def check_command(command=OMITTED, *words):
    if command in ("COMMAND", "NAME", "--help", "--version", OMITTED):
        return None
    require(command in COMMANDS, f"there is no command {command}")
    words = filled_in(words)
    return [command, *words] if words != [OMITTED] else None


def check_flags(words):
    """Checks flags without a command, which belong to a command, a benchmark or docker."""
    words = [word for word in filled_in(words) if word != OMITTED]
    names = {word.partition("=")[0] for word in words}
    if names <= DOCKER_FLAGS or all(f'"{name}"' in BENCHMARKS for name in names):
        return None
    return ["", *words]


def filled_in(words):
    """Replaces placeholders by values, and drops --config.KEY=VALUE."""
    words = [re.sub(r"=[A-Za-z]$", "=1", word) for word in words]
    # A name to replace, or the folder of a reader's run.
    config = re.compile(r"^--config=((configs/)?NAME(\.py)?|runs/\S+)$")
    words = [config.sub("--config=...", word) for word in words]
    return [word for word in words if word != "--config.KEY=VALUE"]


def check_make(words):
    words = [word for word in words if word != OMITTED]
    targets = [word for word in words if "=" not in word]
    error = run(["make", "-n", *targets])
    require(not error, error)
    for word in set(words) - set(targets):
        require(f"$({word.partition('=')[0]})" in MAKEFILE, f"the Makefile has no {word}")


def check_extras(extras):
    for extra in filter(None, extras.split(",")):
        require(extra in SETUP["options.extras_require"], f"there is no extra {extra}")


def check_docker(words):
    for name, value in re.findall(r"--build-arg (\w+)=(\w+)", " ".join(words)):
        require(f"\nARG {name}" in DOCKERFILE, f"the Dockerfile has no ARG {name}")
        check_extras(value)
    if words[0] != "run":
        return None
    require(IMAGE in words, f"the image is called {IMAGE}")
    return check_command(*words[words.index(IMAGE) + 1 :])


def check_name(name):
    """Checks an extra, a name in bn_keras, a file or a config key."""
    if name.startswith(".["):
        check_extras(name[2:-1])
    elif name.startswith("bn_keras."):
        require(resolves(name.partition("(")[0]), "there is no such name")
    elif "/" in name:
        require("NAME" in name or (ROOT / name).exists(), "there is no such file")
    elif name.endswith(".py"):
        require(any(any((ROOT / folder).rglob(name)) for folder in FOLDERS), "no such file")
    elif "." in name and name.partition(".")[0] in ("config", *default_config()):
        return check_key(name.removeprefix("config."))
    else:
        raise Problem(f"{name} is none of the commands that this test knows")
    return None


def resolves(name):
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def check_key(text):
    key, _, value = text.partition("=")
    node = default_config()
    for part in key.split("."):
        require(isinstance(node, ConfigDict) and part in node, "there is no such key")
        node = node[part]
    return check_command("train", f"--config.{text}", OMITTED) if value else None


# --- Problems of a command that is parsed.


def config_problem(config):
    config = ConfigDict(config)
    try:
        check_config(config)
        build_schedule(config, num_train_examples=1000)
    except UsageError as error:
        return str(error)
    strategy = config.distribution.strategy
    return "" if strategy in STRATEGIES else f"there is no strategy {strategy}"


def run(command, **options):
    """Returns the output of a command that fails, or ""."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    return (done.stderr or done.stdout or "failed") if done.returncode else ""
