"""A report of results: policies side by side at equal bytes, as Markdown and one HTML page."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.evals import report_choices, report_sections, report_spectrum, report_trade
from freqkv_jax.evals.report_blocks import (
    Block,
    Figure,
    Heading,
    Lines,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from freqkv_jax.evals.report_runs import Run, load_runs
from freqkv_jax.files import write_text, write_whole

ORDER = ("perplexity", "needle", "ruler", "longbench", "longgenbench")  # then others, cost, spectra


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    title: str = "Results",
    baseline: str | None = None,
    policies: Sequence[str] = (),
) -> list[Path]:
    """Writes report.md with its figures, and report.html, which holds them.

    Args:
      paths: result files, or folders of them.
      baseline: the policy (its name or label) that others are compared with; None takes one of
        equal bytes, sink_window first.
      policies: these alone (labels, or names in the registry); none given: all.

    Returns:
      The files written.

    Raises:
      ValueError: no results, a file that is none, an unknown baseline or policy. OSError.
      ImportError without matplotlib.
    """
    runs = _chosen(load_runs(paths), policies)
    blocks = build(runs, title, baseline)
    target = Path(folder)
    written = []
    for block in blocks:
        if isinstance(block, Figure):
            path = target / "figures" / f"{block.name}.png"
            data = block.png
            write_whole(path, lambda name, data=data: Path(name).write_bytes(data))
            written.append(path)
    for name, text in (
        ("report.md", to_markdown(blocks)),
        ("report.html", to_html(title, blocks)),
    ):
        write_text(target / name, text)
        written.append(target / name)
    return written


def _chosen(runs: list[Run], policies: Sequence[str]) -> list[Run]:
    """The runs of these policies; a suite's label goes before a name that all its kind have."""
    labels, names = {r.policy_label for r in runs}, {r.policy_name for r in runs}
    if unknown := sorted(set(policies) - labels - names):
        there = sorted(labels | names)
        raise ValueError(f"no result has the policies {unknown}; there are: {there}")
    asked = set(policies)
    chosen = [r for r in runs if r.policy_label in asked or r.policy_name in asked - labels]
    return chosen if asked else runs


def build(runs: Sequence[Run], title: str = "Results", baseline: str | None = None) -> list[Block]:
    """The report's blocks."""
    if baseline is not None:
        known = sorted({label for run in runs for label in (run.policy_name, run.policy_label)})
        if baseline not in known:
            raise ValueError(f"no result has the baseline {baseline!r}; there are: {known}")
    sections = _sections(runs, baseline)
    blocks: list[Block] = [Heading(1, title), Paragraph(_about(runs))]
    short = _in_short(sections)
    if short:
        blocks += [Heading(2, "In short: caches of equal size, longest texts"), Lines(short)]
    warnings = _warnings(runs)
    if warnings:
        blocks += [Heading(2, "To be read with care"), Lines(warnings)]
    for section in sections:
        blocks += section
    return [*blocks, *_provenance(runs)]


def _sections(runs: Sequence[Run], baseline: str | None) -> list[list[Block]]:
    sections = [section] if (section := report_trade.section(runs)) else []
    tasks = sorted({run.task for run in runs}, key=_task_order)
    for task in tasks:
        mine = [run for run in runs if run.task == task]
        if task == "cost":
            sections.append(report_sections.cost_section(mine))
        elif task == "choices":
            sections.append(report_choices.section(mine))
        elif task == "spectrum":
            sections.append(report_spectrum.section(mine))
        else:
            groups = _groups(mine)
            for number, (words, group) in enumerate(groups):
                title = report_sections.TITLES.get(task, task) + words
                name = f"{task}_{number}" if len(groups) > 1 else task
                sections.append(report_sections.comparison_section(title, group, name, baseline))
    return sections


def _task_order(task: str) -> tuple[int, str]:
    last = {"choices": 97, "cost": 98, "spectrum": 99}
    return (ORDER.index(task) if task in ORDER else last.get(task, 50)), task


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that may stand in one table, with words that tell the tables apart."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting(report_sections.COLUMN_OPTIONS), []).append(run)
    if len(groups) == 1:
        return [("", list(runs))]
    options = [json.loads(key[3]) for key in groups]
    names = sorted({name for one in options for name in one})
    differing = [n for n in names if len({json.dumps(one.get(n)) for one in options}) > 1]
    several_texts = len({key[2] for key in groups}) > 1
    several_protocols = len({key[1] for key in groups}) > 1
    found = []
    for (key, group), one in zip(groups.items(), options, strict=True):
        words = [f"{name}={one[name]}" for name in differing if one.get(name) is not None]
        if several_texts:
            words.insert(0, _data_name(group[0]))
        if several_protocols:
            words.append(key[1])
        found.append((f" ({', '.join(word for word in words if word)})", group))
    return found


def _data_name(run: Run) -> str:
    about = run.data.get("data") or {}
    name = Path(str(about.get("path") or about.get("data") or "")).name
    return " ".join(part for part in (name, run.data_digest[:8]) if part)


def _in_short(sections: Iterable[list[Block]]) -> list[str]:
    """The verdicts on the longest texts of every comparison, under its section's title."""
    lines = []
    for section in sections:
        titles = ["", ""]
        for block in section:
            if isinstance(block, Heading):
                titles = [block.text, ""] if block.level == 2 else [titles[0], block.text]
            elif isinstance(block, Lines):
                title = ", ".join(part for part in titles if part)
                lines += [f"{title}: {line}" for line in block.short]
    return lines


def _about(runs: Sequence[Run]) -> str:
    models = sorted({run.model_label for run in runs})
    policies = sorted({run.policy_label for run in runs})
    devices = sorted({str((r.data.get("device") or {}).get("kind", "unknown")) for r in runs})
    versions = sorted({(r.data.get("versions") or {}).get("freqkv-jax") or "?" for r in runs})
    return (
        f"{len(runs)} results of {', '.join(models)} under {', '.join(policies)}; on"
        f" {', '.join(devices)}; freqkv-jax {', '.join(versions)}. Every number is from the result"
        " files that the last section lists."
    )


def _warnings(runs: Sequence[Run]) -> list[str]:
    lines = []
    idle = [run for run in runs if run.nothing_compressed and run.task not in ("cost", "spectrum")]
    if idle:
        names = ", ".join(sorted(Path(run.path).name for run in idle))
        lines.append(
            "Nothing was compressed, since every text fits the cache, and so the policy made no"
            f" difference: {names}."
        )
    for run in runs:
        failed = run.data.get("num_failed") or 0
        if failed:
            every = run.data.get("num_items") or len(run.data.get("records") or [])
            lines.append(
                f"{Path(run.path).name}: {failed} of {every} samples failed and are left out."
            )
    for name in ("dtype", "code_revision"):
        values = {
            str(run.config.get(name) if name == "dtype" else run.data.get(name)) for run in runs
        }
        if len(values) > 1:
            words = name.replace("_", " ")
            lines.append(f"The results differ in {words}: {', '.join(sorted(values))}.")
    return lines


def _provenance(runs: Sequence[Run]) -> list[Block]:
    rows = []
    for run in sorted(runs, key=lambda r: r.path):
        data = run.data
        rounds = data.get("num_compressions")
        if isinstance(rounds, dict):
            rounds = "/".join(f"{rounds.get(k, 0):.4g}" for k in ("min", "mean", "max"))
        rows.append(
            [
                Path(run.path).name,
                run.task,
                str(data.get("protocol")),
                run.model_label,
                run.policy_label,
                str(run.config.get("dtype", "-")),
                str(data.get("num_items", data.get("num_windows", "-"))),
                "-" if rounds is None else str(rounds),
                f"{data['seconds']:,.0f}" if data.get("seconds") else "-",
                str(data.get("model_fingerprint") or "-")[:12],
                run.data_digest[:12] or "-",
            ]
        )
    columns = (
        "file", "task", "protocol", "model", "policy", "dtype", "samples",
        "rounds (min/mean/max)", "seconds", "weights", "data",
    )  # fmt: skip
    return [
        Heading(2, "Where the numbers come from"),
        Table(columns, rows, "", ["weights and data: the first figures of their SHA-256"]),
    ]
