"""The page of a run: what the goals are and whether each is kept, the tables, and what was not measured and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.common import shown, table_row
from benchmarks.decode import prompt_operations, step_bytes

from .parts import Outcome, Part, Size, prompt_of

OF_READ, OF_TRANSFORMERS, OF_MATMUL = 0.8, 1.5, 0.6
"""Goals: decoding one row of the memory's limit and as a multiple of transformers', the prompt of the matmul rate."""


class Speed(NamedTuple):
    """What a program reached."""

    part: Part
    prefill: float
    """Tokens of the prompt a second, until the first new one."""
    decode: float
    """New tokens a second, of all rows."""
    of_read: float | None
    of_matmul: float | None
    row: dict[str, Any]


def limit(outcomes: Iterable[Outcome], what: str) -> float | None:
    """The largest rate of a kind that was measured; None where there is none."""
    return max((row["rate"] for row in rates(outcomes) if row["what"] == what), default=None)


def rates(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Every limit that was measured."""
    return [row for each in outcomes if each.part.group == "limits" for row in each.rows if "rate" in row]


def speeds(outcomes: list[Outcome], size: Size) -> list[Speed]:
    """What each program reached that decodes in bfloat16, beside the limits of the same run."""
    read, matmul, found = limit(outcomes, "read"), limit(outcomes, "matmul"), []
    for part, rows, *_ in outcomes:
        if part.group != "decode" or not rows:
            continue
        row, prompt = rows[-1], prompt_of(part, size)
        moved = step_bytes(size.config, dtype="bfloat16", batch=part.batch, length=prompt + size.new / 2)
        operations = prompt_operations(size.config, batch=part.batch, prompt=prompt)
        of_read = moved / row["step"] / read if read else None
        of_matmul = operations / row["first"] / matmul if matmul else None
        prefill, decode = part.batch * prompt / row["first"], part.batch / row["step"]
        found.append(Speed(part, prefill, decode, of_read, of_matmul, row))
    return found


def goals(found: list[Speed]) -> list[tuple[str, float, float | None]]:
    """(what is compared, the least, what was reached) of each of our compiled programs at batch 1."""
    alone = {
        each.part.options["program"]: each
        for each in found
        if each.part.batch == 1 and each.part.options["compile"] != "off"
    }
    peer, rows = alone.get("transformers"), []
    for name in ("torch", "flax"):
        own = alone.get(name)
        over = own.decode / peer.decode if own and peer else None
        rows += [
            (f"{name}: decode, batch 1, of the memory's limit", OF_READ, own and own.of_read),
            (f"{name}: decode, batch 1, times transformers", OF_TRANSFORMERS, over),
            (f"{name}: prompt, of the matmul rate", OF_MATMUL, own and own.of_matmul),
        ]
    return rows


def verdict(least: float, reached: float | None) -> str:
    """Whether a goal is kept."""
    return "not measured" if reached is None else "kept" if reached >= least else "short"


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    cells = [["" if cell is None else shown(cell) for cell in row] for row in rows]
    if not cells:
        return "Nothing was measured."
    return "\n".join([table_row(head), table_row(["---"] * len(head)), *map(table_row, cells)])


def decoded(found: list[Speed], size: Size) -> str:
    """The table of decoding."""
    head = ("program", "prompt", "prefill tok/s", "of matmul", "decode tok/s", "of read", "compile s", "peak GB")
    return table([*head, "graphs skipped"], [
        [
            each.part.name, prompt_of(each.part, size), each.prefill, each.of_matmul, each.decode, each.of_read,
            each.row["compile"], each.row["peak"] / 1e9, each.row.get("graphs skipped"),
        ]
        for each in found
    ])  # fmt: skip


def packed(outcomes: list[Outcome], size: Size) -> str:
    """The table of packed weights, beside the same model in bfloat16."""
    found = [(each.part, each.rows[-1]) for each in outcomes if each.part.group == "packed" and each.rows]
    plain = {part.options["program"]: row for part, row in found if part.options["weights"] == "bfloat16"}

    def cells(part: Part, row: dict[str, Any]) -> Iterator[Any]:
        own = plain.get(part.options["program"])
        yield part.name
        for key, tokens in (("first", size.short), ("step", 1)):
            yield from (tokens / row[key], own and own[key] / row[key])
        yield from (row["compile"], row["peak"] / 1e9)

    head = ["program", "prefill tok/s", "of bf16", "decode tok/s", "of bf16", "compile s", "peak GB"]
    return table(head, (cells(*each) for each in found))


def attended(outcomes: list[Outcome]) -> str:
    """The table of attention alone."""
    rows = [row for each in outcomes if each.part.group == "attention" for row in each.rows]
    head = ["implementation", "window", "tokens", "ms", "peak GB", ""]
    return table(head, [
        [
            row["implementation"], row["window"] or "none", row["length"],
            1e3 * row["seconds"] if "seconds" in row else None, row["peak"] / 1e9 if "peak" in row else None,
            row.get("problem"),
        ]
        for row in rows
    ])  # fmt: skip


def agreed(outcomes: list[Outcome]) -> str:
    """The table of conformance: a line for each attention implementation and dtype, then what failed."""
    counts: dict[tuple[str, ...], list[int]] = {}
    failures = []
    for each in outcomes:
        for row in each.rows if each.part.group == "conformance" else ():
            if "check" in row:
                count = counts.setdefault(tuple(row["subject"]), [0, 0, 0])
                count[0], count[1], count[2] = count[0] + 1, count[1] + row["compared"], count[2] + bool(row["failed"])
                failures += [f"- {'/'.join(row['subject'])}, {row['check']}: {text}" for text in row["failed"]]
    head = ["backend", "attention", "dtype", "checks", "comparisons", "checks that failed"]
    lines = table(head, [[*subject, *count] for subject, count in counts.items()])
    return lines + ("\n\n" + "\n".join(failures[:20]) if failures else "")


def missing(outcomes: list[Outcome]) -> Iterator[str]:
    """What was not measured, or not to the end, with the reason."""
    for part, rows, problem, *_ in outcomes:
        if problem:
            yield f"- {part.title}: {problem}"
        points = next((row["points"] for row in rows if "points" in row), None)
        done = sum("check" in row for row in rows)
        if points is not None and done < points:
            yield f"- {part.title}: {points - done} of {points} checks were not reached in its time"
        if part.group == "limits":
            yield from (f"- {row['what']}: {row['problem']}" for row in rows if "problem" in row)


def page(outcomes: list[Outcome], size: Size, facts: dict[str, Any], *, date: str, command: str) -> str:
    """All of it as Markdown."""
    found, config = speeds(outcomes, size), size.config
    units = {"read": ("GB/s", 1e9), "matmul": ("TFLOP/s", 1e12)}
    limits = "; ".join(
        f"{row['way']} {shown(row['rate'] / scale)} {unit}"
        for row in rates(outcomes)
        for unit, scale in [units[row["what"]]]
    )
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}"
    goal_rows = [[what, least, reached, verdict(least, reached)] for what, least, reached in goals(found)]
    return f"""# On a GPU

{facts["name"]}, {facts["memory"] / 1e9:.0f} GB; {versions}; {date}.
Repeat: `{command}`.

A model of {config.num_hidden_layers} layers of {config.hidden_size}, {heads},
{config.intermediate_size}, vocabulary {config.vocab_size}, no window, random weights in bfloat16, greedy, {size.new}
new tokens; each program in a process of its own, medians of {size.calls} calls after the one that compiles.
transformers has its static cache and compiled step.

## Goals

{table(["goal", "at least", "reached", ""], goal_rows)}

## Decoding

{decoded(found, size)}

"Of read" is what a step must read (weights, cache) over the fastest large read, "of matmul" the products of the prompt
over the fastest large product in bfloat16, both of this run: {limits or "not measured"}.

## Attention alone

Forward, one text, {heads}, bfloat16.

{attended(outcomes)}

## Packed weights

{min(size.packed_layers, config.num_hidden_layers)} layers, random codes, a prompt of {size.short} tokens.

{packed(outcomes, size)}

## Conformance

{agreed(outcomes)}

## Not measured

{chr(10).join(missing(outcomes)) or "Nothing: every part ran to its end."}
"""
