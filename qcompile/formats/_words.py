"""Codes in int32 words, as most formats store them: a dense bit stream, or 32 // bits codes in each word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics


def width(n: int, bits: int, padded: bool) -> int:
    """Words that ``n`` codes take."""
    return math.ceil(n / (32 // bits)) if padded else math.ceil(n * bits / 32)


def is_padded(words: int, n: int, bits: int) -> bool | None:
    """Whether ``n`` codes in so many words have 32 // bits in each; None where both layouts take as many."""
    if width(n, bits, True) == width(n, bits, False):
        return None
    return words == width(n, bits, True)


def unpack_words(words: Tensor, bits: int, n: int, padded: bool) -> Tensor:
    """Codes uint8 [..., n] of int32 words [..., width]."""
    if not padded:
        return numerics.unpack_codes(_bytes(words), bits, n)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n].contiguous()


def from_words(words: Tensor, bits: int, n: int, padded: bool) -> Tensor:
    """Canonical codes uint8 [..., ceil(n * bits / 8)]: the bytes of the words, where their stream is dense."""
    if n * bits % 8 or padded:
        return numerics.pack_codes(unpack_words(words, bits, n, padded), bits)
    return _bytes(words)[..., : n * bits // 8].contiguous()


def to_words(stream: Tensor) -> Tensor:
    """A byte stream [..., n] as int32 words [..., ceil(n / 4)]."""
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4))
    return stream.flatten().view(torch.int32).view(*stream.shape[:-1], -1)


def _bytes(words: Tensor) -> Tensor:
    return words.flatten().view(torch.uint8).view(*words.shape[:-1], -1)
