"""A to B to A gives back every bit, for every ordered pair of lossless formats.

A pair is a read of one format and a write of another, through names and arrays that are no format's: each format beside
its two neighbours in the list, and before two further ones, stands for the other pairs.
"""

import itertools

import pytest
from crossed import crossed
from samples import CAUSAL, CONFIGS, INEXPRESSIBLE, any_bits, assert_same, ordinary, read, write

from mistral_core import TINY, convert, errors
from mistral_core.parameters import HEADS
from mistral_core.weights import formats
from mistral_core.weights.opening import Checkpoint

FORMATS = tuple(name for name, row in formats.FORMATS.items() if row.written)
ANY_CLASS = tuple(name for name in FORMATS if name not in ("raw", "gguf", "keras-hub", "maxtext"))
# a window of GGUF's is told by a warning, MaxText divides queries by sqrt(head_dim)
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window")


def same_config(path, config):
    found = Checkpoint.open(path).config
    assert found.replace(dtype=None) == config.replace(architectures=found.architectures)


def pairs():
    """Every ordered pair, slow those of formats that are not one or four apart."""
    for first, second in itertools.permutations(FORMATS, 2):
        apart = (FORMATS.index(second) - FORMATS.index(first)) % len(FORMATS)
        yield pytest.param(first, second, marks=() if apart in (1, 4) else pytest.mark.slow)


@pytest.mark.parametrize(("first", "second"), list(pairs()))
def test_82_and_83_there_and_back(tmp_path, first, second):
    config = TINY.replace(head_dim=16, use_cache=False)  # a power of four: MaxText's scale is exact
    arrays = ordinary(config) if "maxtext" in (first, second) else any_bits(config)
    write(tmp_path / "a", first, arrays, config)
    convert(tmp_path / "a", tmp_path / "b", to=second, check_finite=False)
    convert(tmp_path / "b", tmp_path / "c", to=first, check_finite=False)
    assert formats.detect(tmp_path / "b") == [second]
    assert_same(read(tmp_path / "c"), arrays)
    same_config(tmp_path / "c", config)


@pytest.mark.sweep  # each format's own tests write and read every config
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "maxtext"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_in_every_format(tmp_path, name, format):
    config = CONFIGS[name]
    source = write(tmp_path / "hf", "hf", any_bits(config), config)
    if name in INEXPRESSIBLE.get(format, ()):
        with pytest.raises(errors.UnsupportedFeatureError):
            convert(source, tmp_path / "there", to=format, check_finite=False)
        assert not (tmp_path / "there").exists()
        return
    convert(source, tmp_path / "there", to=format, check_finite=False, max_shard_size="20KB")
    convert(tmp_path / "there", tmp_path / "back", to="hf", check_finite=False)
    assert_same(read(tmp_path / "back"), any_bits(config))
    same_config(tmp_path / "back", config)


@pytest.mark.parametrize(("format", "architecture"), crossed(ANY_CLASS, *(name for name in HEADS if name != CAUSAL)))
def test_every_class_where_it_can_be_held(tmp_path, format, architecture):
    config = TINY.replace(num_labels=5)
    arrays = any_bits(config, "float16", architecture)
    source = write(tmp_path / "hf", "hf", arrays, config, architecture=architecture)
    convert(source, tmp_path / "there", to=format, check_finite=False)
    convert(tmp_path / "there", tmp_path / "back", to="hf", check_finite=False)
    assert_same(read(tmp_path / "back"), read(source))
    assert Checkpoint.open(tmp_path / "back").config.architectures == (architecture,)
