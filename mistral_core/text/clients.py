"""What clients of transformers' tokenizers read of one."""

from __future__ import annotations

from typing import Any

from ..compat.clients import SeenAs

TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class AsTokenizer(SeenAs):
    """The part of a tokenizer that transformers' clients see; it is none of their fast ones."""

    seen_as = (
        "transformers.tokenization_python.PreTrainedTokenizer",  # of version 5; then of version 4
        "transformers.tokenization_utils.PreTrainedTokenizer",
        "transformers.tokenization_utils_base.PreTrainedTokenizerBase",
    )
    is_fast = False
    mask_token = sep_token = cls_token = None

    @property
    def name_or_path(self) -> str:
        """Where the tokenizer was read."""
        return str(getattr(self, "_where", ""))

    @property
    def vocab(self: Any) -> dict[str, int]:
        """Token -> id."""
        return self.get_vocab()

    def get_added_vocab(self: Any) -> dict[str, int]:
        """Token -> id of the control tokens, which no text is split into."""
        return dict(zip(self.all_special_tokens, sorted(self.all_special_ids), strict=True))

    @property
    def added_tokens_encoder(self: Any) -> dict[str, int]:
        """`get_added_vocab` by another name."""
        return self.get_added_vocab()

    @property
    def special_tokens_map(self: Any) -> dict[str, str]:
        """Name -> token of those that there are."""
        named = {name: getattr(self, name) for name in TOKENS}
        return {name: token for name, token in named.items() if token is not None}
