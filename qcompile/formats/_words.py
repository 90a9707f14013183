"""Codes in int32 words, as most formats store them: a dense bit stream, or 32 // bits codes in each word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics


def widths(n: int, bits: int) -> tuple[int, ...]:
    """Words that ``n`` codes take: in the dense stream, and with 32 // bits codes per word."""
    return tuple(dict.fromkeys((math.ceil(n * bits / 32), math.ceil(n / (32 // bits)))))


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Codes uint8 [..., n] of int32 words [..., width]; the width tells the dense stream from the padded one."""
    if words.shape[-1] == widths(n, bits)[0]:
        return numerics.unpack_codes(words.contiguous().view(torch.uint8), bits, n)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n].contiguous()


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Canonical codes uint8 [..., ceil(n * bits / 8)]: the bytes of the words, where their stream is dense."""
    if n * bits % 8 or words.shape[-1] != widths(n, bits)[0]:
        return numerics.pack_codes(unpack_words(words, bits, n), bits)
    return words.contiguous().view(torch.uint8)[..., : n * bits // 8].contiguous()


def to_words(stream: Tensor) -> Tensor:
    """A byte stream [..., n] as int32 words [..., ceil(n / 4)]."""
    return torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4)).contiguous().view(torch.int32)
