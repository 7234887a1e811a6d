"""Runs tests that others wrote for their classes on ours, and holds each that does not pass against a list of reasons.

A reason is a full sentence beside a pattern of test names (`Class::test_name`, with `*`), which may go on with an error
(`Class::test_name: *error*`). Nothing fails, and nothing is skipped, without one; a reason whose tests pass, or are not
there, is wrong too, so no list is longer than needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

KINDS = ("passed", "different by design", "not applicable", "skipped by the suite", "without a reason")


class Outcome(NamedTuple):
    """What came of one test."""

    result: str
    """passed, failed or skipped."""
    message: str = ""
    """The error's first line, or why it was skipped."""


class Reasons(NamedTuple):
    """Why tests do not pass: patterns of names and errors, and of skipping messages, each with a sentence."""

    different: Mapping[str, str]
    """Contracts of ours that are documented and differ."""
    not_applicable: Mapping[str, str]
    """What a dense text decoder has not, or what no class of ours is asked."""
    skipped: Mapping[str, str]
    """Messages with which the suite itself skips tests."""


class Verdict(NamedTuple):
    """How many tests there are of each kind, and what is wrong."""

    counts: Counter[str]
    problems: list[str]


def judge(outcomes: Mapping[str, Outcome], reasons: Reasons) -> Verdict:
    """Hold outcomes by test name against the reasons."""
    counts: Counter[str] = Counter()
    problems, used = [], set()
    kinds = {"different by design": reasons.different, "not applicable": reasons.not_applicable}
    for name, (result, message) in outcomes.items():
        texts = name, f"{name}: {message}"
        found = [
            (kind, each)
            for kind, listed in kinds.items()
            for each in listed
            if any(fnmatchcase(t, each) for t in texts)
        ]
        used |= {pattern for _, pattern in found}
        if result == "skipped":
            found = [("skipped by the suite", each) for each in reasons.skipped if fnmatchcase(message, each)]
            used |= {pattern for _, pattern in found}
        if result == "passed":
            counts["passed"] += 1
            problems += [f"{name} passes, but {pattern!r} says why it does not" for _, pattern in found]
        elif len(found) != 1:
            counts["without a reason"] += 1
            problems.append(f"{name} {result}, with {len(found)} reasons instead of one: {message}")
        else:
            counts[found[0][0]] += 1
    for pattern in [*reasons.different, *reasons.not_applicable, *reasons.skipped]:
        if pattern not in used:
            problems.append(f"{pattern!r}: no test has this name or message")
    return Verdict(counts, problems)


class Recorder:
    """The plugin of pytest that keeps outcomes."""

    def __init__(self, left_out: Sequence[str] = ()) -> None:
        self.patterns = left_out
        self.outcomes: dict[str, Outcome] = {}
        self.not_collected: list[str] = []
        self.left_out: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        names = {item: item.nodeid.partition("::")[2] for item in items}
        out = [item for item in items if any(fnmatchcase(names[item], pattern) for pattern in self.patterns)]
        self.left_out += [names[item] for item in out]
        items[:] = [item for item in items if item not in out]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected.append(f"{report.nodeid} cannot be collected: {_message(report)}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        before = self.outcomes.get(name, Outcome("passed"))
        if before.result == "failed" or (report.passed and report.when != "call"):
            return
        if not report.passed or name not in self.outcomes:
            self.outcomes[name] = Outcome(report.outcome, "" if report.passed else _message(report))


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else report.longreprtext).strip().split("\n")[0]


def run(files: Sequence[Path], reasons: Reasons, *, left_out: Sequence[str] = (), arguments: Sequence[str] = ()) -> int:
    """Run test files, print the counts, the reasons and what has none; 1 where there is any of it, else 0.

    `left_out` are patterns of tests that do not ask what our classes do: that they pass says nothing. With
    `arguments` of pytest, as `-k greedy`, fewer tests are run, and reasons may have none.
    """
    recorder = Recorder(left_out)
    alone = ["-c", os.devnull, "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "-q", "--tb=short"]
    pytest.main([*alone, "--rootdir", str(files[0].parent), *map(str, files), *arguments], plugins=[recorder])
    counts, problems = judge(recorder.outcomes, reasons)
    problems += recorder.not_collected
    if arguments:
        problems = [problem for problem in problems if "no test has this name" not in problem]
    for title, listed in zip(("different by design", "not applicable"), reasons[:2], strict=True):
        print(f"\n{title}:")
        for pattern, sentence in listed.items():
            print(f"  {pattern}: {sentence}")
    print(f"\nof {sum(counts.values())} tests: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    print(f"left out, as they do not ask what our classes do: {len(recorder.left_out)}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems or not counts else 0
