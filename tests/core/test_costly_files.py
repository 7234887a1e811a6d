"""Numbers in files that would cost gigabytes, minutes or the process: a typed error before anything is made of them."""

import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest

from mistral_core.data import TINY_CHECKPOINT as TINY
from mistral_core.disk import limits
from mistral_core.errors import CheckpointError, LimitExceededError, MistralError
from mistral_core.generation import GenerationConfig
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import checkpoint, manifest
from mistral_core.weights.opening import Checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "mistral_manifest.json").unlink()
    return tmp_path / "tiny"


def header(value: object) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def gguf(tensors: int, keys: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def named(text: str, *, kind: int, more: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + struct.pack("<I", kind) + more


def tree(names: int) -> bytes:
    entry = b'"%d":{"key_metadata":[{"key":"a%d"}],"value_metadata":{"value_type":"x"}}'
    return b'{"tree_metadata":{' + b",".join(entry % (i, i) for i in range(names)) + b"}}"


COSTLY = {
    "model.safetensors": (
        header(b'{"a":' * 200_000),
        header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,0]}}'),
        header({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**64]}}),
        header(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(300_000)) + b"}}"),
        (2**63).to_bytes(8, "little"),
    ),
    "model.safetensors.index.json": (
        json.dumps({"weight_map": {f"a{i}": f"{i}.safetensors" for i in range(2000)}}).encode(),
        json.dumps({"weight_map": {f"a{i}": "model.safetensors" for i in range(30_000)}}).encode(),
        b'{"weight_map":' * 100_000,
    ),
    "flax_model.msgpack": (
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\xdf\xff\xff\xff\xff\xa1a\xc0",
        b"\x81\xdb\x7f\xff\xff\xffa",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    ),
    "model.gguf": (
        gguf(2**63, 0),
        gguf(0, 2**63),
        gguf(0, 1, named("a", kind=9, more=struct.pack("<IQ", 4, 2**62))),
        gguf(0, 1, named("a", kind=8, more=struct.pack("<Q", 2**62))),
        gguf(0, 1, named("a", kind=9, more=struct.pack("<IQ", 9, 1) * 100_000)),
        gguf(1, 0, named("t", kind=2**31, more=b"")),
    ),
    "params/_METADATA": (b'{"tree_metadata":' * 100_000, tree(20_001)),
}
CASES = [pytest.param(name, data, id=f"{name}-{i}") for name, rows in COSTLY.items() for i, data in enumerate(rows)]


@pytest.mark.parametrize(("name", "data"), CASES)
def test_numbers_are_compared_before_anything_is_made_of_them(tmp_path, name, data):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    shutil.copy(TINY / "config.json", tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def test_the_keys_of_a_tree_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TREE_KEYS", 100)
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1a\xdf\0\0\xff\xff" + b"".join(
        b"\xa8%08d\x80" % i for i in range(0xFFFF)))  # fmt: skip
    with pytest.raises(LimitExceededError, match="101 keys in the tree; at most 100"):
        Checkpoint.open(tmp_path)


READERS = {
    "config.json": lambda path: Checkpoint.open(path).config,
    "mistral_manifest.json": lambda path: manifest.verify(path, "sizes"),
    "generation_config.json": GenerationConfig.from_pretrained,
    "tokenizer_config.json": MistralTokenizer.from_pretrained,
}
TEXTS = (
    b"[" * 10**6,
    b'{"a":' * 10**5,
    b'{"a":' * 17 + b"1" + b"}" * 17,
    b'{"a":' + b"9" * 10**5 + b"}",
    b'{"a":1e' + b"9" * 10**5 + b"}",
    b"{" + b",".join(b'"%d":1,"%d":1' % (i, i) for i in range(10**4)) + b"}",
)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_json_that_is_costly(tiny, name, text):
    (tiny / name).write_bytes(text)
    with pytest.raises(MistralError) as caught:
        READERS[name](tiny)
    assert len(str(caught.value)) < 1000


def test_a_long_list_of_what_is_missing_is_cut(tiny):
    data = json.loads((tiny / "config.json").read_text())
    changed = {**data, "num_hidden_layers": 1000, "layer_types": None, "sliding_window": None}
    (tiny / "config.json").write_text(json.dumps(changed))
    with pytest.raises(MistralError, match="and [0-9]+ more") as caught:
        checkpoint.load(tiny)
    assert len(str(caught.value)) < 20_000
