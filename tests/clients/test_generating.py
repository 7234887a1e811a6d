"""Who generates through our models: the same texts, scores and vectors as through transformers' own model."""

from __future__ import annotations

import re

import numpy as np
import outlines
import pytest
import torch
import transformers
import xgrammar
from langchain_huggingface import HuggingFacePipeline
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import mistral_torch

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
PROMPTS = ["Emma was", "It was a very long time"]


def pipe(model, tokenizer, **options):
    tokenizer.pad_token = tokenizer.eos_token
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=False, **options)


@pytest.mark.client("transformers", "pipeline('text-generation'), their tokenizer and ours, alone and in a batch")
def test_pipeline(model, their_model, tokenizer, their_tokenizer):
    expected = pipe(their_model, their_tokenizer)(PROMPTS, max_new_tokens=4)
    assert pipe(model, their_tokenizer)(PROMPTS, max_new_tokens=4) == expected
    assert pipe(model, tokenizer)(PROMPTS, max_new_tokens=4) == expected
    assert pipe(model, their_tokenizer)(PROMPTS, max_new_tokens=4, batch_size=2) == expected


@pytest.mark.client("langchain-huggingface", "HuggingFacePipeline.invoke and model_id")
def test_langchain(model, their_model, their_tokenizer):
    ours, theirs = (
        HuggingFacePipeline(pipeline=pipe(each, their_tokenizer, max_new_tokens=4)) for each in (model, their_model)
    )
    assert ours.invoke(PROMPTS[0]) == theirs.invoke(PROMPTS[0])
    assert ours.model_id == model.name_or_path


def harness(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, backend="causal")


@pytest.mark.client("lm-eval", "HFLM with our model: loglikelihood, generate_until, our tokenizer too")
def test_lm_evaluation_harness(model, their_model, tokenizer, their_tokenizer):
    asked = [Instance("loglikelihood", {}, (prompt, " happy"), index) for index, prompt in enumerate(PROMPTS)]
    until = {"until": [".", "\n"], "max_gen_toks": 6, "do_sample": False}
    written = [Instance("generate_until", {}, (prompt, until), index) for index, prompt in enumerate(PROMPTS)]
    reference = harness(their_model, their_tokenizer)
    expected = [likelihood for likelihood, _ in reference.loglikelihood(asked)]
    texts = reference.generate_until(written)
    for each in (their_tokenizer, tokenizer):
        harnessed = harness(model, each)
        assert [likelihood for likelihood, _ in harnessed.loglikelihood(asked)] == pytest.approx(expected, rel=1e-4)
        assert harnessed.generate_until(written) == texts


@pytest.mark.client("outlines", "from_transformers, a regular expression, their tokenizer")
def test_outlines(model, their_tokenizer):
    structured = outlines.from_transformers(model, their_tokenizer)
    for pattern in ("[a-z]{3}", "(yes|no)", "[0-9]{2}"):
        assert re.fullmatch(pattern, structured("Emma was", outlines.types.regex(pattern), max_new_tokens=12))


@pytest.mark.client("xgrammar", "contrib.hf.LogitsProcessor, a regular expression and a JSON schema, their tokenizer")
def test_xgrammar(model, their_tokenizer):
    info = xgrammar.TokenizerInfo.from_huggingface(their_tokenizer, vocab_size=model.config.vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    ids = their_tokenizer(PROMPTS[0], return_tensors="pt")
    for grammar, pattern in (
        (compiler.compile_regex("[a-z]{3}"), "[a-z]{3}"),
        (compiler.compile_json_schema('{"type": "boolean"}'), "true|false"),
    ):
        processor = xgrammar.contrib.hf.LogitsProcessor(grammar)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False, logits_processor=[processor])
        text = their_tokenizer.decode(out[0][ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert re.fullmatch(pattern, text.strip())


@pytest.mark.client("sentence-transformers", "our MistralModel under Transformer and Pooling: the vectors of theirs")
def test_sentence_transformers(path):
    vectors = []
    for kind in (mistral_torch.AutoModel, transformers.AutoModel):
        words = modules.Transformer(str(path))
        words.auto_model = kind.from_pretrained(path, dtype=torch.float32)
        pooled = modules.Pooling(words.auto_model.config.hidden_size, "lasttoken")
        words.tokenizer.pad_token = words.tokenizer.eos_token
        vectors.append(SentenceTransformer(modules=[words, pooled], device="cpu").encode(PROMPTS))
    assert np.allclose(*vectors, atol=1e-4)
