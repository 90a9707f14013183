"""llama.cpp as a variant of cpu_decode.py and cpu_prefill.py: the same shape in Q4_0, random weights, the same threads.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf diskcache   # builds it for this CPU
    python benchmarks/cpu_decode.py --llama

llama.cpp sets up the tiles of AMX once for each thread, and ends at an illegal instruction where somebody else released
them since. So it has a thread of its own here, and on a CPU with AMX must be built without OpenMP, whose threads it
would share. The build that was measured is Clang's, which ``pip install ziglang`` brings, called through two scripts,
``zig cc "$@" -fno-sanitize=undefined`` and the same with ``c++``:

    on() { for name in "$@"; do printf -- '-DGGML_%s=ON ' "$name"; done; }
    features=$(on AVX AVX2 FMA F16C BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16)
    compilers="-DCMAKE_C_COMPILER=$PWD/zcc -DCMAKE_CXX_COMPILER=$PWD/zcxx -DGGML_OPENMP=OFF"
    CMAKE_ARGS="-DGGML_NATIVE=OFF $features $compilers" pip install llama-cpp-python gguf diskcache
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch

BLOCK = 32  # weights of a block of Q4_0: a float16 scale and 16 bytes


def random_blocks(random: numpy.random.Generator, rows: int, columns: int) -> numpy.ndarray:
    """A matrix in Q4_0: uint8 [rows, bytes]"""
    blocks = random.integers(0, 256, (rows, columns // BLOCK, 18), dtype=numpy.uint8)
    blocks[..., :2] = numpy.full(1, 0.005, numpy.float16).view(numpy.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, sizes: dict[str, int], vocabulary: int) -> None:
    """A GGUF file of a Qwen3 with tied embeddings, all matrices in Q4_0."""
    import gguf

    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    random = numpy.random.default_rng(0)

    def matrix(name: str, out: int, inn: int) -> None:
        raw = random_blocks(random, out, inn)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(size, numpy.float32))

    matrix("token_embd", vocabulary, hidden)
    norm("output_norm", hidden)
    for i in range(sizes["num_hidden_layers"]):
        block = f"blk.{i}"
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", 128), ("attn_k_norm", 128)):
            norm(f"{block}.{name}", size)
        matrix(f"{block}.attn_q", heads * 128, hidden)
        matrix(f"{block}.attn_k", heads * 64, hidden)
        matrix(f"{block}.attn_v", heads * 64, hidden)
        matrix(f"{block}.attn_output", hidden, heads * 128)
        matrix(f"{block}.ffn_gate", inner, hidden)
        matrix(f"{block}.ffn_up", inner, hidden)
        matrix(f"{block}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaRunner:
    """What ``cpu_common.Runner`` is for compiled models."""

    def __init__(self, sizes: dict[str, int], vocabulary: int, prompt: torch.Tensor, room: int) -> None:
        import llama_cpp

        self.name = f"llama.cpp Q4_0 (llama-cpp-python {llama_cpp.__version__})"
        self.thread = ThreadPoolExecutor(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write(path, sizes, vocabulary)
            self.bytes = path.stat().st_size
            threads = torch.get_num_threads()
            self.prompt = prompt.flatten().tolist()
            self.model = llama_cpp.Llama(
                str(path),
                n_ctx=len(self.prompt) + room,
                n_batch=len(self.prompt),
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,
                verbose=False,
            )
        self.prefill()
        self.step()

    def prefill(self) -> float:
        """Seconds to run the prompt through an empty cache."""
        self.model.reset()
        return self._seconds(self.prompt)

    def step(self) -> float:
        """Seconds to decode one token."""
        return self._seconds([17])

    def _seconds(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        self.thread.submit(self.model.eval, tokens).result()
        return time.perf_counter() - started
