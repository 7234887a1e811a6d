"""A reader holds one snapshot: what others put into the place of the directory is never mixed with what was opened."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import CorruptCheckpointError
from mistral_core.generation import GenerationConfig
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import checkpoint, loading
from mistral_core.weights.convert import convert
from mistral_core.weights.matching import canonical_names
from mistral_core.weights.opening import Checkpoint

FORMATS = ("hf", "raw", "flax-msgpack", "tf-h5", "keras", "orbax", "maxtext", "gguf")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The tiny checkpoint with other numbers, another theta and another generation config."""
    directory = tmp_path_factory.mktemp("other") / "other"
    config, tensors = checkpoint.load(TINY_CHECKPOINT)
    doubled = [(name, array * array.dtype.type(2)) for name, array in tensors]
    checkpoint.save(directory, config.replace(rope_theta=500000.0), doubled)
    (directory / "generation_config.json").write_text('{"temperature": 0.25}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY_CHECKPOINT / name).read_bytes())
    (directory / "mistral_manifest.json").unlink()
    return directory


@pytest.fixture(scope="module", params=FORMATS)
def both(request, other, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source, name in ((TINY_CHECKPOINT, "a"), (other, "b")):
            convert(source, folder / name, to=request.param, allow_lossy=True)
    return folder / "a", folder / "b"


@pytest.fixture
def swapped(both, tmp_path):
    """A copy of the first checkpoint, and what puts the second in its place."""
    shutil.copytree(both[0], tmp_path / "model")
    shutil.copytree(both[1], tmp_path / "new")

    def swap(*, keep: bool = True) -> None:
        (tmp_path / "model").rename(tmp_path / "was")
        (tmp_path / "new").rename(tmp_path / "model")
        if not keep:
            shutil.rmtree(tmp_path / "was")

    return tmp_path / "model", swap


def embedding(opened: Checkpoint) -> np.ndarray:
    return opened.read(canonical_names(opened.tensors)[EMBEDDING])


@pytest.mark.parametrize(
    "ask", [lambda it: it.config, embedding, lambda it: {name: read() for name, read in it.texts.items()}],
    ids=["config", "numbers", "texts"],
)  # fmt: skip
def test_an_opened_checkpoint_is_of_one_moment(both, swapped, ask):
    path, swap = swapped
    expected = str(ask(Checkpoint.open(both[0])))
    opened = Checkpoint.open(path, one_format=True)
    swap()
    try:
        assert str(ask(opened)) == expected
    except CorruptCheckpointError as error:  # params.json is not there: whether it was cannot be known any more
        assert opened.format in ("hf", "raw") and "replaced while it was read; load it again" in str(error)  # noqa: PT017, PT018
    assert str(ask(Checkpoint.open(path))) != expected


def test_numbers_are_read_though_the_directory_is_gone(both, swapped):
    path, swap = swapped
    opened = Checkpoint.open(path)
    swap(keep=False)
    try:
        assert embedding(opened).tobytes() == embedding(Checkpoint.open(both[0])).tobytes()
    except CorruptCheckpointError as error:  # a tree of many files is not kept open
        assert opened.format in ("orbax", "maxtext")
        assert "replaced while it was read; load it again" in str(error)  # noqa: PT017


def at(name: str, monkeypatch, swap) -> None:
    """Let the directory be replaced when a function is called for the first time."""
    owner, _, function = name.rpartition(".")
    kind = {"Checkpoint": Checkpoint, "checkpoint": checkpoint, "GenerationConfig": GenerationConfig}[owner]
    real, swaps = getattr(kind, function), [swap]

    def swapping(*arguments, **options):
        if swaps:
            swaps.pop()(keep=False)
        return real(*arguments, **options)

    monkeypatch.setattr(kind, function, swapping)


@pytest.mark.parametrize("both", ["hf"], indirect=True)
@pytest.mark.parametrize("name", ["Checkpoint.open", "checkpoint.load", "GenerationConfig.from_pretrained"])
def test_a_load_is_of_one_moment(swapped, monkeypatch, name):
    path, swap = swapped
    at(name, monkeypatch, swap)
    loaded = loading.load_pretrained(path, "MistralForCausalLM")
    (first,) = (array for key, array in loaded.tensors if key == EMBEDDING)
    is_new = loaded.config.rope_theta == 500000.0
    assert (loaded.generation_config.temperature == 0.25) is is_new
    own = Checkpoint.open(path if is_new else TINY_CHECKPOINT)
    assert first.tobytes() == embedding(own).tobytes()


@pytest.mark.parametrize("both", ["hf"], indirect=True)
def test_a_tokenizer_is_of_one_moment(swapped, monkeypatch):
    path, swap = swapped
    from mistral_core.text import sources

    real, swaps = sources.found_in, [swap]

    def found_in(root):
        found = real(root)
        while swaps:
            swaps.pop()(keep=False)
        return found

    monkeypatch.setattr(sources, "found_in", found_in)
    assert MistralTokenizer.from_pretrained(path).encode("a b") == MistralTokenizer.from_pretrained(
        TINY_CHECKPOINT
    ).encode("a b")
    assert MistralConfig.from_pretrained(path).rope_theta == 500000.0
