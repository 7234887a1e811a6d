"""`benchmarks.guard` on ratios that are made up: what fell is named, and nothing else is."""

from __future__ import annotations

import json

import pytest

from benchmarks import guard

KIND = "AMD, AVX-512, bfloat16, 2 cores"
KEPT = {"torch float32: decode / read": 0.8, "tf int4: decode / bfloat16": 2.0, "flax float32: decode / torch": 1.0}
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


def rounds_of(*each):
    """Rounds by name."""
    return {name: [one[name] for one in each] for name in each[0]}


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
    monkeypatch.setattr(guard.platform, "machine", lambda: "arm64")
    assert guard.kind("", 8) == "arm64, 8 cores"
    assert guard.kind("Features\t: fp sve bf16\n", 4) == "arm64, SVE, bfloat16, 4 cores"


def test_exactly_what_fell_by_more_than_the_share_is_named():
    just, more = 1 - guard.FELL + 0.001, 1 - guard.FELL - 0.001
    now = {name: value * just for name, value in KEPT.items()}
    assert guard.fallen(KEPT, now) == []
    name = "tf int4: decode / bfloat16"
    assert guard.fallen(KEPT, {**now, name: 2.0 * more}) == [(name, 2.0, 2.0 * more)]
    assert guard.fallen(KEPT, {name: value * 3 for name, value in KEPT.items()}) == []


def test_a_fall_is_said_with_both_numbers_and_the_status():
    name = "torch float32: decode / read"
    text, status = guard.compared({KIND: {"ratios": KEPT}}, KIND, rounds_of({**KEPT, name: 0.4}))
    assert status == 1
    assert f"fell by more than 15%: {name}: 0.8 -> 0.4" in text
    assert text.count("FELL") == text.count("fell by") == 1


def test_the_median_over_the_rounds_counts():
    name = "torch float32: decode / read"
    lower = {**KEPT, name: 0.1}
    rounds = rounds_of(KEPT, lower, KEPT)
    assert guard.medians(rounds) == KEPT
    assert guard.compared({KIND: {"ratios": KEPT}}, KIND, rounds)[1] == 0
    assert guard.compared({KIND: {"ratios": KEPT}}, KIND, rounds_of(lower, KEPT, lower))[1] == 1


def test_what_is_kept_and_was_not_measured_is_said_and_does_not_fail():
    name = "flax float32: decode / torch"
    text, status = guard.compared(
        {KIND: {"ratios": KEPT}}, KIND, rounds_of({k: v for k, v in KEPT.items() if k != name})
    )
    assert status == 0
    assert f"not measured: {name}" in text


def test_a_kind_without_ratios_is_told_how_to_have_some():
    text, status = guard.compared({"Intel, AMX": {"ratios": KEPT}}, KIND, rounds_of(KEPT))
    assert status == 0
    assert KIND in text
    assert "Intel, AMX" in text
    assert "--write" in text


def test_ratios_are_of_one_round():
    found = guard.ratios("flax", one_round())
    assert found["flax float32: decode, batch 4 / 1"] == pytest.approx(2)
    assert found["flax float32: decode, batch 16 / 1"] == pytest.approx(4)
    assert found["flax int8: decode / bfloat16"] == pytest.approx(2)
    assert found["flax int4: decode / bfloat16"] == pytest.approx(4)
    assert found["flax float32: decode / read"] == pytest.approx(2 * found["flax bfloat16: decode / read"])
    numbers = 2 * 54.5e6 + 8192 * 2048  # of two layers and the head
    assert found["flax float32: decode / read"] == pytest.approx(4 * numbers / 0.1 / 2**30, rel=0.01)
    assert found["flax float32: prompt / matmul"] == pytest.approx(2 * 109e6 * 128 / 0.5 / guard.PRODUCT, rel=0.01)
    slower = guard.ratios("flax", one_round(**{"matmul bfloat16": 2.0, "read beside bfloat16": 3.0}))
    changed = {name: slower[name] / found[name] for name in found if slower[name] != found[name]}
    assert changed == {
        "flax bfloat16: decode / read": pytest.approx(3), "flax bfloat16: prompt / matmul": pytest.approx(2)
    }  # fmt: skip


def test_what_is_kept_in_the_repository_can_be_compared():
    if not guard.KEPT.exists():
        pytest.skip("no ratios are kept yet")
    wanted = {name for backend in ("torch", "flax", "tf") for name in guard.ratios(backend, one_round())}
    for kept in json.loads(guard.KEPT.read_text()).values():
        assert kept["ratios"].keys() == wanted
        assert all(value > 0 for value in kept["ratios"].values())
