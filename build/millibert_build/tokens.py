"""Texts to token ids with the checkpoint's own tokenizer, exactly as the server does it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from millibert._errors import UsageError


def load_tokenizer(location: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint; raises `UsageError` where it has none."""
    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(f"{location}: no fast tokenizer (tokenizer.json); the server needs one")
    return tokenizer


def limited(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> Tokenizer:
    """A copy of its Rust tokenizer that truncates to `max_tokens` and does not pad."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.enable_truncation(max_tokens)
    copy.no_padding()
    return copy


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens included."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
