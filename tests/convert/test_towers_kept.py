"""Conversion of models that also see: the text part alone, or the whole with the other towers bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import warnings

import numpy as np
import pytest
from samples import any_bits, assert_same, bits, ordinary, stored
from wholes import CONFIG, NESTINGS, RAW_VISION, VISION, VISION_ENCODER, WHOLE, in_shards, write, write_raw

from mistral_core import convert, errors
from mistral_core.cli import main
from mistral_core.config import MistralConfig
from mistral_core.weights import formats, manifest
from mistral_core.weights.containers import tensor_file
from mistral_core.weights.opening import Checkpoint

TIED = CONFIG.replace(tie_word_embeddings=True)


def kept(source, target, to="hf", **options):
    return convert(source, target, to=to, keep_vision=True, check_finite=False, **options)


def all_stored(directory):
    """Name -> array of all files."""
    return {name: each for path in directory.glob("*.safetensors") for name, each in stored(path).items()}


# The whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_hf_to_hf(tmp_path, nesting, tied):
    nesting, config = NESTINGS[nesting], TIED if tied else CONFIG
    expected = write(tmp_path / "source", config, nesting)
    (tmp_path / "source" / "processor_config.json").write_text('{"patch_size": 14}')
    report = kept(tmp_path / "source", tmp_path / "out", max_shard_size="10KB")
    assert (report.kept, report.left_out) == ({"vision_tower": 3, "multi_modal_projector": 2}, {})
    vision = {nesting.vision + name: each for name, each in VISION.items()}
    assert_same(all_stored(tmp_path / "out"), vision | {f"language_model.{name}": expected[name] for name in expected})
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {**WHOLE, "architectures": [nesting.architecture]}
    assert {key: data[key] for key in wanted} == wanted
    assert set(data) - set(wanted) == {"text_config"}
    assert MistralConfig.from_dict(data) == Checkpoint.open(tmp_path / "source").config
    assert (tmp_path / "out" / "processor_config.json").read_text() == '{"patch_size": 14}'
    again = kept(tmp_path / "out", tmp_path / "again")
    assert_same(all_stored(tmp_path / "again"), all_stored(tmp_path / "out"))
    assert again.bytes == report.bytes == sum(each.nbytes for each in all_stored(tmp_path / "out").values())


def test_raw_to_raw(tmp_path):
    write_raw(tmp_path / "source")
    report = kept(tmp_path / "source", tmp_path / "out", to="raw")
    assert sum(report.kept.values()) == len(RAW_VISION)
    assert_same(all_stored(tmp_path / "out"), all_stored(tmp_path / "source"))
    source, out = (json.loads((tmp_path / name / "params.json").read_text()) for name in ("source", "out"))
    assert out == source
    assert out["vision_encoder"] == VISION_ENCODER


def test_only_the_text_part_is_cast(tmp_path):
    write(tmp_path / "source", tensors={f"language_model.{n}": each for n, each in ordinary(CONFIG).items()})
    kept(tmp_path / "source", tmp_path / "out", dtype="bfloat16")
    found = all_stored(tmp_path / "out")
    assert all(bits(found[name]) == bits(VISION[name]) for name in VISION)
    assert {str(each.dtype) for name, each in found.items() if name not in VISION} == {"bfloat16"}


def test_bytes_are_told_to_the_end(tmp_path):
    write(tmp_path / "source")
    told = []
    report = kept(tmp_path / "source", tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (report.bytes, report.bytes)


def test_the_command_and_its_report(tmp_path, capsys):
    write(tmp_path / "source")
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "hf", "--allow-nonfinite"]
    assert main([*arguments, "--keep-vision"]) == 0
    assert "kept as they are: 5 tensors of vision_tower, multi_modal_projector\n" in capsys.readouterr().out
    assert main([*arguments, "--overwrite"]) == 0
    assert "left out: 5 tensors of vision_tower, multi_modal_projector\n" in capsys.readouterr().out


# Nothing is lost on the way


def test_a_changed_byte_of_another_tower_is_found_and_named(tmp_path):
    write(tmp_path / "source")
    kept(tmp_path / "source", tmp_path / "out")
    manifest.verify(tmp_path / "out")
    tensor = Checkpoint.open(tmp_path / "out").skipped["vision_tower.patch_conv.weight"]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.start)
        byte = file.read(1)[0]
        file.seek(tensor.start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(errors.ChecksumMismatchError, match=r"vision_tower\.patch_conv\.weight"):
        manifest.verify(tmp_path / "out")


def at_a_tower(monkeypatch, act):
    """Let something happen where a tensor of another tower is written."""
    real = tensor_file.write

    def write_or_act(info, array):
        return act(real, info, array) if info.name in VISION else real(info, array)

    monkeypatch.setattr(tensor_file, "write", write_or_act)


def test_what_is_read_back_must_be_what_was_read(tmp_path, monkeypatch):
    write(tmp_path / "source")
    at_a_tower(monkeypatch, lambda real, info, array: real(info, np.zeros_like(array)))
    with pytest.raises(errors.CorruptCheckpointError, match=r"(vision_tower|multi_modal_projector).* reads back"):
        kept(tmp_path / "source", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_full_disk_leaves_the_old_directory(tmp_path, monkeypatch):
    write(tmp_path / "source")
    kept(tmp_path / "source", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_a_tower(monkeypatch, full)
    with pytest.raises(errors.NoSpaceError):
        kept(tmp_path / "source", tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name not in ("source", "out") and not name.endswith(".lock")]


# The text part alone


def test_without_the_option_the_text_part_is_written(tmp_path):
    expected = write(tmp_path / "source")
    (tmp_path / "source" / "processor_config.json").write_text("{}")
    report = convert(tmp_path / "source", tmp_path / "out", to="hf", check_finite=False)
    assert report.left_out == {"vision_tower": 3, "multi_modal_projector": 2}
    assert "left out: 5 tensors of vision_tower, multi_modal_projector" in str(report)
    assert_same(all_stored(tmp_path / "out"), expected)
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (data["model_type"], data["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert data["mistral3"]["vision_config"] == WHOLE["vision_config"]
    assert not (tmp_path / "out" / "processor_config.json").exists()


@pytest.mark.parametrize("to", ["raw", "hf"])
def test_raw_text_part(tmp_path, to):
    expected = write_raw(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", to=to, check_finite=False)
    found = Checkpoint.open(tmp_path / "out")
    assert_same({name: found.read(name) for name in found.tensors}, expected)
    assert not found.skipped
    if to == "raw":
        assert "vision_encoder" not in json.loads((tmp_path / "out" / "params.json").read_text())


@pytest.mark.parametrize("keep_vision", [False, True])
def test_a_shard_that_is_not_read_is_not_hashed(tmp_path, keep_vision):
    expected = write(tmp_path / "source")
    _, vision = in_shards(tmp_path / "source", [[f"language_model.{name}" for name in expected], VISION])
    convert(tmp_path / "source", tmp_path / "out", to="hf", check_finite=False, keep_vision=keep_vision)
    told = manifest.read(tmp_path / "out")["source"]["files"]
    assert [name for name, entry in told.items() if entry["sha256"] is None] == ([] if keep_vision else [vision.name])


# What is refused


@pytest.mark.parametrize("to", [name for name, row in formats.FORMATS.items() if row.written and name != "hf"])
def test_other_formats_hold_no_other_towers(tmp_path, to):
    write(tmp_path / "source")
    match = "have other names and another layout than those of raw" if to == "raw" else f"must be hf or raw, got '{to}'"
    with pytest.raises(errors.ConversionError, match=match):
        kept(tmp_path / "source", tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == ["source"]


def test_raw_to_hf(tmp_path):
    write_raw(tmp_path / "source")
    with pytest.raises(errors.ConversionError, match="vision tensors of raw have other names .* than those of hf"):
        kept(tmp_path / "source", tmp_path / "out")


def test_where_there_is_nothing_to_keep(tmp_path):
    write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "text", to="hf", check_finite=False)
    with pytest.raises(errors.ConversionError, match="must hold the towers of a model that also sees"):
        kept(tmp_path / "text", tmp_path / "out")


def test_packed_towers_are_not_kept(tmp_path):
    tensors = {f"language_model.{name}": each for name, each in any_bits(CONFIG).items()}
    write(tmp_path / "source", tensors={**tensors, "vision_tower.packed.weight": np.zeros((2, 2), np.int8)})
    with pytest.raises(errors.ConversionError, match=r"must be F64, F32, BF16, F16 to be kept, got I8"):
        kept(tmp_path / "source", tmp_path / "out")


# Read by transformers


@pytest.fixture(scope="module")
def transformers():
    found = pytest.importorskip("transformers")
    if not hasattr(found, "Ministral3ForCausalLM"):
        pytest.skip("a transformers that has no Ministral3")
    return found


ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 5,
    "max_position_embeddings": 80, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_SEEING = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def whole_of(transformers, directory, kind, tied):
    """A small model that also sees, as transformers saves it."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: getattr(CONFIG, name) for name in (*names, "num_key_value_heads", "head_dim", "pad_token_id")}
    text |= {"model_type": kind, "tie_word_embeddings": tied}
    text |= {"rope_parameters": ROPE, "max_position_embeddings": 80} if kind == "ministral3" else {}
    config = transformers.Mistral3Config(text_config=text, vision_config=_SEEING, tie_word_embeddings=tied)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_transformers_reads_the_whole_and_the_text_part(tmp_path, transformers, kind, tied):
    torch = pytest.importorskip("torch")
    from mistral_torch import MistralForCausalLM

    model = whole_of(transformers, tmp_path / "source", kind, tied)
    kept(tmp_path / "source", tmp_path / "out", max_shard_size="100KB", verify="logits")
    # of another type, transformers would build a model of its default sizes, which are 24 billion numbers
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral3"
    again, told = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told.values())
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = MistralForCausalLM.from_pretrained(tmp_path / "source")
    ours.save_pretrained(tmp_path / "text")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert type(theirs).__name__ == f"{kind.title()}ForCausalLM"
    assert not any(told.values())
    ids = torch.arange(24).reshape(2, 12) % 90 + 3
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(ours.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_transformers_reads_every_nesting(tmp_path, transformers):
    """Names of other towers stay what they are, also where they stand beside other ones than before."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    model = whole_of(transformers, tmp_path / "source", "ministral3", False)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    nested = {_in_memory(name): each for name, each in tensors.items()}
    save_file(nested, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    kept(tmp_path / "source", tmp_path / "out")
    names = set(all_stored(tmp_path / "out"))
    assert {name for name in nested if "vision_tower" in name} < names
    again, told = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told.values())
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in model.state_dict().items())


def _in_memory(name):
    if name.startswith("language_model.model."):
        return f"model.language_model.{name.removeprefix('language_model.model.')}"
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def test_a_report_is_data(tmp_path):
    write(tmp_path / "source")
    report = kept(tmp_path / "source", tmp_path / "out", dry_run=True)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["kept"] == {"vision_tower": 3, "multi_modal_projector": 2}
    assert not (tmp_path / "out").exists()
