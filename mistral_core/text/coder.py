"""A `tokenizers.Tokenizer` as the tokenizers here use it: exact for any text and any ids, and fast on many texts."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..disk import limits
from ..errors import TokenizerError
from . import decoder, fast, framing
from .guarded import load, typed
from .rows import Columns, Frame
from .segments import Control, Infill, Part, Segment, Spans, whole
from .sentencepiece import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

USUAL_FACTOR = 16
"""What the files of Mistral may make of one byte: SentencePiece's 12, Tekken's 4."""

ALWAYS, FIRST, NEVER = "always", "first", "never"
"""Where a space is put before a text: anywhere, at its beginning unless one is there, nowhere."""

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
_SCHEMES = {"first": FIRST, "never": NEVER}
_PIECES = ["Replace", "ByteFallback", "Fuse"]
_INFILL = "\u263a"


class Coder:
    """Text to ids and back by a vocabulary; control tokens are found in a text only by `parsed`.

    `unknown` is what the unknown token reads like where special tokens are skipped; `marks` are control tokens that are
    not skipped there. `factor` is what `description.check` says; `joined` whether a text that follows a control token
    gets no space, as SentencePiece's own way has it where `legacy` is false; `size` one more than the highest id, where
    ids have gaps. `where` names the file in errors.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        unknown: str = "",
        marks: Collection[str] = (),
        factor: int = 1,
        joined: bool = False,
        size: int | None = None,
        where: str = "tokenizer",
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer, self._unknown, self._where = tokenizer, unknown, where
        self._factor, self._joined = factor, joined
        added = tokenizer.get_added_tokens_decoder()
        self.controls = {each: token.content for each, token in added.items() if token.special}
        """Found in no text that a user wrote."""
        self.special = {each: name for each, name in self.controls.items() if name not in marks}
        """What `skip_special_tokens` leaves out."""
        self._added = {each: token.content for each, token in added.items() if each not in self.special}
        self._words = self._added.keys() - self.controls.keys()
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True) if size is None else size
        self._is_fast = False
        self._take_out_user_defined()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fast"}  # it is made again

    def _take_out_user_defined(self) -> None:
        """Find pieces that stand in a text here, not in `tokenizers`: for them it would have to ignore merges.

        Then a control token would be found where nothing else stands between two such pieces.
        """
        self._split, self._user_defined = None, dict[str, int]()
        if _state(self._tokenizer.normalizer) in (_PREPEND, _REPLACE):
            pieces = _isolated(_state(self._tokenizer.pre_tokenizer))
            found = {piece: each for piece in pieces if (each := self.token_id(piece)) is not None}
            if pieces and len(found) == len(pieces):
                self._split, self._user_defined = self._tokenizer.pre_tokenizer, found
                self._tokenizer.pre_tokenizer, self._tokenizer.model.ignore_merges = None, False
        self._cut = re.compile("({})".format("|".join(map(re.escape, self._user_defined))))

    @cached_property
    def prefix(self) -> str | None:
        """Where a text gets a space as SentencePiece writes it; None where that is not known."""
        normalizer, pre_tokenizer = _state(self._tokenizer.normalizer), _state(self._tokenizer.pre_tokenizer)
        if pre_tokenizer is None and normalizer in (_PREPEND, _REPLACE):
            return ALWAYS if normalizer == _PREPEND else NEVER
        scheme = (pre_tokenizer or {}).get("prepend_scheme")
        known = normalizer is None and pre_tokenizer == {**_METASPACE, "prepend_scheme": scheme}
        return _SCHEMES.get(str(scheme)) if known else None

    @cached_property
    def frame(self) -> Frame:
        """The special tokens that the file puts around a text, and between two."""
        with typed(self._where, "its special tokens cannot be put around a text"):
            one, two = self._tokenizer.encode("a"), self._tokenizer.encode("a", "a")
        first = _leading(one.special_tokens_mask)
        last = len(one.ids) - _leading(one.special_tokens_mask[::-1]) if first < len(one.ids) else first
        middle = two.special_tokens_mask[first : len(two.ids) - (len(one.ids) - last)]
        between = [each for each, own in zip(two.ids[first:], middle, strict=False) if own]
        return Frame(one.ids[:first], one.ids[last:], between)

    def encode(self, texts: Sequence[str], *, prefix: str | None = None) -> list[list[int]]:
        """The ids of each text, nothing added; `prefix` in place of the file's own rule, where that is known."""
        if self._spaces_are_known:
            texts = [_spaced(text, prefix or self.prefix) for text in texts]
            if self._user_defined and any(map(self._cut.search, texts)):
                return [self._with_user_defined(text)["input_ids"] for text in texts]
        if self._is_fast and self._fast is not None:
            return self._fast(texts)
        return self._batch(self._encoding, texts)

    def encode_fast(self) -> None:
        """Encode by kitoken from now on; raises MissingExtraError, TokenizerError where its ids would be others."""
        if self._fast is None:
            raise TokenizerError(f"{self._where}: fast=True would give other ids of this vocabulary; leave it out.")
        self._is_fast = True

    def parsed(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in which control tokens are found."""
        if self._is_joined:  # its own space would be taken for the one that is put before a text
            texts = [" " + text if text.startswith((" ", SPACE)) else text for text in texts]
        return self._batch(self._parsing, texts)

    def _batch(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        self._check_sizes(texts)
        with typed(self._where, "a text cannot be encoded by it"):
            return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _check_sizes(self, texts: Sequence[str]) -> None:
        """Refuse texts of which an unusual tokenizer.json might make gigabytes."""
        if self._factor > USUAL_FACTOR:
            longest = max((len(text.encode()) for text in texts), default=0)
            limits.check(
                longest * self._factor, limits.EXPANDED_TEXT, what="bytes that it may make of a text", where=self._where
            )

    def with_offsets(self, text: str, *, parse_special: bool) -> Columns:
        """The ids of a text and where each token begins and ends in it, in characters."""
        if self._user_defined and self._spaces_are_known and not parse_special:
            return self._located(text, None)
        tokenizer = self._parsing if parse_special else self._tokenizer
        self._check_sizes([text])
        with typed(self._where, "a text cannot be encoded by it"):
            found = tokenizer.encode(text, add_special_tokens=False)
        return {"input_ids": found.ids, "offset_mapping": found.offsets}

    def prompt(self, segments: Sequence[Segment], *, apart: bool) -> list[int]:
        """The ids of a prompt: its texts are encoded each for itself, as if `apart`, or as parts of one text.

        Raises TokenizerError for a control token that is not in the vocabulary.
        """
        return [each for place, segment in enumerate(segments) for each in self._of_segment(segment, place, apart)]

    def said(self, parts: Sequence[Part], *, apart: bool) -> list[int]:
        """For each id that `prompt` gives for the segments of parts, whether an assistant said any of it: 1, else 0."""
        mask: list[int] = []
        for place, (segment, spans) in enumerate(parts):
            if isinstance(segment, Control | Infill) or spans in ((), whole(segment).said):
                mask += [int(bool(spans))] * len(self._of_segment(segment, place, apart))
            else:
                offsets = self._located(segment, self._prefix_at(place, apart))["offset_mapping"]
                mask += [int(_touches(offset, spans)) for offset in offsets]
        return mask

    def _of_segment(self, segment: Segment, place: int, apart: bool) -> list[int]:
        if isinstance(segment, Control):
            return [self.control(segment.name)]
        if isinstance(segment, Infill):
            return self.encode([_INFILL + segment.text], prefix=ALWAYS)[0][2:]
        return self.encode([segment], prefix=self._prefix_at(place, apart))[0]

    def _prefix_at(self, place: int, apart: bool) -> str | None:
        """What space a text gets in this place of a prompt; None for the file's own rule."""
        inside = (self.prefix == FIRST or self._joined) and place > 0
        return ALWAYS if apart else NEVER if inside else None

    def _located(self, text: str, prefix: str | None) -> Columns:
        """The ids that `encode` gives, and where each begins and ends in the text."""
        if not self._spaces_are_known:
            return self.with_offsets(text, parse_special=False)
        spaced = _spaced(text, prefix or self.prefix)
        if self._user_defined:
            columns = self._with_user_defined(spaced)
        else:
            with typed(self._where, "a text cannot be encoded by it"):
                found = self._bare.encode(spaced, add_special_tokens=False)
            columns = {"input_ids": found.ids, "offset_mapping": found.offsets}
        more = len(spaced) - len(text)
        shifted = [(max(first - more, 0), last - more) for first, last in columns["offset_mapping"]]
        return {**columns, "offset_mapping": shifted}

    def shown(self, segments: Sequence[Segment], *, apart: bool) -> str:
        """A prompt as one text, with the space that stands before each text that is encoded for itself."""
        space = " " if apart and self.prefix is not None else ""
        return "".join(each.name if isinstance(each, Control) else space + str(each) for each in segments)

    def control(self, name: str) -> int:
        """The id of a control token; raises TokenizerError where there is none of this name."""
        found = self.token_id(name)
        if found is None or found not in self.controls:
            raise TokenizerError(f"the vocabulary has no control token {name!a}; take the tokenizer of the model.")
        return found

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of ids in [0, vocab_size)."""
        if self._decoder is not None:
            return self._decoder.decode(ids, skip_special_tokens=skip_special_tokens)
        kept = [each for each in ids if not (skip_special_tokens and each in self.special)]
        with typed(self._where, "ids cannot be decoded by it"):
            text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def token(self, token_id: int) -> str:
        """The token of an id as it stands in the vocabulary; nothing where the id is one of none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, by id."""
        return dict(sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))

    def to_json(self, frame: Frame | None = None) -> str:
        """The tokenizer as a tokenizer.json, which puts a frame around a text, the file's own where it is None.

        Merges are written as "a b": every `tokenizers` reads that, and faster.
        """
        data = json.loads(self._as_in_file().to_str())
        for token in data["added_tokens"]:
            token["special"] = token["id"] in self.special
        if frame is not None and frame != self.frame:
            data["post_processor"] = framing.post_processor(frame, self.token)
        merges = data["model"].get("merges", [])
        if merges and not any(" " in part for merge in merges for part in merge):
            data["model"]["merges"] = [" ".join(merge) for merge in merges]
        return json.dumps(data, ensure_ascii=False, indent=2)

    def _as_in_file(self) -> Tokenizer:
        """A copy that `tokenizers` encodes by alone."""
        from tokenizers import pre_tokenizers

        copy = load(self._tokenizer.to_str(), self._where)
        if self._split is not None:
            copy.pre_tokenizer, copy.model.ignore_merges = self._split, True
        elif self._is_joined:
            copy.normalizer, copy.pre_tokenizer = None, pre_tokenizers.Metaspace(SPACE, FIRST, split=False)
        return copy

    @property
    def _is_joined(self) -> bool:
        """Whether `tokenizers` alone can put a space before the first text only."""
        return self._joined and self._split is None and self.prefix == ALWAYS

    def _with_user_defined(self, text: str) -> Columns:
        """The ids of a text whose spaces are written as U+2581, user-defined pieces cut out, and where they stand."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for place, part in enumerate(self._cut.split(text)):
            if place % 2:
                ids.append(self._user_defined[part])
                offsets.append((start, start + len(part)))
            else:
                with typed(self._where, "a text cannot be encoded by it"):
                    found = self._bare.encode(part, add_special_tokens=False)
                ids += found.ids
                offsets += [(start + first, start + last) for first, last in found.offsets]
            start += len(part)
        return {"input_ids": ids, "offset_mapping": offsets}

    @cached_property
    def _parsing(self) -> Tokenizer:
        # A second tokenizer, not a switch on the first: threads may ask for both at once.
        tokenizer = self._as_in_file()
        tokenizer.encode_special_tokens = False
        return tokenizer

    @property
    def _spaces_are_known(self) -> bool:
        return self.prefix is not None and not self._words

    @property
    def _encoding(self) -> Tokenizer:
        """What encodes texts after their spaces are written, where it is known how."""
        return self._bare if self._spaces_are_known else self._tokenizer

    @cached_property
    def _bare(self) -> Tokenizer:
        """The model alone, for texts whose spaces are written as U+2581: without a normalizer twice as fast."""
        from tokenizers import Tokenizer

        return Tokenizer(self._tokenizer.model)

    @cached_property
    def _fast(self) -> fast.Encode | None:
        apart = {*self.controls.values(), *self._user_defined}
        return None if self._words else fast.encoder(self._encoding, apart)

    @cached_property
    def _tokens(self) -> list[str]:
        return [self.token(each) for each in range(self.vocab_size)]

    @cached_property
    def _decoder(self) -> decoder.Decoder | None:
        """The exact decoder of the two kinds that Mistral's files are of."""
        steps = _state(self._tokenizer.decoder) or {}
        names = [step["type"] for step in steps.get("decoders", [steps]) if step]
        if names[:3] == _PIECES and names[3:] in ([], ["Strip"]):
            name = getattr(self._tokenizer.model, "unk_token", None)
            unknown = {each: self._unknown for each, token in self.special.items() if token == name and self._unknown}
            return decoder.of_pieces(self._tokens, self.special, unknown=unknown, strips=len(names) == 4)
        if names != ["ByteLevel"]:
            return None
        try:
            return decoder.of_bytes(self._tokens, self.special, added=self._added)
        except KeyError:  # a token that is not written in bytes
            return None


def _state(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _isolated(part: dict[str, Any] | None) -> list[str]:
    """The pieces that a pre-tokenizer cuts out of a text, if it does no more than that."""
    if part is None or part["type"] != "Split" or part.get("behavior") != "Isolated" or part.get("invert"):
        return []
    pattern = part["pattern"].get("Regex", "")
    pieces = [re.sub(r"\\(.)", r"\1", each) for each in re.split(r"(?<!\\)\|", pattern)]
    return pieces if "|".join(map(re.escape, pieces)) == pattern and "" not in pieces else []


def _touches(offset: tuple[int, int], spans: Spans) -> bool:
    """Whether a token has a character in one of the spans; a space that is put before a text stands with its first."""
    begin, end = offset[0], max(offset[1], offset[0] + 1)
    return any(begin < last and end > first for first, last in spans)


def _leading(mask: Sequence[int]) -> int:
    """How many special tokens stand at the beginning."""
    return next((place for place, own in enumerate(mask) if not own), len(mask))


def _spaced(text: str, prefix: str | None) -> str:
    """A text with spaces as SentencePiece writes them."""
    text = text.replace(" ", SPACE)
    if not text or prefix == NEVER or (prefix == FIRST and text.startswith(SPACE)):
        return text
    return SPACE + text
