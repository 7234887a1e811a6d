"""One small random model with every head, and what pipelines are asked of it, here and in transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.generation import GenerationConfig
from mistral_core.weights import saving

LABELS = {
    "MistralForSequenceClassification": ("calm", "happy", "sad"),
    "MistralForTokenClassification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
}
ARCHITECTURES = {
    "text-generation": "MistralForCausalLM",
    "text-classification": "MistralForSequenceClassification",
    "token-classification": "MistralForTokenClassification",
    "question-answering": "MistralForQuestionAnswering",
}

EMMA = "Emma Woodhouse, handsome and clever, lived in Highbury; Mr. Knightley came from London."
TEXTS = ["It rained in London.", "She had been a friend and companion to Emma for sixteen years.", "Oh!"]
QUESTION = "Where did Emma live?"

CASES = [
    ("text-generation", EMMA, {"do_sample": False, "max_new_tokens": 8}),
    ("text-generation", TEXTS, {"do_sample": False, "max_new_tokens": 6, "return_tensors": True}),
    ("text-generation", EMMA, {"do_sample": False, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}),
    ("text-generation", EMMA, {"do_sample": False, "max_new_tokens": 5, "prefix": "1815: "}),
    ("text-classification", EMMA, {}),
    ("text-classification", TEXTS, {}),
    ("text-classification", EMMA, {"top_k": 2}),
    ("text-classification", TEXTS, {"top_k": None, "function_to_apply": "sigmoid"}),
    ("text-classification", EMMA, {"top_k": None, "function_to_apply": "none"}),
    ("text-classification", {"text": EMMA, "text_pair": "It rained."}, {}),
    ("token-classification", EMMA, {}),
    ("token-classification", TEXTS, {"ignore_labels": ["B-LOC"]}),
    ("token-classification", EMMA, {"ignore_labels": []}),
    *(
        ("token-classification", EMMA, {"aggregation_strategy": strategy, "ignore_labels": ignored})
        for strategy in ("simple", "first", "average", "max")
        for ignored in (["O"], [])
    ),
    *(
        ("question-answering", {"question": QUESTION, "context": EMMA}, {"align_to_words": False, **options})
        for options in ({}, {"max_answer_len": 3}, {"max_answer_len": 1, "top_k": 3})
    ),
]
"""(task, inputs, options); only those of which transformers makes sense for this tokenizer."""


def save(directory: Path) -> dict[str, Path]:
    """Write a checkpoint for each task, with the tokenizer of the embedded one; task -> path."""
    paths = {task: directory / task for task in ARCHITECTURES}
    for task, architecture in ARCHITECTURES.items():
        labels = dict(enumerate(LABELS.get(architecture, ("no", "yes"))))
        config = TINY.replace(
            vocab_size=2048, max_position_embeddings=600, num_labels=len(labels), id2label=labels, pad_token_id=None
        )
        arrays = random_parameters(config, architecture)
        saving.save_pretrained(
            paths[task],
            config,
            arrays.items(),
            architecture=architecture,
            generation_config=GenerationConfig.from_model_config(config),
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(TINY_CHECKPOINT) / name, paths[task] / name)
    return paths
