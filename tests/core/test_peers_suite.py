"""A suite of others that is run on our classes: nothing fails, and nothing is skipped, without a reason that holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clients.peers_suite import Outcome, Reasons, judge

REASONS = Reasons(
    {"Models::test_beams_*": "Beams are ours.", "*: no feet*": "There are no feet."},
    {"Models::test_pixels": "There are no pixels."},
    {"test requires *": "There is no accelerator."},
)
OUTCOMES = {
    "Models::test_greedy": Outcome("passed"),
    "Models::test_beams_2": Outcome("failed", "one error"),
    "Models::test_beams_4": Outcome("failed", "another"),
    "Models::test_pixels": Outcome("failed", "no pixels"),
    "Models::test_walk": Outcome("failed", "no feet to walk with"),
    "Models::test_gpu": Outcome("skipped", "test requires CUDA"),
}


def test_everything_that_does_not_pass_is_counted_under_its_reason():
    assert judge(OUTCOMES, REASONS) == (
        {"passed": 1, "different by design": 3, "not applicable": 1, "skipped by the suite": 1},
        [],
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"Models::test_new": Outcome("failed", "an error")}, "test_new failed, with 0 reasons"),
        ({"Models::test_new": Outcome("skipped", "flaky")}, "test_new skipped, with 0 reasons"),
        ({"Models::test_beams_2": Outcome("skipped", "flaky")}, "test_beams_2 skipped, with 0 reasons"),
        ({"Models::test_beams_2": Outcome("passed")}, "test_beams_2 passes, but"),
        ({"Models::test_pixels": Outcome("passed")}, "test_pixels passes, but"),
        ({"Models::test_walk": Outcome("failed", "no legs")}, "test_walk failed, with 0 reasons"),
        ({"Models::test_pixels": None}, "'Models::test_pixels': no test"),
        ({"Models::test_gpu": None}, "'test requires *': no test"),
    ],
)
def test_a_failure_without_a_reason_and_a_reason_without_a_failure_are_problems(changed, problem):
    outcomes = {name: outcome for name, outcome in {**OUTCOMES, **changed}.items() if outcome is not None}
    assert problem in judge(outcomes, REASONS).problems[0]


def test_two_reasons_for_one_test_are_a_problem():
    reasons = REASONS._replace(not_applicable={**REASONS.not_applicable, "Models::test_beams_2": "No."})
    assert any("test_beams_2 failed, with 2 reasons" in problem for problem in judge(OUTCOMES, reasons).problems)


SUITE = """
import unittest


class Cases(unittest.TestCase):
    def test_right(self):
        pass

    def test_wrong(self):
        self.fail("wrong")

    def test_parts(self):
        for part in (1, 2):
            with self.subTest(part):
                self.assertEqual(part, 1)

    @unittest.skip("test is slow")
    def test_slow(self):
        pass
"""
RUN = """
import sys
from pathlib import Path
from peers_suite import Reasons, run

reasons = Reasons({"Cases::test_wrong": "It is wrong."}, eval(sys.argv[2]), {"*slow": "It is slow."})
sys.exit(run([Path(sys.argv[1])], reasons))
"""


def run(path, text, listed):
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "clients")}
    command = [sys.executable, "-c", RUN, str(path), repr(listed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("listed", "code"), [({"Cases::test_parts": "There are two."}, 0), ({}, 1)])
def test_a_run_collects_what_tests_do(tmp_path, listed, code):
    done = run(tmp_path / "test_cases.py", SUITE, listed)
    assert done.returncode == code, done.stdout + done.stderr
    assert "of 4 tests: 1 passed, 1 different by design" in done.stdout
    assert ("test_parts failed, with 0 reasons" in done.stdout) == (code == 1)


def test_a_file_that_cannot_be_collected_is_a_problem(tmp_path):
    done = run(tmp_path / "test_cases.py", "import nothing_of_this_name", {})
    assert done.returncode == 1
    assert "cannot be collected" in done.stdout
