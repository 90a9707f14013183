"""Other projects' products on the CPU of float activations and integer weights, for ``cpu_peers.py``.

Each takes (codes uint8 [out, in] of 0 .. 15 or int8, scales float32 [out, groups], the dequantized bfloat16 weight)
and returns a function of x bfloat16 [rows, in]; the two that take float32 are given x as such, once. Raises whatever is
missing. They are used as their documentation says, with threads as torch has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class _Once:
    """What ``function`` makes of the last x, which is held: another tensor could get its ``id`` otherwise."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        self.function = function
        self.x: Tensor | None = None
        self.made: object = None

    def __call__(self, x: Tensor) -> object:
        if x is not self.x:
            self.made, self.x = self.function(x), x
        return self.made


def _matmul_nbits(level: int) -> Callable[[Tensor, Tensor, Tensor], Product]:
    """ONNX Runtime's operator; level 4: activations in int8, 0: in float32. On CPUs it takes float32, given as such."""

    def make(codes: Tensor, scales: Tensor, weight: Tensor) -> Product:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        out, inn = codes.shape
        group = inn // scales.shape[1]
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(out, inn // group, group // 2)
        sizes = {"K": inn, "N": out, "bits": 4, "block_size": group, "accuracy_level": level}
        node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inn])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
            [
                numpy_helper.from_array(packed.numpy(), "codes"),
                numpy_helper.from_array(scales.flatten().numpy(), "scales"),
            ],
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # nor may it keep one busy
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
        floats = _Once(lambda x: x.float().numpy())
        return lambda x: torch.from_numpy(session.run(None, {"x": floats(x)})[0])

    return make


def _openvino(bits: int, quantizes: bool = False) -> Callable[[Tensor, Tensor, Tensor], Product]:
    """OpenVINO's matrix product of a compressed constant, as NNCF writes one.

    quantizes: activations become int8 in groups of 32, as its default is where the CPU has no AMX.
    """

    def make(codes: Tensor, scales: Tensor, weight: Tensor) -> Product:
        import numpy
        import openvino
        from openvino import opset13 as ops

        (out, inn), groups = codes.shape, scales.shape[1]
        shape = [out, groups, inn // groups]
        if bits == 4:
            signed = codes ^ 8  # two's complement of q - 8
            stored = (signed[:, ::2] | signed[:, 1::2] << 4).contiguous().numpy()
            constant = ops.constant(openvino.Tensor(stored, shape, openvino.Type.i4))
        else:
            stored = codes.view(*shape).numpy()
            constant = ops.constant(stored)
        half = ops.convert(constant, "f16")
        scaled = ops.multiply(half, ops.constant(scales.half().unsqueeze(-1).numpy()))
        flat = ops.reshape(scaled, ops.constant(numpy.array([out, inn])), special_zero=False)
        x = ops.parameter([-1, inn], numpy.float32)
        model = openvino.Model([ops.matmul(x, ops.convert(flat, "f32"), False, True)], [x])
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if quantizes else 0,
            "ENABLE_CPU_PINNING": False,  # or all that comes after it in this process shares one core
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

        def give(x: Tensor) -> None:
            request.set_input_tensor(openvino.Tensor(x.float().numpy(), shared_memory=False))

        given, held = _Once(give), [stored]  # the constant is a view of that memory

        def run(x: Tensor) -> Tensor:
            assert held
            given(x)
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data)

        return run

    return make


def _torchao(name: str) -> Callable[[Tensor, Tensor, Tensor], Product]:
    """torchao's quantization of the float weight, compiled."""

    def make(codes: Tensor, scales: Tensor, weight: Tensor) -> Product:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

        config = {
            "w4a16": lambda: PrototypeInt4WeightOnlyConfig(group_size=128),  # its layout for CPUs
            "w8a16": Int8WeightOnlyConfig,
            "w8a8": Int8DynamicActivationInt8WeightConfig,
        }[name]()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        model = torch.nn.Sequential(linear).eval()
        quantize_(model, config)
        return lambda x: _compiled(x, linear.weight)

    return make


@torch.compile(dynamic=True)
def _compiled(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


PEERS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Product]]] = {
    "w4a16_g128": {
        "onnxruntime": _matmul_nbits(0),
        "onnxruntime int8": _matmul_nbits(4),
        "openvino": _openvino(4),
        "openvino int8": _openvino(4, quantizes=True),
        "torchao": _torchao("w4a16"),
    },
    "w4a8_g128": {},  # what the peers compute that say int8 above
    "w8a16": {"openvino": _openvino(8), "openvino int8": _openvino(8, quantizes=True), "torchao": _torchao("w8a16")},
    "w8a8": {"torchao": _torchao("w8a8")},
}
