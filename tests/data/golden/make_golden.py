"""Make the golden values: transformers' own Mistral in true float64, on TINY and what differs from it.

    python3 -m venv oracle
    oracle/bin/pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6 ml_dtypes==0.6.0
    cd tests/data/golden && PYTHONPATH=../../.. ../../../oracle/bin/python make_golden.py [case ...]

Made with Python 3.11.7, CPU, and the versions above (safetensors 0.8.0 comes along); every file carries its
versions. The model code is transformers' word for word, but for its dtype words: `.double()` leaves float32
in RMSNorm, the rotary tables, softmax and two losses, so those functions are compiled again with float64 in
its place, and a dispatch mode then refuses any operation that returns another float. Windows per layer come
from its Ministral, because its Mistral ignores `layer_types`; the cases of mistral3 are its whole model, whose
vision tower sees no picture.

Keys of a file: config (our v4 JSON), architecture, seed, weights_crc, versions; the inputs by the names of
our arguments; `compare` [B, T], true where the outputs mean something (real tokens); the outputs by their
names, hidden_1 (after the first layer), inverse_frequency [H/2] and attention_factor in float64; and, where
it was run with the contract's angles too (float32 inverse frequency times float32 position, cos and sin in
float64), logits_float32_angles.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_rope_utils
from transformers.loss import loss_utils
from transformers.models.ministral import modeling_ministral
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.mistral import modeling_mistral

from conformance.weights import checksum, random_parameters
from mistral_core.config import MistralConfig, model_types
from mistral_core.config.presets import TINY

HERE = Path(__file__).parent
SEED = 20240
IGNORED = -100
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
INPUTS = ("input_ids", "attention_mask", "position_ids", "labels", "start_positions", "end_positions")


# The oracle in float64


def in_float64(owner, name: str) -> None:
    """Compile a function of transformers again with its float32 replaced by float64."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    changed = re.sub(r"torch\.float(32)?\b", "torch.float64", source).replace(".float()", ".double()")
    assert changed != source, f"{name} has no float32 any more: look whether the patch is still needed"
    made: dict[str, object] = {}
    exec(compile(changed, f"{name} in float64", "exec"), function.__globals__, made)
    setattr(owner, name, made[name])


def patch() -> None:
    """Make every place that computes in float32 whatever the model's dtype compute in float64."""
    for module, prefix in (
        (modeling_mistral, "Mistral"),
        (modeling_ministral, "Ministral"),
        (modeling_ministral3, "Ministral3"),
    ):
        rotary = getattr(module, f"{prefix}RotaryEmbedding")
        in_float64(getattr(module, f"{prefix}RMSNorm"), "forward")
        in_float64(rotary, "forward")
        in_float64(rotary, "compute_default_rope_parameters")
        in_float64(module, "eager_attention_forward")
    for kind in ("linear", "yarn", "llama3"):
        name = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind].__name__
        in_float64(modeling_rope_utils, name)
        modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind] = getattr(modeling_rope_utils, name)
    in_float64(loss_utils, "ForCausalLMLoss")
    in_float64(loss_utils, "ForTokenClassification")
    for task in ("ForCausalLM", "ForConditionalGeneration"):
        loss_utils.LOSS_MAPPING[task] = loss_utils.ForCausalLMLoss
    loss_utils.LOSS_MAPPING["ForTokenClassification"] = loss_utils.ForTokenClassification


class OnlyFloat64(TorchDispatchMode):
    """Refuse every operation that returns a floating-point tensor other than float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                assert tensor.dtype == torch.float64, f"{function} returned {tensor.dtype}"
        return result


def build(config: MistralConfig, architecture: str, parameters: dict[str, np.ndarray]):
    """transformers' model of this architecture with these weights, in the default dtype."""
    dtype = torch.get_default_dtype()
    state = {name: torch.from_numpy(array).to(dtype) for name, array in parameters.items()}
    if "mistral3" in config.extra:
        data = config.to_dict(dialect="v5", with_vision=True)
        foreign = transformers.Mistral3Config.from_dict(data, attn_implementation="eager")
        model = transformers.Mistral3ForConditionalGeneration(foreign).eval()
        renamed = {re.sub(r"^model\.", "model.language_model.", name): array for name, array in state.items()}
        missing, unexpected = model.load_state_dict(renamed, strict=False)
        assert not unexpected, unexpected
        of_text = {name for name in missing if "vision_tower" not in name and "multi_modal_projector" not in name}
        assert of_text == ({"lm_head.weight"} if config.tie_word_embeddings else set()), of_text
        return model
    data = json.loads(config.to_json_string())
    data.pop("model_type")
    prefix = model_types.TYPES[config.model_type].classes if config.layer_types is None else "Ministral"
    foreign = getattr(transformers, f"{prefix}Config").from_dict(data, attn_implementation="eager")
    model = getattr(transformers, architecture.replace("Mistral", prefix))(foreign).eval()
    assert model.config._attn_implementation == "eager"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    return model


def run_oracle(model, case: dict) -> dict[str, np.ndarray]:
    """The outputs of one case, by name."""
    inputs = {name: torch.from_numpy(case[name]) for name in INPUTS if name in case}
    if "attention_mask" in case and "position_ids" not in case:
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "document_ids" in case:  # transformers finds packed documents where positions start again
        inputs["position_ids"] = torch.from_numpy(case["packed_position_ids"])
    with torch.no_grad():
        out = model(**inputs, use_cache=False, output_hidden_states=True)
    names = [name for name in ("logits", "start_logits", "end_logits", "loss") if out.get(name) is not None]
    return {**{name: out[name].numpy() for name in names}, "hidden_1": out.hidden_states[1].numpy()}


def body_of(model):
    """The network that reads text."""
    return getattr(model.model, "language_model", model.model)


def contract_angles(model) -> None:
    """Give a model the contract's angles: both factors and the product rounded to float32."""
    rotary = body_of(model).rotary_emb
    frequency = rotary.inv_freq.to(torch.float32)

    def forward(x, position_ids):
        angle = (position_ids[..., None].to(torch.float32) * frequency).double()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling

    rotary.forward = forward


# The cases


def generator(name: str) -> np.random.Generator:
    """Random inputs of a case, by its name."""
    return np.random.Generator(np.random.PCG64(list(name.encode())))


def ids_and_mask(name: str, lengths: tuple[int, ...], side: str | None, T: int) -> dict[str, np.ndarray]:
    """Ids without the pad id, then padded; a mask where there is padding."""
    ids = generator(name).integers(1, TINY.vocab_size, (len(lengths), T))
    column = np.arange(T)
    starts = [T - n if side == "left" else 0 for n in lengths]
    mask = np.array([(column >= s) & (column < s + n) for s, n in zip(starts, lengths, strict=True)])
    case = {"input_ids": np.where(mask, ids, TINY.pad_token_id), "compare": mask}
    return case if side is None else {**case, "attention_mask": mask.astype(np.int64)}


def causal(name: str, lengths=(17, 17), side=None, T=17, *, mask=None, **changes) -> dict:
    """A case of MistralForCausalLM; labels are the ids, with -100 at pads and at a prompt.

    Also -100 where the slot before is padding or nothing: its logits would have to predict, and mean nothing.
    """
    case = ids_and_mask(name, lengths, side, T)
    if mask is not None:
        ids = np.where(mask, case["input_ids"], TINY.pad_token_id)
        case = {"input_ids": ids, "compare": mask, "attention_mask": mask.astype(np.int64)}
    predicted = case["compare"].copy()
    predicted[:, 1:] &= case["compare"][:, :-1]
    predicted[:, 0] = predicted[0, 2:5] = False
    labels = np.where(predicted, case["input_ids"], IGNORED)
    return {**case, "labels": labels, "config": TINY.replace(**changes), "architecture": "MistralForCausalLM"}


def holes(name: str) -> dict:
    """Padding inside the text. No window: transformers counts it in slots, we in real tokens."""
    mask = generator(name + " mask").random((3, 17)) < 0.7
    return causal(name, lengths=(17, 17, 17), mask=mask, sliding_window=None)


def spread(name: str, largest_gap: int, **changes) -> dict:
    """A causal case with gaps between positions, so that slow frequencies matter too; no window."""
    case = causal(name, **{"sliding_window": None, **changes})
    gaps = generator(name + " positions").integers(1, largest_gap + 1, case["input_ids"].shape)
    ones = np.ones_like(gaps)  # a mask, or transformers takes a gap for the start of a packed document
    return {**case, "position_ids": gaps.cumsum(axis=1), "attention_mask": ones, "contract": True}


def classes(name: str, kind: str, lengths=(17, 9, 13), side="right", *, masked=True, **changes) -> dict:
    """A case of a classification head, three rows."""
    case = ids_and_mask(name, lengths, side, 17)
    config = TINY.replace(**changes)
    random = generator(name + " labels")
    shape = (len(lengths), config.num_labels)
    labels = {
        "single": lambda: random.integers(0, config.num_labels, len(lengths)),
        "regression": lambda: random.normal(size=shape if config.num_labels > 1 else shape[0]),
        "multi": lambda: random.integers(0, 2, shape).astype(np.float64),
        "token": lambda: np.where(
            case["compare"] & (random.random(case["compare"].shape) < 0.7),
            random.integers(0, config.num_labels, case["compare"].shape), IGNORED,
        ),
    }  # fmt: skip
    if not masked:
        del case["attention_mask"]
    head = "TokenClassification" if kind == "token" else "SequenceClassification"
    return {**case, "labels": labels[kind](), "config": config, "architecture": f"MistralFor{head}"}


def question(name: str, lengths=(17, 17, 17), side=None) -> dict:
    """A case of the span head; the last row's end lies beyond the text and does not count.

    No loss where there is padding: transformers' runs over the scores of pads, which mean nothing.
    """
    case = ids_and_mask(name, lengths, side, 17)
    case |= {"config": TINY, "architecture": "MistralForQuestionAnswering"}
    spans = {"start_positions": np.array([3, 0, 12]), "end_positions": np.array([7, 8, 40])}
    return case | spans if side is None else case


def packed(name: str) -> dict:
    """Documents of 7, 4 and 6 tokens in one row, of 11 and 6 in the other: some shorter than the window."""
    case = causal(name)
    lengths = ((7, 4, 6), (11, 6))
    documents = np.array([np.repeat(np.arange(len(row)), row) for row in lengths])
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    return {**case, "document_ids": documents, "packed_position_ids": positions}


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
YARN_WIDE = {**YARN, "beta_fast": 8, "beta_slow": 0.1}
YARN_MIDDLE = {**YARN, "beta_fast": 6.0, "beta_slow": 0.2, "attention_factor": 0.8, "truncate": False}
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MINISTRAL3 = {
    "model_type": "ministral3",
    "rope_scaling": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 6, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
    "rope_theta": 1e4,
    "sliding_window": None,
}  # fmt: skip
FACTOR = {**MINISTRAL3["rope_scaling"], "mscale_all_dim": 0.0, "llama_4_scaling_beta": 0.7}
TIED = {
    "model_type": "mistral3", "image_token_index": 10, "spatial_merge_size": 2, "vision_feature_layer": -1,
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip
WHOLE = {**TIED, "tie_word_embeddings": False}
MIXED = ("sliding_attention", "full_attention", "sliding_attention")


def cases() -> dict[str, dict]:
    """Every case by its name, which is also its file's."""
    return {
        "window_5": causal("window_5") | {"contract": True},
        "window_none": causal("window_none", sliding_window=None),
        "window_1": causal("window_1", sliding_window=1),
        "window_17": causal("window_17", lengths=(18, 18), T=18, sliding_window=17),
        "layer_types": causal("layer_types", layer_types=MIXED),
        "theta_1e4": causal("theta_1e4", rope_theta=1e4),
        "tied": causal("tied", tie_word_embeddings=True),
        "mha": causal("mha", num_key_value_heads=6),
        "mqa": causal("mqa", num_key_value_heads=1),
        "left_padding": causal("left_padding", lengths=(17, 8, 3), side="left"),
        "right_padding": causal("right_padding", lengths=(17, 8, 3), side="right"),
        "holes": holes("holes"),
        "packed": packed("packed"),
        "positions": spread("positions", 40, rope_theta=1e4),
        "positions_far": spread("positions_far", 7000, rope_theta=1e6),
        "rope_linear": spread("rope_linear", 40, rope_theta=1e4, rope_scaling=LINEAR),
        "rope_yarn": spread("rope_yarn", 200, rope_theta=1e4, rope_scaling=YARN_WIDE),
        "rope_yarn_factor": spread("rope_yarn_factor", 200, rope_theta=1e4, rope_scaling=YARN_MIDDLE),
        "rope_yarn_mscale": spread("rope_yarn_mscale", 200, rope_theta=1e4, rope_scaling=YARN_MSCALE),
        "rope_llama3": spread("rope_llama3", 40, rope_theta=1e4, rope_scaling=LLAMA3),
        "ministral": causal("ministral", model_type="ministral", layer_types=MIXED),
        "ministral3": causal("ministral3", **MINISTRAL3) | {"contract": True},
        "ministral3_left": causal("ministral3_left", lengths=(17, 8, 3), side="left", **MINISTRAL3),
        "ministral3_window": causal("ministral3_window", **MINISTRAL3 | {"sliding_window": 5}),
        "ministral3_far": spread("ministral3_far", 700, **MINISTRAL3),
        "ministral3_factor": spread("ministral3_factor", 40, **MINISTRAL3 | {"rope_scaling": FACTOR}),
        "mistral3": causal("mistral3", sliding_window=None, extra={"mistral3": WHOLE}),
        "mistral3_tied": causal("mistral3_tied", tie_word_embeddings=True, extra={"mistral3": TIED}, **MINISTRAL3),
        "sequence_single": classes("sequence_single", "single"),
        "sequence_by_pad_id": classes("sequence_by_pad_id", "single", masked=False),
        "sequence_left": classes("sequence_left", "single", side="left"),
        "sequence_regression": classes("sequence_regression", "regression", num_labels=1),
        "sequence_regressions": classes("sequence_regressions", "regression", problem_type="regression"),
        "sequence_multi": classes("sequence_multi", "multi"),
        "token": classes("token", "token"),
        "question": question("question"),
        "question_padded": question("question_padded", (17, 9, 13), "right"),
    }  # fmt: skip


def make(name: str, case: dict) -> None:
    """Run one case and write its file."""
    config, architecture = case["config"], case["architecture"]
    parameters = random_parameters(config, architecture, seed=SEED)
    model = build(config, architecture, parameters)
    with OnlyFloat64():
        outputs = run_oracle(model, case)
    rotary = body_of(model).rotary_emb
    outputs["inverse_frequency"] = rotary.inv_freq.numpy()
    outputs["attention_factor"] = np.float64(rotary.attention_scaling)
    if case.get("contract"):
        contract_angles(model)
        outputs["logits_float32_angles"] = run_oracle(model, case)["logits"]
    if architecture != "MistralForCausalLM":
        del outputs["hidden_1"]
    for key, value in outputs.items():
        assert value.dtype == np.float64, key
        assert np.isfinite(value).all(), key
    inputs = {key: case[key] for key in (*INPUTS, "document_ids", "compare") if key in case}
    facts = {
        "config": config.to_json_string(with_vision="mistral3" in config.extra), "architecture": architecture,
        "seed": SEED, "weights_crc": checksum(parameters), "versions": VERSIONS,
    }  # fmt: skip
    np.savez_compressed(HERE / f"{name}.npz", allow_pickle=False, **facts, **inputs, **outputs)
    size = (HERE / f"{name}.npz").stat().st_size
    print(f"{name:22} {size / 1024:6.1f} KiB  loss {outputs.get('loss')}")


def main(names: list[str]) -> None:
    """Make the named cases, or all."""
    transformers.logging.set_verbosity_error()  # it warns where yarn's factor is not max / original positions
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    patch()
    every = cases()
    for name in names or every:
        make(name, every[name])


if __name__ == "__main__":
    main(sys.argv[1:])
