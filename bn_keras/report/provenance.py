"""The last section of a report: the command, runs, software, machine and settings behind it."""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bn_keras.report.sections import Section, escape, markdown_table
from bn_keras.runs.history import Results, Run
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.settings import flatten
from bn_keras.text import counted, format_duration
from bn_keras.training.config import MLP_SETTINGS, default_config
from bn_keras.training.networks import value_of

# The folder of the data does not affect a result, and the seed is part of a run's name.
_HIDDEN = {"data.data_dir", "seed"}
# Settings that only Inception networks use.
_INCEPTION_ONLY = {f"model.{name}" for name in set(default_config().model) - MLP_SETTINGS}
# Formatted values of settings that are off or empty.
_OFF = ("0", "off", "-")


def describe_provenance(results: Results, command: str, num_missing: int) -> Section:
    """Builds the section on how a report was made.

    Args:
      results: runs that the report is about.
      command: command that reproduces the report.
      num_missing: number of the command's runs that have not ended.
    """
    runs = [run for seeds in results.values() for run in seeds]
    parts = ["\n".join(f"    {line}" for line in command.splitlines())]
    if num_missing:
        parts.append(
            f"The report covers {len(runs)} of this command's {len(runs) + num_missing} runs."
            " With `--report_only`, the command makes it again from their records; without it, the"
            " command also trains the missing ones."
        )
    if runs:
        parts += [
            "Unless stated otherwise, all numbers and curves but the paper's come from the files in"
            " the runs' folders: `config.json`, `metrics.jsonl` and `environment.json`.",
            "### Runs",
            _tabulate_runs(runs),
            _describe_time(runs),
            "### Software and machine",
            *_describe_environment(runs),
            "### Settings",
            *_describe_settings(results),
        ]
    return Section("How this report was made", "\n\n".join(parts))


# --- Runs.


def _tabulate_runs(runs: Iterable[Run]) -> str:
    header = (
        "run",
        "status",
        "started (UTC)",
        "SHA-256 of all variables",
        "starts",
        "steps",
        "training time",
        "wall time",
    )
    rows = []
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        rows.append(
            (
                escape(run.name),
                _status(run),
                _format_time(run.environment[0]["started"]) if run.environment else "-",
                last.get(FINISHED, "-")[:12],
                f"{len(run.environment) or '-'}",
                f"{last.get('step', 0):,}",
                format_duration(run.seconds),
                _wall_time(run),
            )
        )
    return markdown_table(header, rows, left=4)


def _status(run: Run) -> str:
    if run.is_finished:
        return "finished"
    if run.diverged_at is not None:
        return f"diverged at step {run.diverged_at:,}"
    return "unfinished"


def _wall_time(run: Run) -> str:
    """Formats a run's wall time, with "over" if a killed start adds an unknown time."""
    if not run.wall_seconds:
        return "-"
    was_killed = any(not start["ended"] for start in run.environment)
    return f"{'over ' if was_killed else ''}{format_duration(run.wall_seconds)}"


def _describe_time(runs: Sequence[Run]) -> str:
    text = f"The training steps of all runs took {format_duration(sum(r.seconds for r in runs))}."
    starts = [start for run in runs for start in run.environment]
    ends = [start["ended"] for start in starts if start["ended"]]
    if ends:
        over = "over " if len(ends) < len(starts) else ""
        wall_time = over + format_duration(sum(run.wall_seconds for run in runs))
        first = _format_time(min(start["started"] for start in starts))
        text += (
            f" With compilation, evaluations and checkpoints, the runs took {wall_time}; times of"
            f" parallel runs are added up. The first run started {first} UTC, the last ended"
            f" {_format_time(max(ends))} UTC."
        )
    return text


def _format_time(iso_time: str) -> str:
    time = datetime.datetime.fromisoformat(iso_time).astimezone(datetime.UTC)
    return f"{time:%Y-%m-%d %H:%M}"


# --- Software and machine.

# An entry of environment.json.
_Start = Mapping[str, Any]


def _describe_environment(runs: Sequence[Run]) -> list[str]:
    aspects: Mapping[str, Callable[[_Start], str]] = {
        "Software": _describe_software,
        "Source": _describe_source,
        "Machine": _describe_machine,
    }
    paragraphs = []
    for aspect, describe in aspects.items():
        # Names of the runs by description; a dict keeps them in order and without duplicates.
        described: dict[str, dict[str, None]] = {}
        for run in runs:
            for start in run.environment:
                described.setdefault(describe(start), {})[escape(run.name)] = None
        if len(described) == 1:
            paragraphs.append(f"{aspect}: {next(iter(described))}.")
        elif described:
            lines = [f"- {text}: {', '.join(names)}." for text, names in described.items()]
            paragraphs += [f"**{aspect} differs between starts of runs.**", "\n".join(lines)]
    unrecorded = [escape(run.name) for run in runs if not run.environment]
    if unrecorded:
        which = "any run" if len(unrecorded) == len(runs) else ", ".join(unrecorded)
        paragraphs.append(f"Software and machine are not recorded for {which}.")
    return paragraphs


def _describe_software(start: _Start) -> str:
    return escape(", ".join(f"{name} {version}" for name, version in start["versions"].items()))


def _describe_source(start: _Start) -> str:
    if not start["commit"]:
        return "commit unknown (not run from a git checkout)"
    changes = " with uncommitted changes" if start["modified"] else ""
    return f"commit {escape(start['commit'])}{changes}"


def _describe_machine(start: _Start) -> str:
    machine = start["machine"]
    return escape(
        f"{machine['processor']}, {counted(machine['cores'], 'core')} per run,"
        f" {machine['platform']}, trained on {', '.join(machine['devices'])}"
    )


# --- Settings.

# The displayed settings of one run, by key.
_Settings = Mapping[str, str]


def _describe_settings(results: Results) -> list[str]:
    """Describes what differs and what is common, for each pair of model and data set."""
    groups: dict[str, dict[str, Sequence[Run]]] = {}
    for title, runs in results.items():
        config = runs[0].config
        name = f"{escape(config.model.name)} on {escape(config.data.name)}"
        groups.setdefault(name, {})[title] = runs
    paragraphs = []
    for name, group in groups.items():
        if len(groups) > 1:
            paragraphs.append(f"**{name}**")
        paragraphs += _compare_settings(group)
    return paragraphs


def _compare_settings(results: Results) -> list[str]:
    settings = {title: [_read_settings(run) for run in runs] for title, runs in results.items()}
    all_settings = [run for seeds in settings.values() for run in seeds]
    keys = dict.fromkeys(key for run in all_settings for key in run)
    values = {key: _distinct_values(all_settings, key) for key in keys}
    return [*_tabulate_differences(settings, values), *_list_common(values)]


def _tabulate_differences(
    settings: Mapping[str, Sequence[_Settings]], values: Mapping[str, Sequence[str]]
) -> list[str]:
    differing = [key for key, distinct in values.items() if len(distinct) > 1]
    if not differing:
        return []
    first = next(iter(settings.values()))
    rows = []
    for title, seeds in settings.items():
        own = {key: _distinct_values(seeds, key) for key in differing}
        shown = [
            f"`{key}` {' or '.join(distinct)}"
            for key, distinct in own.items()
            if seeds is first or distinct != _distinct_values(first, key)
        ]
        rows.append((escape(title), ", ".join(shown) or "same as the first"))
    return [
        "Settings that differ between runs. The first row lists all of them, later rows only what"
        " differs from the first.",
        markdown_table(("run", "settings"), rows, left=2),
    ]


def _list_common(values: Mapping[str, list[str]]) -> list[str]:
    common: dict[str, list[str]] = {}
    for key, (value, *others) in values.items():
        section, _, name = key.rpartition(".")
        if not others and value not in _OFF:
            common.setdefault(section, []).append(f"`{name}` {value}")
    lines = [f"- {escape(section)}: {', '.join(texts)}" for section, texts in common.items()]
    return ["Settings that all runs share (0, off and empty ones omitted):", "\n".join(lines)]


def _read_settings(run: Run) -> dict[str, str]:
    """Returns the settings in effect: None in the config means the variant's own value."""
    hidden = _HIDDEN if run.config.model.name == "inception" else _HIDDEN | _INCEPTION_ONLY
    return {
        key: _format_setting(value_of(run.config, key) if value is None else value)
        for key, value in flatten(run.config).items()
        if key not in hidden
    }


def _distinct_values(settings: Sequence[_Settings], key: str) -> list[str]:
    # Configs of older versions may lack a key.
    return list(dict.fromkeys(run.get(key, "-") for run in settings))


def _format_setting(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value)) if value else "-"
