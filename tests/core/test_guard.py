"""`benchmarks.guard` on ratios that are made up: what fell is named, and nothing else is."""

from __future__ import annotations

import json

import pytest

from benchmarks import guard
from benchmarks.common import shown

KIND = "AMD, AVX-512, bfloat16, 2 cores"
BALANCE = guard.BALANCES["float32"]
KEPT = {BALANCE: 4.0, "float32: decode / read": 0.8, "int4: decode / bfloat16": 2.0}
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"


def one_round(**changed):
    """What a backend gives: a step of one row 0.1 s, of four 0.2, of sixteen 0.4, packed less, a limit each second."""
    steps = {1: 0.1, 4: 0.2, 16: 0.4}
    found = {
        f"{dtype} {rows}": {"first": 0.5, "step": step}
        for dtype in ("float32", "bfloat16")
        for rows, step in steps.items()
    }
    found |= {"int8 1": {"first": 1, "step": 0.05}, "int4 1": {"first": 1, "step": 0.025}}
    found |= {f"{limit} {dtype}": 1.0 for limit in ("read beside", "matmul") for dtype in ("float32", "bfloat16")}
    return {**found, **changed}


def kept_of(*runs):
    """What is kept of torch on this kind of processor."""
    return {KIND: {"torch": [{"ratios": run} for run in runs]}}


@pytest.mark.parametrize(
    ("cpuinfo", "cores", "wanted"),
    [
        (AMD, 2, KIND),
        (AMD.replace("avx512_bf16", ""), 8, "AMD, AVX-512, 8 cores"),
        ("vendor_id: GenuineIntel\nflags: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n", 2,
         "Intel, AMX, AVX-512, bfloat16, 2 cores"),
        ("vendor_id: GenuineIntel\nflags: avx2\n", 4, "Intel, AVX2, 4 cores"),
    ],
)  # fmt: skip
def test_the_kind_of_a_processor(cpuinfo, cores, wanted):
    assert guard.kind(cpuinfo, cores) == wanted


def test_a_processor_without_cpuinfo_has_a_kind_too(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert guard.kind("", 8) == "arm64, 8 cores"
    assert guard.kind("Features\t: fp sve bf16\n", 4) == "arm64, SVE, bfloat16, 4 cores"


def test_exactly_what_fell_by_more_than_the_share_is_named():
    just, more = 1 - guard.FELL + 0.001, 1 - guard.FELL - 0.001
    now = {name: value * just for name, value in KEPT.items()}
    assert guard.fallen("tf", KEPT, now) == []
    name = "int4: decode / bfloat16"
    assert guard.fallen("tf", KEPT, {**now, name: 2.0 * more}) == [("tf", name, 2.0, 2.0 * more)]
    assert guard.fallen("tf", KEPT, {name: value * 3 for name, value in KEPT.items()}) == []
    assert guard.fallen("tf", KEPT, {**KEPT, BALANCE: 3.0}) == [], "the machine's own"


def test_a_fall_is_said_with_both_numbers_and_the_status():
    now = {**KEPT, "float32: decode / read": 0.4}
    text, status = guard.compared(kept_of(KEPT), KIND, {"torch": [now]})
    assert status == 1
    assert "fell by more than 15%: torch float32: decode / read: 0.8 -> 0.4" in text
    assert text.count("FELL") == text.count("fell by") == 1
    text, status = guard.compared(kept_of(KEPT), KIND, {"torch": [KEPT]})
    assert status == 0
    assert "nothing that was compared fell" in text


def test_the_median_over_the_rounds_counts():
    lower = {**KEPT, "float32: decode / read": 0.1}
    assert guard.medians([KEPT, lower, KEPT]) == KEPT
    assert guard.compared(kept_of(KEPT), KIND, {"torch": [KEPT, lower, KEPT]})[1] == 0
    assert guard.compared(kept_of(KEPT), KIND, {"torch": [lower, KEPT, lower]})[1] == 1


def test_the_nearest_balance_is_compared():
    """A machine that reads faster has other ratios, which are no fall."""
    fast = {name: value / 2 for name, value in KEPT.items()}
    both = kept_of(fast, KEPT)
    for now, wanted in ((fast, fast), ({**fast, BALANCE: 2.5}, fast), ({**KEPT, BALANCE: 3.5}, KEPT)):
        assert guard.nearest(both[KIND]["torch"], now) == wanted
    assert guard.compared(both, KIND, {"torch": [fast]})[1] == 0
    assert guard.compared(both, KIND, {"torch": [{**fast, BALANCE: 4.0}]})[1] == 1
    text, status = guard.compared(kept_of(KEPT), KIND, {"torch": [fast]})
    assert status == 0
    assert f"no ratios near {shown(2.0)} {BALANCE}" in text
    assert f"only at {shown(4.0)} {BALANCE};" in text
    assert "--write" in text


def test_a_run_takes_the_place_of_those_of_its_balance():
    runs = [{"ratios": {BALANCE: value}} for value in (2.0, 4.0, 8.0)]
    new = {"ratios": {BALANCE: 4.4}}
    assert guard.with_run(runs, new) == [runs[0], new, runs[2]]
    new = {"ratios": {BALANCE: 2.83}}
    assert guard.with_run(runs, new) == [runs[0], new, runs[1], runs[2]]


def test_what_is_kept_and_was_not_measured_is_said_and_does_not_fail():
    name = "int4: decode / bfloat16"
    now = {key: value for key, value in KEPT.items() if key != name}
    text, status = guard.compared(kept_of(KEPT), KIND, {"torch": [now]})
    assert status == 0
    assert f"not measured: torch {name}" in text


def test_a_kind_without_ratios_is_told_how_to_have_some():
    text, status = guard.compared({"Intel, AMX": kept_of(KEPT)[KIND]}, KIND, {"torch": [KEPT]})
    assert status == 0
    assert KIND in text
    assert "none of this kind" in text
    assert "--write" in text


def test_ratios_are_of_one_round():
    found = guard.ratios(one_round())
    assert found["float32: decode, batch 4 / 1"] == pytest.approx(2)
    assert found["float32: decode, batch 16 / 1"] == pytest.approx(4)
    assert found["int8: decode / bfloat16"] == pytest.approx(2)
    assert found["int4: decode / bfloat16"] == pytest.approx(4)
    assert found["float32: decode / read"] == found["bfloat16: decode / read"] == pytest.approx(1 / 0.1)
    assert found["float32: prompt / matmul"] == pytest.approx(2 * 109e6 * 128 / 0.5 / guard.PRODUCT, rel=0.01)
    numbers = 2 * 54.5e6 + 8192 * 2048  # of two layers and the head
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert guard.moved(dtype) == pytest.approx(size * numbers, rel=0.01)
        assert found[guard.BALANCES[dtype]] == guard.PRODUCT / guard.moved(dtype)
    slower = guard.ratios(one_round(**{"matmul bfloat16": 2.0, "read beside bfloat16": 3.0}))
    changed = {name: slower[name] / found[name] for name in found if slower[name] != found[name]}
    assert changed == {
        "bfloat16: decode / read": pytest.approx(3), "bfloat16: prompt / matmul": pytest.approx(2),
        "bfloat16: operations / byte": pytest.approx(1.5),
    }  # fmt: skip


def test_balances_that_both_runs_have_are_compared():
    """bfloat16 multiplies as fast or as slow as float32 does not: both count, where both were kept."""
    other = guard.BALANCES["bfloat16"]
    assert guard.is_near(KEPT, {BALANCE: 4.0, other: 30.0})
    assert not guard.is_near({BALANCE: 4.0, other: 50.0}, {BALANCE: 4.0, other: 30.0})
    assert not guard.is_near({BALANCE: 8.0, other: 30.0}, {BALANCE: 4.0, other: 30.0})


def test_what_is_kept_in_the_repository_can_be_compared():
    wanted = guard.ratios(one_round()).keys()
    for of_kind in json.loads(guard.KEPT.read_text()).values():
        assert of_kind.keys() == {"torch", "flax", "tf"}
        for run in (run for runs in of_kind.values() for run in runs):
            assert run["ratios"].keys() | {guard.BALANCES["bfloat16"]} == wanted
            assert all(value > 0 for value in run["ratios"].values())
