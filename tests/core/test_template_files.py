"""Where a checkpoint's chat templates are."""

import json
import os

import pytest

from mistral_core.errors import CheckpointError, LimitExceededError, TemplateError, UnsafeFileError
from mistral_core.text.templates.files import choose, read


def put(directory, name, text):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_there_may_be_none(tmp_path):
    assert read(tmp_path, {}) == {}


def test_a_field_is_a_template_or_several_by_name(tmp_path):
    assert read(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    assert read(tmp_path, {"chat_template": named}) == {"default": "a", "rag": "b"}


def test_files_go_before_the_field(tmp_path):
    put(tmp_path, "chat_template.json", json.dumps({"chat_template": "json"}))
    assert read(tmp_path, {}) == {"default": "json"}
    assert read(tmp_path, {"chat_template": "field"}) == {"default": "field"}
    put(tmp_path, "chat_template.jinja", "file é")
    put(tmp_path, "additional_chat_templates/tool_use.jinja", "tools")
    put(tmp_path, "additional_chat_templates/notes.txt", "no template")
    assert read(tmp_path, {"chat_template": "field"}) == {"default": "file é", "tool_use": "tools"}


def test_a_link_of_the_hub_s_cache_is_followed(tmp_path):
    blob = put(tmp_path, "models--u--m/blobs/abc", "a")
    snapshot = tmp_path / "models--u--m" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for link in ("../../blobs/abc", blob):
        (snapshot / "chat_template.jinja").unlink(missing_ok=True)
        (snapshot / "chat_template.jinja").symlink_to(link)
        assert read(snapshot, {}) == {"default": "a"}


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(UnsafeFileError, match="must be a regular file"):
        read(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    put(tmp_path, "elsewhere/rag.jinja", "a")
    (tmp_path / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="a link to a directory"):
        read(tmp_path, {})


def test_sizes_are_bounded(tmp_path):
    put(tmp_path, "chat_template.jinja", "a" * (129 << 10))
    with pytest.raises(TemplateError, match=r"chat_template.jinja: longer than 131072 bytes"):
        read(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match="longer than"):
        read(tmp_path, {"chat_template": "a" * (129 << 10)})
    put(tmp_path, "chat_template.json", json.dumps({"chat_template": "a" * (2 << 20)}))
    with pytest.raises(LimitExceededError):
        read(tmp_path, {})
    for at in range(65):
        put(tmp_path, f"additional_chat_templates/{at}.jinja", "")
    with pytest.raises(TemplateError, match="65 templates"):
        read(tmp_path, {})


@pytest.mark.parametrize(
    "field",
    [
        1,
        {"default": "a"},
        ["a"],
        [{"name": "a"}],
        [{"name": 1, "template": "a"}],
        [{"name": "a", "template": "b"}, {"name": "a", "template": "c"}],
        [{"name": str(at), "template": ""} for at in range(65)],
        "\ud800",
    ],
)
def test_a_malformed_field_is_a_template_error(tmp_path, field):
    with pytest.raises(TemplateError, match="tokenizer_config.json: chat_template[: ]"):
        read(tmp_path, {"chat_template": field})


@pytest.mark.parametrize("name", ["../a", "a/b", "", "a\n"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(UnsafeFileError, match="not a bare file name"):
        read(tmp_path, {"chat_template": [{"name": name, "template": "a"}]})


def test_a_malformed_file_is_an_error(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="not UTF-8 at byte 0"):
        read(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError):
        read(tmp_path, {})


def test_tools_choose_their_template_as_in_transformers():
    templates = {"default": "a", "tool_use": "b", "rag": "c"}
    assert [choose(templates), choose(templates, tools=True), choose(templates, name="rag")] == ["a", "b", "c"]
    assert choose({"default": "a"}, tools=True) == "a"
    with pytest.raises(TemplateError, match="no template 'default', this checkpoint has rag"):
        choose({"rag": "c"})
