"""convert: what it refuses before it writes, what it reports, what travels along, and that nothing is lost."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tracemalloc
import types
import warnings

import numpy as np
import pytest
from samples import any_bits, assert_same, ordinary, read, write

from mistral_core import TINY, convert, errors
from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.weights import casting, difference, formats, loading, manifest
from mistral_core.weights.checkpoint import load
from mistral_core.weights.formats.sharded import Sharded
from mistral_core.weights.opening import Checkpoint

TEXTS = {
    "tokenizer.json": b'{"a": 1}',
    "tokenizer.model": b"\0spm",
    "generation_config.json": b"{}",
    "LICENSE": b"mine",
}


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", "hf", any_bits(), texts=TEXTS)


def refused(error, match, *arguments, **options):
    options = {"check_finite": False, **options}
    with pytest.raises(error, match=match):
        convert(*arguments, **options)


# What is refused before anything is written


def test_71_existing_output_before_any_weights_are_read(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Checkpoint, "open", lambda *_, **__: pytest.fail("opened"))
    refused(errors.OutputExistsError, "overwrite", source, tmp_path / "out", to="raw")


@pytest.mark.parametrize("where", [".", "inside", "..", "link", "file"])
def test_72_output_that_is_or_holds_the_input(source, tmp_path, where):
    before = tree(source)
    (tmp_path / "link").symlink_to(source)
    target = {"link": tmp_path / "link", "file": source}.get(where, source / where)
    given = source / "model.safetensors" if where == "file" else source
    refused(errors.ConversionError, "choose another directory", given, target, to="raw", overwrite=True)
    assert tree(source) == before


@pytest.mark.parametrize("name", ["out.gguf", "out.safetensors", "out.h5"])
def test_output_that_names_a_file(source, tmp_path, name):
    refused(errors.ConversionError, "names a file", source, tmp_path / name, to="raw")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"to": "onnx"}, errors.ConversionError, "to must be a format that is written, one of hf, raw,.* got 'onnx'"),
        ({"to": "hf-bin"}, errors.ConversionError, "a format that is written, .* got 'hf-bin'"),
        ({"to": "raw", "verify": "yes"}, errors.ConversionError, "one of off, hashes, logits"),
        ({"to": "raw", "dtype": "int8"}, errors.DtypeMismatchError, "bfloat16"),
        ({"to": "raw", "dtype": "Q8_0"}, errors.DtypeMismatchError, "gguf: Q8_0"),
        ({"to": "raw", "max_shard_size": "many"}, errors.ConversionError, "max_shard_size"),
        ({"to": "raw", "source_format": "raw"}, errors.CheckpointNotFoundError, "consolidated.safetensors"),
        ({"to": "raw", "source_format": "zip"}, errors.ConversionError, "format must be .* got 'zip'"),
    ],
)
def test_bad_arguments(source, tmp_path, options, error, match):
    refused(error, match, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_formats_in_one_directory_are_named(source, tmp_path):
    write(tmp_path / "raw", "raw", any_bits())
    shutil.copy(tmp_path / "raw" / "consolidated.safetensors", source)
    shutil.copy(tmp_path / "raw" / "params.json", source)
    refused(errors.ConversionError, "holds hf, raw; say which one", source, tmp_path / "out", to="flax-msgpack")
    for name in ("hf", "raw"):
        target = tmp_path / f"from {name}"
        convert(source, target, to="flax-msgpack", source_format=name, check_finite=False)
        assert_same(read(target), any_bits())
    assert Checkpoint.open(source).format == "hf"


@pytest.mark.parametrize(
    ("config", "to", "match"),
    [
        (TINY.replace(rope_scaling={"rope_type": "linear", "factor": 2.0}), "raw", "cannot say rope_scaling"),
        (
            TINY.replace(
                rope_scaling={
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                    "attention_factor": 1.25,
                }
            ),
            "raw",
            "cannot say rope_scaling",
        ),
    ],
)  # fmt: skip
def test_config_that_a_format_cannot_say(tmp_path, config, to, match):
    source = write(tmp_path / "source", "hf", any_bits(config), config)
    refused(errors.UnsupportedFeatureError, match, source, tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == ["source"]


def test_class_that_a_format_cannot_hold(tmp_path):
    name = "MistralForSequenceClassification"
    source = write(tmp_path / "source", "hf", any_bits(architecture=name), architecture=name)
    refused(errors.UnsupportedFeatureError, "language models only", source, tmp_path / "out", to="raw")


# Numbers


def test_78_a_narrower_dtype_is_refused_unless_allowed_and_then_counted(tmp_path):
    values = {name: np.ones(array.shape, np.float32) for name, array in any_bits().items()}
    values["model.norm.weight"][:4] = [1e30, 1e-30, 1.0001, 0.5]
    source = write(tmp_path / "source", "hf", values)
    refused(errors.LossyConversionError, "allow_lossy", source, tmp_path / "out", to="hf", dtype="float16")
    assert os.listdir(tmp_path) == ["source"]
    report = convert(source, tmp_path / "out", to="hf", dtype="float16", allow_lossy=True)
    assert set(report.losses) == {"model.norm.weight"}
    told = report.losses["model.norm.weight"]
    assert "3 numbers changed" in told
    assert "1 overflowed, 1 became zero" in told
    assert manifest.read(tmp_path / "out")["losses"] == report.losses


def test_a_narrower_dtype_that_changes_nothing_needs_no_permission(tmp_path):
    values = {name: np.ones(array.shape, np.float32) for name, array in any_bits().items()}
    report = convert(write(tmp_path / "a", "hf", values), tmp_path / "b", to="raw", dtype="bfloat16")
    assert report.dtypes == {"BF16": len(values)}
    assert not report.losses


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_82_wider_and_back_is_the_same_bits_nan_payloads_too(tmp_path, narrow):
    source = write(tmp_path / "a", "hf", any_bits(dtype=narrow))
    convert(source, tmp_path / "b", to="hf", dtype="float32", check_finite=False)
    convert(tmp_path / "b", tmp_path / "c", to="raw", dtype=narrow, check_finite=False)
    assert_same(read(tmp_path / "c"), any_bits(dtype=narrow))


def test_42_nan_is_named_with_its_place(tmp_path):
    values = {name: np.ones(array.shape, np.float32) for name, array in any_bits().items()}
    values["model.norm.weight"][3] = np.nan
    source = write(tmp_path / "source", "hf", values)
    with pytest.raises(errors.NonFiniteWeightsError, match=r"model\.norm\.weight, first at \[3\]"):
        convert(source, tmp_path / "out", to="raw")
    convert(source, tmp_path / "out", to="raw", check_finite=False)


@np.errstate(invalid="ignore")
def test_casts_agree_with_numpy_on_numbers_and_keep_nans():
    every = np.arange(65536, dtype=np.uint16)
    for kind in ("bfloat16", "float16"):
        narrow = casting.cast(np.zeros(1, np.float32), np.dtype(kind))[0].dtype
        array = every.view(narrow)
        wide, loss = casting.cast(array, np.dtype(np.float32))
        assert loss == casting.Loss()
        number = ~np.isnan(array)
        assert np.array_equal(wide[number], array.astype(np.float64)[number])
        assert np.isnan(wide[~number]).all()
        assert np.array_equal(casting.cast(wide, narrow)[0].view(np.uint16), every)
    assert np.isnan(casting.cast(np.array([0x7F800001], np.uint32).view(np.float32), np.dtype("float16"))[0]).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
def test_finite_is_told_from_the_bits(kind):
    dtype = casting.cast(np.zeros(1, np.float32), np.dtype(kind))[0].dtype
    largest = np.finfo(np.float32).max if kind in ("bfloat16", "float32") else 60000.0
    array = np.full(300_000, -largest if kind != "bfloat16" else -3e38, dtype)
    assert casting.is_finite(array)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        array[299_999] = bad
        assert not casting.is_finite(array)


# What travels along


@pytest.mark.parametrize("to", ["raw", "flax-msgpack", "tf-safetensors"])
def test_config_and_texts_come_back(source, tmp_path, to):
    config = TINY.replace(use_cache=False, id2label={0: "a", 1: "b", 2: "c"}, initializer_range=0.5, pad_token_id=3)
    source = write(tmp_path / "special", "hf", any_bits(config), config, texts=TEXTS)
    report = convert(source, tmp_path / "there", to=to, check_finite=False)
    assert report.texts == sorted(TEXTS)
    convert(tmp_path / "there", tmp_path / "back", to="hf", check_finite=False)
    for name in ("config.json", "model.safetensors", *TEXTS):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_edited_params_are_believed_before_the_manifest(source, tmp_path):
    target = tmp_path / "raw"
    convert(source, target, to="raw", check_finite=False)
    params = json.loads((target / "params.json").read_text())
    (target / "params.json").write_text(json.dumps({**params, "sliding_window": 3, "norm_eps": 0.01}))
    config = Checkpoint.open(target).config
    assert (config.sliding_window, config.rms_norm_eps) == (3, 0.01)
    assert config.initializer_range == TINY.initializer_range


def test_overwriting_leaves_only_what_is_no_checkpoint(source, tmp_path):
    target = tmp_path / "out"
    convert(source, target, to="raw", check_finite=False)
    (target / "notes.md").write_text("mine")
    convert(source, target, to="flax-msgpack", overwrite=True, check_finite=False)
    assert sorted(os.listdir(target)) == sorted(
        ["config.json", "flax_model.msgpack", "mistral_manifest.json", "notes.md", *TEXTS]
    )
    assert formats.detect(target) == ["flax-msgpack"]


def test_models_of_every_framework_load_every_format(backend, tmp_path):
    expected = dict(load(TINY_CHECKPOINT)[1])
    convert(TINY_CHECKPOINT, tmp_path / "raw", to="raw")
    model = backend.MistralForCausalLM.from_pretrained(tmp_path / "raw")
    assert_same(dict(model.named_arrays()), expected)
    assert model.config.sliding_window == 80


# The report and the manifest


def test_dry_run_writes_nothing_and_tells_what_would_be_done(source, tmp_path):
    report = convert(source, tmp_path / "out", to="flax-msgpack", dtype="float32", dry_run=True)
    assert os.listdir(tmp_path) == ["source"]
    assert (report.source_format, report.format, report.dtypes) == ("hf", "flax-msgpack", {"F32": 30})
    assert report.bytes == 4 * sum(array.size for array in any_bits().values())
    assert report.moves == {"now transposed": 22}
    assert "22 now transposed" in str(report)


def test_manifest_tells_the_source_and_the_same_digests_in_every_format(source, tmp_path):
    for to in ("raw", "flax-msgpack"):
        convert(source, tmp_path / to, to=to, check_finite=False)
    first, second = (manifest.read(tmp_path / to) for to in ("raw", "flax-msgpack"))
    digests = [{name: entry["sha256"] for name, entry in found["tensors"].items()} for found in (first, second)]
    assert digests[0] == digests[1]
    weights = source / "model.safetensors"
    assert first["source"]["format"] == "hf"
    assert first["source"]["files"][weights.name] == {
        "size": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def test_verification_off_hashes_nothing_and_says_so(source, tmp_path):
    convert(source, tmp_path / "out", to="raw", verify="off", check_finite=False)
    assert_same(read(tmp_path / "out"), any_bits())
    manifest.verify(tmp_path / "out", "sizes")
    with pytest.raises(errors.CorruptCheckpointError, match="without hashes"):
        manifest.verify(tmp_path / "out", "full")


def test_logits_of_source_and_result_are_equal_and_kept(tmp_path):
    report = convert(TINY_CHECKPOINT, tmp_path / "raw", to="raw", verify="logits")
    assert report.logits["max_abs_difference_from_source"] == 0
    assert manifest.read(tmp_path / "raw")["logits"] == report.logits
    again = convert(tmp_path / "raw", tmp_path / "flax", to="flax-safetensors", verify="logits")
    assert again.logits == report.logits


def test_64_logits_that_differ_stop_the_conversion(tmp_path, monkeypatch):
    opened, done = Sharded.open, []

    def read_as_half_split(self, path, config, *seen):
        checkpoint = opened(self, path, config, *seen)
        if self.name != "raw":
            return checkpoint
        if done:  # the first time it is read back for its hashes
            wrong = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
            monkeypatch.setitem(
                checkpoint.tensors,
                "model.layers.0.self_attn.q_proj.weight",
                wrong._replace(load=lambda *how: np.roll(wrong.load(*how), 1, axis=0)),
            )
        done.append(path)
        return checkpoint

    monkeypatch.setattr(Sharded, "open", read_as_half_split)
    with pytest.raises(errors.CorruptCheckpointError, match="logits differ"):
        convert(TINY_CHECKPOINT, tmp_path / "raw", to="raw", verify="logits")
    assert os.listdir(tmp_path) == []


def test_progress_is_told_bytes(source, tmp_path):
    told = []
    report = convert(
        source, tmp_path / "o", to="raw", check_finite=False, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Nothing is lost


def test_75_source_that_changes_is_noticed(source, tmp_path):
    def touch(done, total):
        os.utime(source / "model.safetensors")

    with pytest.raises(errors.CorruptCheckpointError, match="changed"):
        convert(source, tmp_path / "out", to="raw", check_finite=False, progress=touch)
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_70_interrupted_conversion_leaves_the_old_output(source, tmp_path, error):
    convert(source, tmp_path / "out", to="raw", check_finite=False)
    before = tree(tmp_path / "out")

    def stop(done, total):
        raise error

    with pytest.raises(error):
        convert(source, tmp_path / "out", to="hf", overwrite=True, check_finite=False, progress=stop)
    assert tree(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_73_second_converter_is_told_that_the_target_is_busy(source, tmp_path):
    def again(done, total):
        with pytest.raises(errors.OutputBusyError):
            convert(source, tmp_path / "out", to="raw", check_finite=False)
        raise errors.ConversionError("seen")

    with pytest.raises(errors.ConversionError, match="seen"):
        convert(source, tmp_path / "out", to="hf", check_finite=False, progress=again)


def test_74_missing_parents_are_made_and_a_file_on_the_way_is_an_error(source, tmp_path):
    convert(source, tmp_path / "a" / "b", to="raw", check_finite=False)
    (tmp_path / "file").write_text("")
    refused(errors.ConversionError, "cannot be written", source, tmp_path / "file" / "b", to="raw")


@pytest.mark.parametrize("name", ["with space", "Ümläut", "line\nbreak", "x" * 200])
def test_85_odd_names_of_directories(source, tmp_path, name):
    convert(str(source).encode(), os.fsencode(tmp_path / name), to="raw", check_finite=False)
    assert_same(read(tmp_path / name), any_bits())


def test_quiet(source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(source, tmp_path / "out", to="raw", check_finite=False)


@pytest.mark.parametrize("format", [row.name for row in formats.FORMATS.values() if row.written])
def test_what_is_moved_is_told(tmp_path, format):
    """The report of a conversion there says what that of one back undoes."""
    config = TINY.replace(head_dim=16)  # a power of four: MaxText's scale of the queries is exact
    source = write(tmp_path / "hf", "hf", ordinary(config), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = convert(source, tmp_path / "a", to=format)
    back = convert(tmp_path / "a", tmp_path / "b", to="hf", dry_run=True)
    undone = {move.removeprefix("no longer ").removesuffix(", queries scaled") for move in back.moves}
    assert undone == {move.removeprefix("now ") for move in there.moves}


def test_a_format_needs_no_more_than_it_promises(monkeypatch, tmp_path):
    """Another package's format has `open`, `check` and `create`; what is lossy or moves is optional."""
    one = formats.format_named("hf")
    plain = types.SimpleNamespace(open=one.open, check=one.check, create=one.create)
    point = types.SimpleNamespace(load=lambda: plain)
    monkeypatch.setitem(formats.FORMATS, "plain", formats.Row("plain", "another package's", (), None))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    report = convert(TINY_CHECKPOINT, tmp_path / "out", to="plain")
    assert (report.moves, report.losses) == ({}, {})


@pytest.mark.parametrize("format", [row.name for row in formats.FORMATS.values() if row.written])
def test_from_pretrained_reads_every_format(tmp_path, format):
    config = TINY.replace(head_dim=16)  # a power of four: MaxText's scale of the queries is exact
    source = write(tmp_path / "hf", "hf", ordinary(config), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(source, tmp_path / "model", to=format)
        loaded = loading.load_pretrained(tmp_path / "model", "MistralForCausalLM", verify="full")
    assert loaded.config.layer_windows == config.layer_windows
    assert_same(dict(loaded.tensors), ordinary(config))


# The command line


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_command_converts_verifies_compares(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "raw", "--to", "raw", "--allow-nonfinite", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["tensors"]) == ("raw", 30)
    assert run("verify", tmp_path / "raw") == 0
    assert "30 tensors: as written" in capsys.readouterr().out
    assert run("diff", source, tmp_path / "raw") == 0
    assert "30 of 30 tensors have the same bits" in capsys.readouterr().out
    assert run("info", tmp_path / "raw") == 0
    assert "raw" in capsys.readouterr().out


def test_command_tells_the_plan_and_writes_nothing(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "gone", "--to", "flax-msgpack", "--dry-run") == 0
    assert "22 now transposed" in capsys.readouterr().out
    assert not (tmp_path / "gone").exists()


def test_command_says_in_one_line_what_is_wrong(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "out", "--to", "raw") == 2
    error = capsys.readouterr().err
    assert error.startswith("mistral: ")
    assert "NaN or infinity" in error
    assert "--allow-nonfinite" in error


def test_command_finds_one_flipped_bit(source, tmp_path, capsys):
    convert(source, tmp_path / "raw", to="raw", check_finite=False)
    file = tmp_path / "raw" / "consolidated.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    assert run("verify", tmp_path / "raw") == 2
    assert "consolidated.safetensors (tensors 'model" in capsys.readouterr().err


def test_diff_tells_what_differs_and_where_layers_part(tmp_path, capsys):
    arrays = dict(load(TINY_CHECKPOINT, dtype="float32")[1])
    arrays["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    config = Checkpoint.open(TINY_CHECKPOINT).config
    write(tmp_path / "other", "hf", arrays, config, texts={"tokenizer.json": b"{}"})
    convert(TINY_CHECKPOINT, tmp_path / "same", to="flax-msgpack", dtype="float32")
    assert run("diff", tmp_path / "same", tmp_path / "other", "--layers", "Emma was") == 1
    out = capsys.readouterr().out
    assert "46 of 47 tensors have the same bits" in out
    assert "model.layers.2.mlp.up_proj.weight: 1 numbers differ, by at most 1 " in out
    assert "they part at layer 2" in out
    found = list(difference.tensors(Checkpoint.open(tmp_path / "same"), Checkpoint.open(TINY_CHECKPOINT)))
    assert all(item.changed == 0 and not item.same_bits for item in found)
    assert run("diff", TINY_CHECKPOINT, tmp_path / "same") == 1
    assert "the same numbers in other bits (bfloat16 and float32)" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["raw", "flax-msgpack", "gguf"])
def test_77_memory_is_that_of_the_largest_tensors(tmp_path, to):
    config = TINY.replace(vocab_size=40_000, num_hidden_layers=8)
    source = write(tmp_path / "source", "hf", ordinary(config), config)
    largest = 4 * config.vocab_size * config.hidden_size
    assert sum(path.stat().st_size for path in source.iterdir()) > 2 * largest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(source, tmp_path / "first", to=to)  # what is imported for it
        tracemalloc.start()
        convert(source, tmp_path / "out", to=to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + 8_000_000
