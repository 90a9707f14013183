"""ggml's experts (``mul_mat_id``) as a variant of cpu_moe.py, by the libraries that llama-cpp-python brings.

Gate, up, ``silu(gate) * up`` and down of random weights in Q4_0 for random experts, stored as llama.cpp stores them
(its "repacked" form where the CPU has one). Neither the router nor the weighted sum of a token's experts is part of it.
"""

from __future__ import annotations

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy
import torch
from cpu_llama import random_blocks
from torch import Tensor

F32, Q4_0, I32 = 0, 2, 26  # types in ggml.h
POINTERS = (
    "ggml_init", "ggml_new_tensor_3d", "ggml_new_tensor_2d", "ggml_mul_mat_id", "ggml_swiglu_split", "ggml_new_graph",
    "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_gallocr_new", "ggml_backend_reg_get_proc_address",
    "ggml_backend_reg_dev_get", "ggml_backend_cpu_buffer_type", "ggml_backend_cpu_init", "ggml_backend_cpu_reg",
)  # fmt: skip


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Experts:
    """Call it with x [1, tokens, hidden]; each call takes other experts. A graph is made for each number of tokens."""

    def __init__(self, hidden: int, intermediate: int, experts: int, chosen: int, threads: int) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self.base, self.cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))
        for name in POINTERS:
            self._function(name).restype = c_void_p
        self.sizes = hidden, intermediate, experts, chosen
        self.thread = ThreadPoolExecutor(1)  # whose tiles of AMX nobody else releases
        self.backend = c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, c_int(threads))
        context = self._context()
        shapes = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        self.weights = [self._tensor(context, Q4_0, inn, out, experts) for inn, out in shapes]
        if not self.base.ggml_backend_alloc_ctx_tensors_from_buft(context, self._buffer_type()):
            raise MemoryError("ggml has no memory for the experts")
        for tensor, (inn, out) in zip(self.weights, shapes, strict=True):
            self._set(tensor, torch.from_numpy(random_blocks(numpy.random.default_rng(0), experts * out, inn)))
        self.graphs: dict[int, tuple[c_void_p, c_void_p, c_void_p, itertools.cycle]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.thread.submit(self._run, x.flatten(0, -2)).result()

    def _run(self, x: Tensor) -> Tensor:
        graph, given, ids, orders = self._graph(len(x))
        self._set(given, x.float())
        self._set(ids, next(orders))
        if self.base.ggml_backend_graph_compute(self.backend, graph):
            raise RuntimeError("ggml could not compute the graph")
        return x

    def _graph(self, tokens: int) -> tuple[c_void_p, c_void_p, c_void_p, itertools.cycle]:
        if tokens not in self.graphs:
            hidden, _, experts, chosen = self.sizes
            context = self._context()
            x, ids = self._tensor(context, F32, hidden, 1, tokens), self._tensor(context, I32, chosen, tokens)
            gate, up = (self._made("ggml_mul_mat_id", context, weight, x, ids) for weight in self.weights[:2])
            inner = self._made("ggml_swiglu_split", context, gate, up)
            graph = c_void_p(self.base.ggml_new_graph(context))
            result = self._made("ggml_mul_mat_id", context, self.weights[2], inner, ids)
            self.base.ggml_build_forward_expand(graph, result)
            allocator = c_void_p(self.base.ggml_gallocr_new(c_void_p(self._plain_buffer_type())))
            if not self.base.ggml_gallocr_alloc_graph(allocator, graph):
                raise MemoryError("ggml has no memory for the graph")
            orders = [torch.rand(tokens, experts).argsort(1)[:, :chosen].int().contiguous() for _ in range(16)]
            self.graphs[tokens] = graph, x, ids, itertools.cycle(orders)
        return self.graphs[tokens]

    def _plain_buffer_type(self) -> int:
        """Plain memory."""
        return self._function("ggml_backend_cpu_buffer_type")()

    def _buffer_type(self) -> c_void_p:
        """Memory in which weights of 4 bits are stored as its fastest products want them, if it has such."""
        reg = c_void_p(self.cpu.ggml_backend_cpu_reg())
        address = self.base.ggml_backend_reg_get_proc_address(reg, c_char_p(b"ggml_backend_dev_get_extra_bufts"))
        device = c_void_p(self.base.ggml_backend_reg_dev_get(reg, c_size_t(0)))
        self.base.ggml_backend_buft_name.restype = c_char_p
        if address:
            found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
            for i in itertools.count():
                if not found or not found[i]:
                    break
                if b"REPACK" in self.base.ggml_backend_buft_name(c_void_p(found[i])):
                    return c_void_p(found[i])
        return c_void_p(self._plain_buffer_type())

    def _function(self, name: str) -> ctypes._CFuncPtr:
        return getattr(self.base, name, None) or getattr(self.cpu, name)

    def _context(self) -> c_void_p:
        return c_void_p(self.base.ggml_init(_Parameters(1 << 20, None, True)))

    def _tensor(self, context: c_void_p, dtype: int, *sizes: int) -> c_void_p:
        make = getattr(self.base, f"ggml_new_tensor_{len(sizes)}d")
        return c_void_p(make(context, c_int(dtype), *map(c_int64, sizes)))

    def _made(self, name: str, *tensors: c_void_p) -> c_void_p:
        return c_void_p(getattr(self.base, name)(*tensors))

    def _set(self, tensor: c_void_p, values: Tensor) -> None:
        values = values.contiguous()
        self.base.ggml_backend_tensor_set(tensor, c_void_p(values.data_ptr()), c_size_t(0), c_size_t(values.nbytes))
