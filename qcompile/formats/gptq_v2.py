"""GPTQ version 2: the tensors of ``gptq`` with zero points stored as they are, so that all of them can be."""

from .gptq import Gptq

FORMAT = Gptq(2)
