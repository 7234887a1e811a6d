"""Where transformers' own tests of its Flax and TensorFlow Mistral differ from ours: for those of 4.52.4.

Patterns of test names and of skipping messages, each with its reason. Adapted beforehand: the config, from which fields
of other models are left out; Keras, which is 3 here; the auto classes of TensorFlow, which are ours.
"""

from __future__ import annotations

from peers_suite import Reasons

_PARAMS = (
    "params are one flat dict of Hugging Face names to arrays [out, in], the same names in every framework; the suite "
    "flattens and prefixes nested dicts of kernels."
)
_OPTIONS = (
    "generation_config.json is written for every class, so that nothing is lost when another head is put on the "
    "checkpoint."
)
_PUBLISHED = "It loads published weights from the hub and expects their numbers and texts; there is no hub here."
_BERT = "It is about transformers' own BERT from the hub."
_FLAX = "FlaxMistralModelTest::test_"
_TF = "TFMistralModelTest::test_"

FLAX = Reasons(
    different={
        f"{_FLAX}from_pretrained_save_pretrained": _OPTIONS,
        f"{_FLAX}from_pretrained_with_no_automatic_init": _PARAMS,
        f"{_FLAX}no_automatic_init": _PARAMS,
        f"{_FLAX}save_load_from_base": _PARAMS,
        f"{_FLAX}save_load_to_base": _PARAMS,
        f"{_FLAX}naming_convention": "The module inside is an nnx.Module, mistral_flax.MistralModel and its heads; "
        "FlaxMistralModule was a Linen one, which flax.nnx.bridge makes of ours.",
    },
    not_applicable={
        f"{_FLAX}checkpoint_sharding_*": _BERT,
        f"{_FLAX}model_from_pretrained": _PUBLISHED,
        "FlaxMistralIntegrationTest::*": _PUBLISHED,
    },
    skipped={},
)

TF = Reasons(
    different={
        f"{_TF}Mistral_sequence_classification_model_for_multi_label": "Labels of many classes are [B, C]; the suite "
        "gives [B], which is an InputError.",
        f"{_TF}compile_tf_model": "Keras 3 writes .keras files and model.export SavedModels; the suite has Keras save "
        "into a directory.",
        f"{_TF}config": "A hidden size that is no multiple of the heads is refused by the config where head_dim is not "
        "given, and so is a field that nobody reads.",
        f"{_TF}dataset_conversion": "prepare_tf_dataset is refused with advice: dataset.to_tf_dataset does it.",
        f"{_TF}load_with_mismatched_shapes": "Tensors of other shapes are an error; num_labels or "
        "resize_token_embeddings make a head or a vocabulary of another size.",
        f"{_TF}resize_token_embeddings": "A vocabulary that is too small for pad_token_id is a ConfigError.",
        f"{_TF}save_load": _OPTIONS,
        f"{_TF}saved_model_creation": "saved_model=True is refused with advice: model.export writes a SavedModel.",
    },
    not_applicable={"TFMistralIntegrationTest::*": _PUBLISHED},
    skipped={
        "This test always passes on CPU.": "Ids out of range are an InputError in every eager call.",
        "`tf2onnx` broke with TF 2.13": "The suite skips it for everybody.",
        "Vocab resizing is not supported": "Not by transformers' class; tests/backends/test_tf_keras.py resizes ours.",
    },
)

REASONS = {"flax": FLAX, "tf": TF}
