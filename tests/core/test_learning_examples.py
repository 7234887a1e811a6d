"""Examples: what the lines of a .jsonl are as token ids and labels, what a length takes of them, and bad lines."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk import lines
from mistral_core.errors import (
    CheckpointNotFoundError,
    EmptyInputError,
    ExampleChatError,
    ExampleError,
    ExampleLabelError,
    InputError,
    LimitExceededError,
    MissingLabelsError,
    TemplateError,
    TokenIdError,
    TokenizerError,
    UnsafeFileError,
)
from mistral_core.learning import ExampleCounts, Examples, label_names
from mistral_core.learning.kinds import KINDS
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.validate import IGNORE

CHAT = [
    {"role": "user", "content": "Who came?"},
    {"role": "assistant", "content": "Emma."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "She was not pleased."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return MistralTokenizer.from_pretrained(TINY_CHECKPOINT, version="v1")


@pytest.fixture
def write(tmp_path):
    """A .jsonl of rows, or of lines as they are."""

    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def made(write, tokenizer):
    """The examples of rows."""
    return lambda *rows, length=256, **options: Examples(write(*rows), tokenizer, length=length, **options)


def learnt(tokenizer, example):
    """The text of what has a label, and that the labels are the ids there."""
    ids, labels, _ = example
    assert ids.dtype == labels.dtype == np.int64
    assert (labels[labels != IGNORE] == ids[labels != IGNORE]).all()
    return tokenizer.decode(labels[labels != IGNORE].tolist())


def only(examples, index=0):
    (part,) = examples[index].parts
    return part


# Lines of JSON


def test_lines_are_found_whatever_the_chunks_of_reading(tmp_path, monkeypatch):
    rows = [{"a": "é" * count, "b": [count]} for count in range(40)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\ufeff" + "\n".join(texts[:20]) + "\n\n \t\n" + "\r\n".join(texts[20:])
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    found = lines.JsonLines(path, error=ExampleError)
    assert len(found) == 40
    assert [found[at] for at in range(40)] == rows
    assert [found.number(at) for at in range(40)] == [*range(1, 21), *range(23, 43)]
    for size in (1, 7, 64):
        monkeypatch.setattr(lines, "CHUNK_BYTES", size)
        again = lines.JsonLines(path, error=ExampleError)
        assert [again[at] for at in range(40)] == rows
        assert again.sha256 == found.sha256
        assert again.number(39) == 42


def test_memory_does_not_grow_with_the_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "x" * 2000}) + "\n") * 10_000)  # 20 MB
    tracemalloc.start()
    try:
        found = lines.JsonLines(path, error=ExampleError)
        for at in range(0, len(found), 100):
            assert len(found[at]["text"]) == 2000
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_file_that_is_changed_while_it_is_read_and_a_line_without_end(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    found = lines.JsonLines(path, error=ExampleError)
    assert found[1] == {"text": "b"}
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(ExampleError, match=r"a\.jsonl must stay as it is"):
        found[1]
    monkeypatch.setattr("mistral_core.disk.limits.LINE_BYTES", 14)
    with pytest.raises(LimitExceededError, match=r"a\.jsonl, line 3: 15 bytes"):
        path.write_text('{"text": "a"}\n\n{"text": "bcd"}\n')
        lines.JsonLines(path, error=ExampleError)
    found.close()
    with pytest.raises(ExampleError, match="was closed; open it again"):
        found[0]
    with pytest.raises(CheckpointNotFoundError):
        lines.JsonLines(tmp_path / "none.jsonl", error=ExampleError)
    with pytest.raises(UnsafeFileError):
        lines.JsonLines(tmp_path, error=ExampleError)


# What is learnt


def test_of_a_chat_what_the_assistant_says_is_learnt(made, tokenizer):
    example = only(made({"messages": CHAT, "id": 7}))
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(CHAT)
    assert learnt(tokenizer, example) == "Emma.</s> She was not pleased.</s>"
    assert example.line == 1


def test_a_chat_is_the_same_in_both_modes_of_a_tokenizer(write, tokenizer):
    path = write({"messages": CHAT})
    learning = MistralTokenizer.from_pretrained(TINY_CHECKPOINT, version="v1", mode="finetuning")
    first, second = (only(Examples(path, each, length=99)) for each in (tokenizer, learning))
    assert [each.tolist() for each in first[:2]] == [each.tolist() for each in second[:2]]


def test_tools_and_marks_of_a_template(write, tokenizer):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    marked = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    marked.chat_template = (
        "{{ bos_token }}{% for t in tools or [] %}T {{ t.function.name }} {% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}Q {{ m.content }}{% else %}{% generation %} {{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    example = only(Examples(write({"messages": CHAT[:2], "tools": [tool]}), marked, length=99))
    assert marked.decode(example.input_ids.tolist()) == "<s> T look Q Who came? Emma.</s>"
    assert learnt(marked, example).strip() == "Emma.</s>"


def test_a_text_is_learnt_as_a_whole_and_ends(made, tokenizer):
    example = only(made({"text": "Emma </s> was"}))
    assert example.input_ids.tolist() == [*tokenizer.encode("Emma </s> was"), tokenizer.eos_token_id]
    assert example.labels.tolist() == [IGNORE, *example.input_ids.tolist()[1:]]


@pytest.mark.parametrize(
    ("prompt", "completion", "same"),
    [("Who came?", " Emma.", True), ("Who came? ", "Emma.", False), ("", "Emma", True)],
)
def test_after_a_prompt_comes_the_completion(made, tokenizer, prompt, completion, same):
    example = only(made({"prompt": prompt, "completion": completion}))
    ids = example.input_ids.tolist()
    asked = tokenizer.encode(prompt)
    assert ids[: len(asked)] == asked, "as the model reads it when it is asked"
    assert (ids[:-1] == tokenizer.encode(prompt + completion)) == same
    assert tokenizer.decode(ids) == tokenizer.decode([1, *tokenizer.encode(prompt + completion)[1:], 2])
    assert example.labels.tolist() == [IGNORE] * len(asked) + ids[len(asked) :]


def test_a_completion_in_messages_is_the_last_answers(made, tokenizer):
    example = only(made({"prompt": CHAT[:3], "completion": CHAT[3:]}))
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(CHAT)
    assert learnt(tokenizer, example) == "She was not pleased.</s>"
    example = only(made({"prompt": CHAT[:1], "completion": CHAT[1:]}))
    assert learnt(tokenizer, example) == "Emma.</s> She was not pleased.</s>"


def test_a_preference_is_two_examples(made, tokenizer):
    examples = made(
        {"prompt": "Who came?", "chosen": " Emma.", "rejected": " A dog."},
        {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": [{"role": "assistant", "content": "He."}]},
    )
    told = [[learnt(tokenizer, each) for each in examples[at].parts] for at in range(2)]
    assert told == [["Emma.</s>", "A dog.</s>"], ["Emma.</s>", "He.</s>"]]
    chosen, rejected = examples[1].parts
    asked = len(tokenizer.apply_chat_template(CHAT[:1]))
    assert chosen.input_ids[:asked].tolist() == rejected.input_ids[:asked].tolist()
    assert chosen.line == rejected.line == 2


def test_a_text_with_a_label_is_read_as_by_the_pipeline(made, tokenizer):
    examples = made({"text": "Emma", "label": "bad"}, {"text": "Emma", "label": 0}, labels=["good", "bad"])
    assert [int(only(examples, at).labels) for at in range(2)] == [1, 0]
    assert only(examples).labels.shape == ()
    assert only(examples).input_ids.tolist() == tokenizer.encode("Emma")


def test_the_first_token_of_each_word_has_its_label(made, write, tokenizer):
    words = ["Emma", "Woodhouse,", "é", "x"]  # ▁ is a token of its own before the last two
    example = only(made({"tokens": words, "labels": ["P", "P", None, 0]}, labels=["O", "P"]))
    assert example.input_ids.tolist() == tokenizer.encode(" ".join(words))
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    found = [(token, label) for token, label in zip(tokens, example.labels.tolist(), strict=True) if label != IGNORE]
    assert found == [("▁Emma", 1), ("▁Woodhouse", 1), ("▁", 0)]
    learning = MistralTokenizer.from_pretrained(TINY_CHECKPOINT, mode="finetuning")
    assert learning.frame.after
    (short,) = Examples(write({"tokens": words, "labels": [1, 1, 1, 1]}), learning, length=4, labels=2)[0].parts
    assert short.input_ids.tolist() == [*tokenizer.encode(" ".join(words))[:3], 2]
    assert short.labels.tolist() == [IGNORE, 1, 1, IGNORE]


def test_classes_of_a_file(write):
    texts = [{"text": "a", "label": name} for name in ("b", "a", "b")]
    assert label_names(write(*texts)) == ["a", "b"]
    assert label_names(write({"text": "a", "label": 2})) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert label_names(write({"tokens": ["a", "b"], "labels": ["X", None]})) == ["X"]
    for rows, told in (
        ([texts[0], {"text": "a", "label": 1}], "line 2: the labels must all be names or all numbers"),
        ([{"text": "a", "label": 1.5}], "line 1: a label must be a name or a number from 0 on, got 1.5"),
        ([{"text": "a"}], "must have lines of text and label"),
        ([], "must have lines of text and label"),
    ):
        with pytest.raises(ExampleError, match=told):
            label_names(write(*rows))


# A length


def test_what_is_cut_and_dropped_is_counted_and_told(made, tokenizer):
    long = {"prompt": "Who came?", "completion": " Emma" * 30}
    lost = {"prompt": "Who came? " * 30, "completion": " Emma"}
    examples = made({"prompt": "Who came?", "completion": " Emma."}, long, lost, lost, length=20)
    sizes = [len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in (long, lost)]
    assert only(examples, 1).input_ids.tolist() == tokenizer.encode("Who came?" + " Emma" * 30)[:20]
    assert examples[1].lost == sizes[0] - 20
    with pytest.warns(UserWarning, match=rf"line 3: {sizes[1]} tokens, of which the first 20 leave nothing to learn"):
        assert examples[2] == ((), sizes[1])
    assert examples[3].parts == ()  # and no other warning
    asked = len(tokenizer.encode("Who came?"))
    whole = len(only(examples).input_ids)
    counts = examples.counts()
    assert counts == ExampleCounts(
        examples=4,
        tokens=whole + 20,
        labels=whole + 20 - 2 * asked,
        cut=3,
        lost=sizes[0] - 20 + 2 * sizes[1],
        dropped=2,
    )
    assert "4 examples" in str(counts)
    assert "3 cut" in str(counts)
    assert "2 dropped" in str(counts)
    assert examples.sizes.tolist() == [whole, 20, 0, 0]
    assert examples.counts([0]).examples == 1


# What is no example


def chat(*roles):
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


BAD = {
    "no JSON": (['{"text": "a"}', "", "{text}"], ExampleError, r"line 3: not valid JSON at column 2: "),
    "no object": (['{"text": "a"}', "[1]"], ExampleError, r"line 2: the top level must be a JSON object, got list"),
    "no known fields": ([{"txet": "a"}], ExampleError, r"line 1 must have the fields of a kind .* got \['txet'\]"),
    "of two kinds": ([{"text": "a", "messages": []}], ExampleError, r"line 1 .* \(chat\) beside text; .* kind='chat'"),
    "another kind": ([{"text": "a"}, chat("user", "assistant")], ExampleError, r"line 2 must have text as the"),
    "no text": ([{"text": 3}], ExampleError, r"line 1: text must be a text, got 3"),
    "an empty text": ([{"text": "a"}, {"text": ""}], MissingLabelsError, r"line 2 must hold something to learn"),
    "an empty completion": ([{"prompt": "a", "completion": ""}], MissingLabelsError, r"line 1 must hold something"),
    "a text and messages": ([{"prompt": "a", "completion": []}], ExampleError, r"line 1: prompt and comp.* must"),
    "tools of texts": ([{"prompt": "a", "completion": "b", "tools": [1]}], ExampleError, r"line 1: tools must be be"),
    "tools that are none": ([{"messages": CHAT, "tools": "look"}], ExampleChatError, r"line 1: tools must be"),
    "no messages": ([{"messages": []}], ExampleChatError, r"line 1: messages must be a list of messages"),
    "no role": ([{"messages": [{"content": "a"}]}], ExampleChatError, r"line 1: messages\[0\]\.role must be a text"),
    "a king": ([chat("king", "assistant")], ExampleChatError, r"line 1: messages\[0\]: role must be .*king"),
    "a question last": ([chat("user", "assistant"), chat("user")], ExampleChatError, r"line 2: messages must"),
    "roles out of order": (
        [{"messages": [CHAT[0], {"role": "tool", "tool_call_id": "a", "content": "b"}, CHAT[1]]}],
        ExampleChatError, r"line 1: messages\[1\]: role must be .* got 'tool' after 'user'",
    ),
    "an answer alone": ([chat("user", "assistant"), chat("assistant")], ExampleChatError, r"line 2: .* begin with"),
    "a weight": ([{"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}], ExampleChatError, r"weight must be 1"),
    "an answer in the prompt": (
        [{"prompt": CHAT[:2], "completion": CHAT[3:]}], ExampleChatError, r"line 1: prompt must end with what",
    ),
    "a rejected question": (
        [{"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": CHAT[:1]}], ExampleChatError, r"rejected begin with",
    ),
    "too deep": (['{"text": ' + "[" * 70 + "]" * 70 + "}"], ExampleError, r"line 1: nested deeper than 64 levels"),
}  # fmt: skip
BAD_LABELS = {
    "a class too many": ([{"text": "a", "label": 2}], ExampleLabelError, r"line 1: label must be .* 0 to 1.*got 2"),
    "no class": ([{"text": "a", "label": -1}], ExampleLabelError, r"got -1"),
    "true": ([{"text": "a", "label": True}], ExampleLabelError, r"got True"),
    "an unknown name": ([{"text": "a", "label": "C"}], ExampleLabelError, r"one of \['A', 'B'\], got 'C'"),
    "of a word": ([{"tokens": ["a", "b"], "labels": [0, 9]}], ExampleLabelError, r"line 1: labels\[1\] must .* got 9"),
    "one too few": ([{"tokens": ["a", "b"], "labels": [0]}], ExampleError, r"line 1: tokens and labels must be"),
    "two words": ([{"tokens": ["a b"], "labels": [0]}], ExampleError, r"tokens\[0\] must be a word without blanks"),
    "no label": ([{"tokens": ["a"], "labels": [None]}], MissingLabelsError, r"line 1 must hold something to learn"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, *BAD_LABELS])
def test_a_bad_line_is_an_error_with_the_file_and_the_line(made, case):
    rows, error, told = {**BAD, **BAD_LABELS}[case]
    with pytest.raises(error, match=r"data\.jsonl, .*" + told) as caught:
        examples = made(*rows, **({"labels": ["A", "B"]} if case in BAD_LABELS else {}))
        for at in range(len(examples)):
            _ = examples[at]
    assert isinstance(caught.value, InputError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["user", "assistant", "tool", "a b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "function", "type", "text", "name"]) | st.text(max_size=3),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JSON | st.just("a")}
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*KINDS]), st.data())
def test_any_line_is_an_example_or_an_error_of_ours(made, kind, data):
    fields = KINDS[kind].needs + KINDS[kind].may
    row = {name: data.draw(MESSAGES | JSON) for name in fields}
    options = {"labels": 2} if kind in ("classification", "tokens") else {}
    examples = made(row, kind=kind, **options)
    told = ""
    try:
        assert examples[0].parts
    except ExampleError as error:
        told = str(error)
    assert not told or "data.jsonl, line 1" in told


def test_errors_are_those_that_others_catch():
    assert issubclass(ExampleChatError, TemplateError)
    assert issubclass(ExampleLabelError, TokenIdError)
    assert issubclass(MissingLabelsError, EmptyInputError)


def test_a_kind_that_is_named_reads_its_fields_alone(made, tokenizer):
    row = {"text": "a", "messages": CHAT, "prompt": "Who came?"}
    assert learnt(tokenizer, only(made(row, kind="chat"))).startswith("Emma.")
    assert learnt(tokenizer, only(made(row, kind="text"))) == "a</s>"
    with pytest.raises(ExampleError, match=r"line 1 must have prompt, completion .* add completion"):
        made(row, kind="completion")[0]


def test_arguments_that_are_none(made, write, tokenizer):
    text = {"text": "a"}
    for options, told in (
        ({"length": 1}, "length must be an integer from 2 on, got 1"),
        ({"length": 2.0}, "got 2.0"),
        ({"kind": "poem"}, "kind must be one of preference, .* got 'poem'"),
        ({"labels": 2}, "are of the kind text, without; leave it out"),
    ):
        with pytest.raises(InputError, match=told):
            made(text, **options)
    for labels in (None, 0, [], ["A", "A"], "AB", [1, 2], 1 << 40):
        with pytest.raises(InputError, match=r"labels must be .* label_names\(path\)"):
            made({"text": "a", "label": 0}, labels=labels)
    with pytest.raises(MissingLabelsError, match=r"data\.jsonl must have an example a line, got none"):
        made("", " ")
    with pytest.raises(InputError, match="tokenizer must be a MistralTokenizer, got object"):
        Examples(write(text), object(), length=9)
    endless = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    endless.eos_token = None
    with pytest.raises(TokenizerError, match="eos_token must end what is learnt"):
        Examples(write(text), endless, length=9)
