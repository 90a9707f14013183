"""The gated activations of ``gates.py``, in registers."""

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """``f(gate) * up`` in float32, with the settings of a ``gates.Gate``; what is no number stays none."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if FUNCTION == "silu":
        result = gate / (1.0 + tl.exp(-ALPHA * gate))
    elif FUNCTION == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        result = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(FUNCTION == "relu" or FUNCTION == "relu2")
        result = tl.where(gate < 0.0, 0.0, gate)
        if FUNCTION == "relu2":
            result *= result
    return result * (up + SHIFT)
