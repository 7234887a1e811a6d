"""Pictures of masks and weights: what a cell says, what is safe to show, what fits where."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import EmptyInputError, InputError, MissingExtraError, SequenceTooLongError
from mistral_core.pictures import AttentionMaskVisualizer, AttentionVisualizer, inputs, terminal
from mistral_core.pictures.labels import ascii_only, labels, safe
from mistral_core.pictures.palette import LIGHT, rgb
from mistral_core.pictures.picture import Panel, Picture, Reason, Token
from mistral_core.text.tokenizer import MistralTokenizer

TEXTS = ["Emma was", "The evening was not"]
LONG = "The evening was not so long that she " * 9
LEGEND = 24**2
"""Pixels of a square in an image's legend."""
HOSTILE = "</script><script>alert(1)</script> <!-- ]]> &lt; ' \" \u202e"


@pytest.fixture(scope="module")
def masks():
    return AttentionMaskVisualizer(TINY_CHECKPOINT, sliding_window=3)


@pytest.fixture(scope="module")
def weights():
    return AttentionVisualizer(TINY_CHECKPOINT, backend="reference")


def drawn(*names, window=None, weights=None):
    """A picture of tokens with these names that see each other as a causal text does."""
    tokens = tuple(Token(safe(name), position) for position, name in enumerate(names))
    reasons = np.triu(np.ones((len(names), len(names)), np.uint8), 1)
    return Picture("A picture", (tokens,), (Panel("layer 0", 0, (0,), window, reasons, None, weights),))


# Cells


def test_padding_window_and_future_have_their_letters(masks):
    picture = masks.picture(TEXTS)
    assert picture.text() == "\n".join([
        "Attention mask of tiny, float64 reference",
        "",
        "text 0, layers 0-4: window of 3",
        "             0 1 2",
        "  pad    p p p p p",
        "  pad    p p p p p",
        "0 <s>    p p # . .",
        "1 ▁Emma  p p # # .",
        "2 ▁was   p p # # #",
        "",
        "text 1, layers 0-4: window of 3",
        "            0 1 2 3 4",
        "0 <s>       # . . . .",
        "1 ▁The      # # . . .",
        "2 ▁evening  # # # . .",
        "3 ▁was      w # # # .",
        "4 ▁not      w w # # #",
        "",
        "# sees   . comes later   w outside the window   p padding",
    ])  # fmt: skip


def test_packed_documents_have_theirs(masks):
    picture = masks.picture(TEXTS, packed=True)
    assert "5 ▁evening  d d d # # # . ." in picture.text()
    assert "7 ▁not      d d d w w # # #" in picture.text()
    assert [token.document for token in picture.texts[0]] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_cells_explain_themselves(masks):
    left, right = masks.picture(TEXTS), masks.picture(TEXTS, packed=True)
    assert left.explain(3, 2, 1) == "'was' (position 3) sees 'evening' (position 2)."
    assert left.explain(2, 2, 1) == "'evening' (position 2) sees itself."
    assert left.explain(1, 2, 1) == "'The' (position 1) does not see 'evening' (position 2), which comes later."
    assert left.explain(4, 1, 1) == (
        "'not' (position 4) does not see 'The' (position 1), 3 tokens back: outside the window of 3 (itself included)."
    )
    assert "padding" in left.explain(3, 0)
    assert "position 5, document 1" in right.explain(5, 1)
    assert right.explain(5, 1).endswith("which is in another document.")
    for query, key in [(5, 0), (0, -1)]:
        with pytest.raises(InputError, match="columns in"):
            left.explain(query, key)
    with pytest.raises(InputError, match="panel"):
        left.mask(2)


def test_one_matrix_for_each_window_among_the_layers(tmp_path):
    windows = ("full_attention", "sliding_attention", "full_attention")
    TINY.replace(layer_types=windows, sliding_window=2, vocab_size=2048).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY_CHECKPOINT / name).read_bytes())
    picture = AttentionMaskVisualizer(tmp_path).picture("Emma was not")
    assert [panel.title for panel in picture.panels] == ["layers 0, 2: no window", "layer 1: window of 2"]
    assert [panel.layers for panel in picture.panels] == [(0, 2), (1,)]
    assert picture.mask(0)[3].tolist() == [True] * 4
    assert picture.mask(1)[3].tolist() == [False, False, True, True]
    assert AttentionMaskVisualizer(tmp_path).picture("Emma", layer=-2).panels[0].layers == (1,)


def test_a_call_prints_and_returns(masks, capsys):
    picture = masks("Emma was", " not")
    assert capsys.readouterr().out == picture.text() + "\n"
    assert [token.label for token in picture.texts[0]] == ["<s>", "▁Emma", "▁was", "▁not"]
    assert repr(picture) == "Picture('Attention mask of tiny, float64 reference', texts=1, panels=1)"
    with pytest.raises(InputError, match="suffix"):
        masks(TEXTS, "x")


def test_a_notebook_shows_the_picture_once(masks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    shown = masks("Emma <b>was")._repr_html_()
    assert capsys.readouterr().out == ""
    assert shown.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert shown.count("<") == 2, "everything inside the frame is escaped"


def test_weights_are_those_of_the_reference(weights):
    every = weights.picture("Emma was not", layer="all", head="all")
    assert [(panel.layers, panel.head) for panel in every.panels] == [((i,), n) for i in range(5) for n in range(6)]
    assert all(np.allclose(panel.weights.sum(axis=1), 1, atol=1e-6) for panel in every.panels)
    assert all((panel.weights[every.mask(i)] > 0).all() for i, panel in enumerate(every.panels))
    assert all((panel.weights[~every.mask(i)] == 0).all() for i, panel in enumerate(every.panels))
    last = weights.picture("Emma was not")
    assert last.panels[0].title == "layer 4, mean of 6 heads"
    assert np.allclose(last.weights(), np.mean([every.weights(24 + n) for n in range(6)], axis=0), atol=1e-7)
    assert last.explain(1, 0) == (
        f"'Emma' (position 1) gives {last.weights()[1, 0]:.4f} of its attention to '<s>' (position 0)."
    )


@pytest.mark.parametrize("options", [{"layer": 5}, {"layer": -6}, {"head": 6}, {"head": "max"}, {"layer": True}])
def test_layers_and_heads_that_are_not_there(weights, options):
    with pytest.raises(InputError, match="must be a number from 0 to"):
        weights.picture("Emma", **options)


# What is looked at


class Chats(MistralTokenizer):
    """Says how it was asked."""

    def apply_chat_template(self, conversation, **options):
        self.asked = conversation, options
        return [1, *self.encode(conversation[0]["content"], add_special_tokens=False)]


def test_chats_go_through_the_template():
    tokenizer = Chats.from_pretrained(TINY_CHECKPOINT)
    messages = [{"role": "user", "content": "Emma </s>"}]
    rows = inputs.read(tokenizer, messages)
    assert tokenizer.asked == (messages, {"add_generation_prompt": True, "continue_final_message": False})
    assert [token.is_control for token in rows.tokens[0]] == [True] + [False] * (len(rows.tokens[0]) - 1)
    answered = [*messages, {"role": "assistant", "content": "was"}]
    assert len(inputs.read(tokenizer, [answered, messages]).tokens) == 2
    inputs.read(tokenizer, answered)
    assert tokenizer.asked == (answered, {"add_generation_prompt": False, "continue_final_message": True})


@pytest.mark.parametrize("source", [[], 7, [["a"]], {"role": "user"}, [{"role": "user"}, "text"]])
def test_what_is_no_text_is_an_error(masks, source):
    with pytest.raises(InputError, match="text"):
        masks.picture(source)


def test_texts_that_are_too_long_or_empty(masks, monkeypatch):
    with pytest.raises(SequenceTooLongError, match="2048"):
        masks.picture("a b " * 2100)
    with monkeypatch.context() as patch, pytest.raises(EmptyInputError):
        patch.setattr(MistralTokenizer, "encode", lambda *_, **__: [])
        masks.picture(["a", ""])
    with pytest.raises(InputError, match="padding_side"):
        masks.picture("a", padding_side="both")


# Labels


def test_labels_are_safe():
    assert safe(" a\tb\n") == "▁a\\tb\\n"
    assert safe("\x1b[31m\x00\x9b") == "\\x1b[31m\\x00\\x9b"
    assert safe("\u202e\u200b\u2066\ufeff\ue000\U000e0041") == "\\u202e\\u200b\\u2066\\ufeff\\ue000\\U000e0041"
    assert safe("\xa0\u2028\xad") == "\\xa0\\u2028\\xad"
    assert safe("\u0301") == "◌\u0301"
    assert safe("é你😀") == "é你😀"
    assert len(safe(" " * 1000)) == 65
    assert ascii_only("▁é你…") == "_\\xe9\\u4f60..."


def test_labels_of_a_tokenizer():
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    ids = tokenizer.encode("Emma was\n\u202e</s>")
    found = labels(tokenizer, ids)
    assert found[:4] == ["<s>", "▁Emma", "▁was", "\\n"]
    assert found[4:7] == ["<0xE2>", "<0x80>", "<0xAE>"]
    assert "".join(found[7:]) == "</s>"
    assert labels(tokenizer, []) == []


class HalfCharacters(MistralTokenizer):
    """Whose tokens are bytes, as those of tekken.json are."""

    def decode(self, ids, **_):
        return "a" if len(ids) == 1 else "a\ufffd"

    def convert_ids_to_tokens(self, ids, **_):
        return ["ĠðŁ" for _ in ids]


def test_bytes_of_a_byte_level_vocabulary_are_told():
    tokenizer = HalfCharacters.from_pretrained(TINY_CHECKPOINT)
    tokenizer.encode = lambda *_, **__: [5]
    assert labels(tokenizer, [7]) == ["▁\\xf0\\x9f"]


# The terminal


@pytest.mark.parametrize("columns", [24, 33, 60, 80, 200])
@pytest.mark.parametrize("colour", [True, False])
def test_nothing_is_wider_than_the_terminal(masks, weights, columns, colour):
    wide = drawn(*["你好你好你好你好你好", "e\u0301", "😀"] * 9)
    grid = weights.picture("Emma was not surprised", head="all")
    for picture in (wide, grid, masks.picture(LONG), masks.picture(TEXTS), masks.picture(TEXTS, packed=True)):
        found = list(terminal.lines(picture, terminal.Screen(columns, colour)))
        assert all(sum(cell_len(text) for text, _ in line) <= columns for line in found)


def test_columns_stay_aligned_behind_wide_characters():
    found = list(terminal.lines(drawn("a", "你好", "abc"), terminal.Screen(80, colour=False)))
    starts = {sum(cell_len(text) for text, _ in line[:3]) for line in found if len(line) > 3}
    assert starts == {2 + 4 + 1}


def test_what_does_not_fit_is_left_out_and_said(masks):
    text = masks.picture(LONG).text(columns=60)
    assert "27 of 74 tokens left out" in text
    assert "… " not in masks.picture(LONG).text(), "without a width everything is shown"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("variable", [None, "NO_COLOR"])
def test_colours_only_on_a_terminal_that_wants_them(masks, monkeypatch, variable):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    screen, file = Terminal(), io.StringIO()
    masks.picture(TEXTS).print(screen)
    masks.picture(TEXTS).print(file)
    assert ("\x1b[" in screen.getvalue()) is (variable is None)
    assert "\x1b" not in file.getvalue()


def test_without_rich_there_are_ascii_letters(masks, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    screen = Terminal()
    masks.picture(["Emma", "你"]).print(screen)
    assert screen.getvalue().isascii()
    assert "1 _Emma" in screen.getvalue()
    assert "mistral-frameworks[chat]" in capsys.readouterr().err


def test_an_output_without_unicode_gets_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    drawn("▁é", "你").print(file)
    file.seek(0)
    assert "1 \\u4f60" in file.read()


# The page


class Page(HTMLParser):
    """Every tag with its attributes, and the text of each kind of tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside:
            self.texts.setdefault(self.inside[-1], []).append(data)


def test_a_hostile_token_stays_text():
    picture = Picture(HOSTILE, drawn(HOSTILE, "$title", "{query}").texts, drawn("a", "b", "c").panels)
    page = Page(picture.html())
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    data, _ = page.texts["script"]
    assert "<" not in data, "</script x, <!-- and <script would end or open a script"
    assert [token["label"] for token in json.loads(data)["texts"][0]] == [safe(HOSTILE), "$title", "{query}"]
    assert page.texts["title"] == [HOSTILE]


def test_the_page_needs_no_network_and_runs_only_its_own_script(masks):
    text = masks.picture(TEXTS).html()
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(|\bsrc=|\bhref=|fetch\(|XMLHttp|innerHTML|eval\(", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for written in (page.texts["script"][1], page.texts["style"][0]):
        assert base64.b64encode(hashlib.sha256(written.encode()).digest()).decode() in policy


def test_the_page_has_what_the_picture_has(masks, weights):
    picture = weights.picture(TEXTS, layer=0, head=1)
    data = json.loads(Page(picture.html()).texts["script"][0])
    for panel, found in zip(picture.panels, data["panels"], strict=True):
        size = found["size"], found["size"]
        shares = np.frombuffer(base64.b64decode(found["weights"]), "<u2").reshape(size) / 65535
        reasons = np.frombuffer(base64.b64decode(found["reasons"]), np.uint8).reshape(size)
        assert np.abs(shares - panel.weights).max() <= 1 / 65535
        assert np.array_equal(reasons, panel.reasons)
    assert data["texts"][0][0] == {"label": "pad", "name": "padding", "position": None, "control": False}
    mask = Page(masks.picture("Emma").html())
    frame = next(attributes for _, attributes in mask.tags if attributes.get("id") == "frame")
    assert "2 by 2 tokens" in frame["aria-label"]
    assert masks.picture("Emma").text() in "".join(mask.texts["pre"])


def test_pages_and_images_have_limits(masks, weights):
    long = masks.picture("a " * 600)
    for make in (long.html, long.png):
        with pytest.raises(SequenceTooLongError, match="512"):
            make()
    tokens, panel = long.texts[0][:512], long.panels[0]._replace(reasons=np.zeros((512, 512), np.uint8))
    many = Picture("many", (tokens,), (panel,) * 40)
    with pytest.raises(SequenceTooLongError, match="one layer or head"):
        many.html()


def test_files_are_written(masks, tmp_path):
    picture = masks.picture("Emma")
    assert picture.html(tmp_path / "a.html") == (tmp_path / "a.html").read_text()
    picture.png(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.size == picture.png().size


# The image


def test_the_image_has_a_square_for_each_cell(masks):
    for source in (["Emma", "The evening was not"], LONG):
        found = {colour for _, colour in masks.picture(source).png().getcolors(1 << 20)}
        assert {rgb(LIGHT[name]) for name in ("sees", "self", "window", "future")} <= found
        assert (rgb(LIGHT["padding"]) in found) is (source is not LONG)


def test_the_area_of_what_is_seen(masks):
    image = np.asarray(masks.picture("Emma was not").png())
    own, others = ((image == rgb(LIGHT[name])).all(axis=-1).sum() for name in ("self", "sees"))
    own, others = own - LEGEND, others - LEGEND
    assert own == 4 * 40**2, "cells of 44 pixels, less their gaps"
    assert others == 5 * 40**2


def test_a_grid_of_heads(weights):
    image = weights.picture("Emma was", layer="all", head="all").png()
    assert image.width > 5 * 288
    assert image.height > 5 * 288


def test_characters_without_a_glyph_are_numbers():
    from mistral_core.pictures.fonts import Fonts

    fonts = Fonts()
    fonts._files = [None]  # Pillow's own, which has no Chinese
    assert fonts._fitting("a你", 20)[1] == "a\\u4f60"
    with pytest.raises(InputError, match="font"):
        Fonts("no/such/font.ttf")


def test_without_pillow_the_extra_is_named(masks, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=re.escape("mistral-frameworks[pictures]")):
        masks.picture("Emma").png()


def test_everything_in_numbers(masks):
    facts = json.loads(json.dumps(masks.picture(TEXTS).to_dict()))
    assert facts["panels"][1]["visible"][4] == [0, 0, 1, 1, 1]
    assert facts["panels"][1]["window"] == 3
    assert facts["texts"][0][0] == {"label": "pad", "position": None, "document": None, "is_control": False}


def test_reasons_are_numbered_as_the_page_numbers_them():
    from importlib import resources

    script = (resources.files("mistral_core.data") / "page" / "page.js").read_text()
    assert f"const [{', '.join(reason.name for reason in Reason)}] = {[*map(int, Reason)]};" in script
