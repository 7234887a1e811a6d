"""The examples of the Hugging Face documentation of Mistral, 4.34 to 4.56, with their imports changed.

From https://huggingface.co/docs/transformers/v4.34.0/en/model_doc/mistral to v4.56.2 and its pages on the Auto classes.
Names of the hub lead to the embedded checkpoint, "cuda" to the CPU, and sizes are cut. What is not here says so.
"""

from __future__ import annotations

import importlib
import warnings

import pytest
from local_hub import serving

from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import MissingExtraError, MissingNameError, UnsupportedFeatureError
from mistral_core.parameters import shapes
from mistral_core.weights.loading import load
from mistral_core.weights.saving import save

REPOSITORIES = (
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "mistralai/Mistral-7B-Instruct-v0.3",
)
TENSORS = {"mistral_torch": "pt", "mistral_flax": "jax", "mistral_tf": "tf"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The embedded checkpoint with the first of its layers, as a hub has it."""
    config, tensors = load(TINY_CHECKPOINT)
    config = config.replace(num_hidden_layers=1)
    kept = [(name, array) for name, array in tensors if name in shapes(config)]
    others = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    directory = tmp_path_factory.mktemp("docs") / "model"
    save(directory, config, kept, other_files={name: (TINY_CHECKPOINT / name).read_bytes() for name in others})
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def run(files, monkeypatch, tmp_path):
    """A function that runs an example in a package and returns what the example named."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with serving(files, REPOSITORIES, monkeypatch) as server:

        def run(source, package="mistral_torch"):
            source = source.replace("from transformers import", f"from {package} import")
            source = source.replace('"cuda"', '"cpu"').replace(
                'return_tensors="pt"', f'return_tensors="{TENSORS[package]}"'
            )
            names = {"to_numpy": importlib.import_module(f"{package}.arrays").to_numpy}
            exec(compile(source, "example", "exec"), names)
            return names

        run.server = server
        yield run


GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda"
model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1"{options})
tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")

prompt = "My favourite condiment is"
model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
{placed}
generated_ids = model.generate(**model_inputs, max_new_tokens=10{sampling})
text = tokenizer.batch_decode(generated_ids)[0]
"""


def generate(*, options="", placed="", sampling=""):
    return GENERATE.format(options=options, placed=placed, sampling=sampling)


@pytest.mark.feature("generate: greedy, sampling, beams")
@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
def test_generate(run, backend):
    text = run(generate(), backend.__name__)["text"]
    assert text.startswith("<s> My favourite condiment is")
    assert len(text) > len("My favourite condiment is")


LOAD = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1", revision="v0.2", cache_dir="here", {more})
"""


def test_hub_arguments_reach_the_hub(run, backend, tmp_path):
    run(LOAD.format(more='token="hf_secret"'), backend.__name__)
    requests = run.server.requests
    assert {authorization for _, path, authorization in requests if "v0.2" in path} == {"Bearer hf_secret"}
    assert (tmp_path / "here").is_dir()
    asked = len(requests)
    run(LOAD.format(more="local_files_only=True"), backend.__name__)
    assert len(requests) == asked


def test_generate_on_a_device(run):
    assert run(generate(placed="model.to(device)"))["text"] == run(generate())["text"]


@pytest.mark.parametrize("sampling", ["do_sample=True, temperature=0.7, top_p=0.9", "do_sample=False, num_beams=1"])
def test_decoding_strategies(run, backend, sampling):
    text = run(generate(sampling=", " + sampling), backend.__name__)["text"]
    assert text.startswith("<s> My favourite condiment is")


STREAM = """
from transformers import AutoModelForCausalLM, AutoTokenizer, {name}
from threading import Thread

tok = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1")
inputs = tok(["An increasing sequence: one,"], return_tensors="pt")
streamer = {name}(tok{skip})
"""
PRINTED = "_ = model.generate(**inputs, streamer=streamer, max_new_tokens=20)"
ITERATED = """
thread = Thread(target=model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=20))
thread.start()
text = ""
for new_text in streamer:
    text += new_text
thread.join()
"""
WHOLE = "whole = tok.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True)"


@pytest.mark.feature("Streaming: stream, TextStreamer, TextIteratorStreamer")
def test_the_streamers(run, backend, capsys):
    source = STREAM.format(name="TextIteratorStreamer", skip="") + ITERATED + WHOLE
    names = run(source, backend.__name__)
    text, whole = names["text"], names["whole"]
    run(STREAM.format(name="TextStreamer", skip="") + PRINTED, backend.__name__)
    assert capsys.readouterr().out.rstrip("\n") == text
    assert text == whole
    source = STREAM.format(name="TextIteratorStreamer", skip=", skip_prompt=True, timeout=60") + ITERATED
    assert "An increasing sequence: one," + run(source, backend.__name__)["text"] == whole


@pytest.mark.parametrize("options", [', device_map="auto"', ", device_map={'': 'cpu'}", ', torch_dtype="auto"'])
def test_device_map_and_dtype(run, backend, options):
    names = run(generate(options=options), backend.__name__)
    assert "CPU" in str(names["model"].device).upper()
    assert names["model"].config.dtype == "bfloat16"


def test_a_dtype_of_torch(run, backend):
    names = run("import torch\n" + generate(options=", torch_dtype=torch.float16"), backend.__name__)
    assert names["model"].config.torch_dtype == "float16"


@pytest.mark.parametrize("option", ["use_flash_attention_2=True", 'attn_implementation="flash_attention_2"'])
def test_flash_attention(run, option):
    source = "import torch\n" + generate(options=f', torch_dtype=torch.float16, {option}, device_map="auto"')
    with pytest.raises(MissingExtraError, match="pip install flash-attn"):
        run(source)
    for package in ("mistral_flax", "mistral_tf"):
        with pytest.raises(UnsupportedFeatureError, match="must be one of eager.*, got 'flash_attention_2'"):
            run(source, package)


def test_sdpa(run):
    run("import torch\n" + generate(options=', dtype=torch.bfloat16, attn_implementation="sdpa", device_map="auto"'))


CHAT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-Instruct-v0.2", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-Instruct-v0.2")
messages = [{"role": "user", "content": "What is your favourite condiment?"}]
model_inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to("cuda")
generated_ids = model.generate(model_inputs, max_new_tokens=4, do_sample=True)
text = tokenizer.batch_decode(generated_ids)[0]
"""


def test_a_chat(run, backend):
    # arrays of JAX and TensorFlow are where they are
    source = CHAT if backend.__name__ == "mistral_torch" else CHAT.replace('.to("cuda")', "")
    names = run(source, backend.__name__)
    assert names["text"].startswith("<s> [INST] What is your favourite condiment? [/INST]")


QUANTIZED = """
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype="torch.float16",
)
model = AutoModelForCausalLM.from_pretrained(
    "mistralai/Mistral-7B-Instruct-v0.3", quantization_config=GIVEN, device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-Instruct-v0.3")
messages = [{"role": "user", "content": "What is your favourite condiment?"}]
model_inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to("cuda")
generated_ids = model.generate(model_inputs, max_new_tokens=4, do_sample=True)
text = tokenizer.batch_decode(generated_ids)[0]
"""
"""Of 4.40 and later, which gives `True` and leaves the config that it made unused."""


@pytest.mark.parametrize("given", ["quantization_config", "True"])
def test_four_bits(run, backend, given):
    source = QUANTIZED.replace("GIVEN", given)
    source = source if backend.__name__ == "mistral_torch" else source.replace('.to("cuda")', "")
    names = run(source, backend.__name__)
    assert {part.matrix.kind for _, part in names["model"].packed_parts()} == {"nf4"}
    assert "What is your favourite condiment?" in names["text"]


def test_other_ways_to_quantize_say_what_to_do(run, backend):
    with pytest.raises(MissingNameError, match=r"GPTQConfig: its nearest scheme is .*quantization='int4'"):
        run("from transformers import GPTQConfig", backend.__name__)
    with pytest.raises(UnsupportedFeatureError, match=r"'awq' is not made here; its nearest scheme"):
        run(generate(options=", quantization_config={'quant_method': 'awq', 'bits': 4}"), backend.__name__)


def test_pipelines_say_what_to_do(run, backend):
    with pytest.raises(MissingNameError, match=r"pipeline: it is in mistral_core"):
        run("from transformers import pipeline", backend.__name__)
    assert not hasattr(backend, "something_nobody_has")


CONFIGURATION = """
from transformers import MistralModel, MistralConfig

configuration = MistralConfig(**sizes)
model = MistralModel(configuration)
configuration = model.config
"""


def test_a_model_of_a_configuration(run, backend):
    sizes = {name: getattr(TINY, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "num_hidden_layers", "vocab_size", "head_dim")}  # fmt: skip
    names = run(f"sizes = {sizes}\n" + CONFIGURATION, backend.__name__)
    assert names["configuration"].hidden_size == TINY.hidden_size
    assert names["configuration"].sliding_window == 4096


FORWARD = """
from transformers import AutoTokenizer, MistralForCausalLM

model = MistralForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1")
tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")

prompt = "Hey, are you conscious? Can you talk to me?"
inputs = tokenizer(prompt, return_tensors="pt")

generate_ids = model.generate(inputs.input_ids, max_length=30)
text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
"""


def test_the_forward_example(run, backend):
    names = run(FORWARD, backend.__name__)
    assert names["generate_ids"].shape == (1, 30)
    assert names["text"].startswith("Hey, are you conscious? Can you talk to me?")


CLASSIFY = """
from transformers import AutoTokenizer, AutoModelForSequenceClassification

tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = AutoModelForSequenceClassification.from_pretrained("mistralai/Mistral-7B-v0.1", num_labels=2)
inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
logits = model(**inputs).logits
predicted_class_id = int(to_numpy(logits).argmax())
label = model.config.id2label[predicted_class_id]

num_labels = len(model.config.id2label)
model = AutoModelForSequenceClassification.from_pretrained(
    "mistralai/Mistral-7B-v0.1", num_labels=num_labels, problem_type="multi_label_classification"
)
loss = model(**inputs, labels=[[1.0] * num_labels]).loss
"""

TOKENS = """
from transformers import AutoTokenizer, AutoModelForTokenClassification

tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = AutoModelForTokenClassification.from_pretrained("mistralai/Mistral-7B-v0.1", id2label={0: "O", 1: "ORG"})
inputs = tokenizer("A company based in Paris and New York", add_special_tokens=False, return_tensors="pt")
predicted = to_numpy(model(**inputs).logits).argmax(-1)
label = model.config.id2label[int(predicted[0][0])]
loss = model(**inputs, labels=predicted).loss
"""

ANSWER = """
from transformers import AutoTokenizer, AutoModelForQuestionAnswering

tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = AutoModelForQuestionAnswering.from_pretrained("mistralai/Mistral-7B-v0.1")
question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
inputs = tokenizer(question, text, return_tensors="pt")
outputs = model(**inputs)
answer_start_index = int(to_numpy(outputs.start_logits).argmax())
answer_end_index = int(to_numpy(outputs.end_logits).argmax())
label = tokenizer.decode(inputs.input_ids[0, answer_start_index : answer_end_index + 1])
loss = model(**inputs, start_positions=[14], end_positions=[15]).loss
"""


@pytest.mark.parametrize("source", [CLASSIFY, TOKENS, ANSWER], ids=["sequence", "token", "question"])
def test_the_other_heads(run, backend, source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new heads
        names = run(source, backend.__name__)
    assert isinstance(names["label"], str)
    assert float(names["to_numpy"](names["loss"])) > 0


FLAX = """
from transformers import AutoTokenizer, Flax{name}

tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = Flax{name}.from_pretrained("mistralai/Mistral-7B-v0.1")
inputs = tokenizer("Hello, my dog is cute", return_tensors="{tensors}")
outputs = model(**inputs)
"""

TENSORFLOW = """
from transformers import AutoTokenizer, TF{name}

tokenizer = AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1")
model = TF{name}.from_pretrained("mistralai/Mistral-7B-v0.1")
inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
outputs = model(inputs)
"""


@pytest.mark.feature("transformers 4.x classes: FlaxMistral*, TFMistral*")
@pytest.mark.parametrize("tensors", ["jax", "np"])
def test_the_flax_classes(run, tensors):
    outputs = run(FLAX.format(name="MistralModel", tensors=tensors), "mistral_flax")["outputs"]
    assert outputs.last_hidden_state.shape[2] == 176
    outputs = run(FLAX.format(name="MistralForCausalLM", tensors=tensors), "mistral_flax")["outputs"]
    assert outputs.logits[:, -1].shape == (1, 2048)


@pytest.mark.feature("transformers 4.x classes: FlaxMistral*, TFMistral*")
def test_the_tensorflow_classes(run):
    outputs = run(TENSORFLOW.format(name="MistralModel"), "mistral_tf")["outputs"]
    assert outputs.last_hidden_state.shape[2] == 176
    outputs = run(TENSORFLOW.format(name="MistralForCausalLM"), "mistral_tf")["outputs"]
    assert outputs.logits.shape[2] == 2048
