"""aten's operations behind their aclnn calls, as far as models, weight preparation and the tests need them.

They are not what is tested here. Each is the torch function of its name, or nearly so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pretend import TYPES, aclnn
from torch import Tensor
from torch.nn import functional as F


def unary(**functions: Callable[[Tensor], Tensor]) -> None:
    for name, function in functions.items():
        aclnn(name, "x > y")(function)


def binary(**functions: Callable[[Tensor, Tensor], Tensor]) -> None:
    for name, function in functions.items():
        aclnn(name, "x other > y")(function)


def with_scalar(**functions: Callable[[Tensor, float], Tensor]) -> None:
    for name, function in functions.items():
        aclnn(name, "x other:scalar > y")(function)


unary(
    Abs=torch.abs, Neg=torch.neg, Cos=torch.cos, Sin=torch.sin, Exp=torch.exp, Rsqrt=torch.rsqrt, Sqrt=torch.sqrt,
    Sigmoid=torch.sigmoid, Silu=F.silu, Round=torch.round, Reciprocal=torch.reciprocal, LogicalNot=torch.logical_not,
    BitwiseNot=torch.bitwise_not, IsFinite=torch.isfinite, Tanh=torch.tanh, Relu=torch.relu, Log=torch.log,
    Floor=torch.floor,
)  # fmt: skip
binary(
    Mul=torch.mul, Div=torch.div, Maximum=torch.maximum, Minimum=torch.minimum, LogicalAnd=torch.logical_and,
    LogicalOr=torch.logical_or, BitwiseAndTensor=torch.bitwise_and, BitwiseOrTensor=torch.bitwise_or,
    BitwiseXorTensor=torch.bitwise_xor, EqTensor=torch.eq, NeTensor=torch.ne, LtTensor=torch.lt, LeTensor=torch.le,
    GtTensor=torch.gt, GeTensor=torch.ge, RightShift=torch.bitwise_right_shift, LeftShift=torch.bitwise_left_shift,
    FloorDivide=torch.floor_divide, PowTensorTensor=torch.pow,
)  # fmt: skip
with_scalar(
    Muls=torch.mul, Divs=torch.div, EqScalar=torch.eq, NeScalar=torch.ne, LtScalar=torch.lt, LeScalar=torch.le,
    GtScalar=torch.gt, GeScalar=torch.ge, BitwiseAndScalar=torch.bitwise_and, BitwiseOrScalar=torch.bitwise_or,
    BitwiseXorScalar=torch.bitwise_xor, LeftShifts=torch.bitwise_left_shift, FloorDivides=torch.floor_divide,
    PowTensorScalar=torch.pow, RemainderTensorScalar=torch.remainder,
)  # fmt: skip


@aclnn("Add", "x other alpha:scalar > y")
def add(x, other, alpha):
    return torch.add(x, other, alpha=alpha)


@aclnn("Adds", "x other:scalar alpha:scalar > y")
def adds(x, other, alpha):
    return torch.add(x, other, alpha=alpha)


@aclnn("Sub", "x other alpha:scalar > y")
def sub(x, other, alpha):
    return torch.sub(x, other, alpha=alpha)


@aclnn("Subs", "x other:scalar alpha:scalar > y")
def subs(x, other, alpha):
    return torch.sub(x, other, alpha=alpha)


@aclnn("Rsubs", "x other:scalar alpha:scalar > y")
def rsubs(x, other, alpha):
    return torch.rsub(x, other, alpha=alpha)


@aclnn("Addcmul", "x a b value:scalar > y")
def addcmul(x, a, b, value):
    return torch.addcmul(x, a, b, value=value)


@aclnn("Clamp", "x low?:scalar high?:scalar > y")
def clamp(x, low, high):
    return x.clamp(low, high)


@aclnn("Cast", "x dtype:int > y")
def cast(x, dtype):
    return x.to(TYPES[dtype])


@aclnn("SWhere", "condition x other > y")
def where(condition, x, other):
    return torch.where(condition, x, other)


@aclnn("ScatterValue", "x dim:int index value:scalar reduce:int > y")
def scatter_value(x, dim, index, value, reduce):
    assert reduce == 0  # replace
    return x.scatter(dim, index, value)


# ------------------------------------------------------------------------------------------------------- in place


@aclnn("InplaceCopy", "to source")
def copy(to, source):
    to.copy_(source)


@aclnn("InplaceZero", "to")
def zero(to):
    to.zero_()


@aclnn("InplaceOne", "to")
def one(to):
    to.fill_(1)


@aclnn("InplaceFillScalar", "to value:scalar")
def fill(to, value):
    to.fill_(value)


@aclnn("InplaceMaskedFillScalar", "to mask value:scalar")
def masked_fill(to, mask, value):
    to.masked_fill_(mask, value)


@aclnn("InplaceAdds", "to other:scalar alpha:scalar")
def add_to(to, other, alpha):
    to.add_(other, alpha=alpha)


@aclnn("InplaceScatter", "to dim:int index source reduce:int")
def scatter(to, dim, index, source, reduce):
    if reduce:
        raise NotImplementedError("a scatter that reduces")
    to.scatter_(dim, index, source)


@aclnn("Scatter", "x dim:int index source reduce:int > y")
def scattered(x, dim, index, source, reduce):
    if reduce:
        raise NotImplementedError("a scatter that reduces")
    return x.scatter(dim, index, source)


# ----------------------------------------------------------------------------------------------------- reductions


@aclnn("ReduceSum", "x dims:ints keep:bool dtype:int > y")
def reduce_sum(x, dims, keep, dtype):
    return x.sum(dims or None, keepdim=keep, dtype=TYPES[dtype])


@aclnn("Mean", "x dims:ints keep:bool dtype:int > y")
def mean(x, dims, keep, dtype):
    return x.mean(dims or None, keepdim=keep, dtype=TYPES[dtype])


@aclnn("Amax", "x dims:ints keep:bool > y")
def amax(x, dims, keep):
    return x.amax(dims or (), keepdim=keep)


@aclnn("Amin", "x dims:ints keep:bool > y")
def amin(x, dims, keep):
    return x.amin(dims or (), keepdim=keep)


@aclnn("Any", "x dims:ints keep:bool > y")
def any_of(x, dims, keep):
    return x.any() if len(dims) == x.dim() and not keep else x.any(dims[0], keepdim=keep)


@aclnn("All", "x dims:ints keep:bool > y")
def all_of(x, dims, keep):
    return x.all() if len(dims) == x.dim() and not keep else x.all(dims[0], keepdim=keep)


@aclnn("Cumsum", "x dim:int dtype:int > y")
def cumsum(x, dim, dtype):
    return x.cumsum(dim, dtype=TYPES[dtype])


@aclnn("Softmax", "x dim:int > y")
def softmax(x, dim):
    return x.softmax(dim)


@aclnn("TopkV2", "x k:int dim:int largest:bool sorted:bool index_type:int > values index")
def topk(x, k, dim, largest, is_sorted, index_type):
    return tuple(torch.topk(x, k, dim, largest, is_sorted))


@aclnn("Sort", "x stable:bool dim:int descending:bool > values index")
def sort(x, stable, dim, descending):
    return tuple(torch.sort(x, dim=dim, descending=descending, stable=stable))


@aclnn("ArgMax", "x dim:int keep:bool > y")
def argmax(x, dim, keep):
    return x.argmax(dim, keepdim=keep)


# --------------------------------------------------------------------------------------------------------- shapes


@aclnn("Cat", "tensors:list dim:int > y")
def cat(tensors, dim):
    return torch.cat(tensors, dim)


@aclnn("Stack", "tensors:list dim:int > y")
def stack(tensors, dim):
    return torch.stack(tensors, dim)


@aclnn("Arange", "start:scalar end:scalar step:scalar y:out")
def arange(start, end, step, y):
    return torch.arange(start, end, step, dtype=y.dtype)


@aclnn("Triu", "x diagonal:int > y")
def triu(x, diagonal):
    return x.triu(diagonal)


@aclnn("ConstantPadNd", "x pad:ints value:scalar > y")
def pad(x, pad, value):
    return F.pad(x, pad, value=value)


@aclnn("RepeatInterleaveIntWithDim", "x repeats:int dim:int size:int > y")
def repeat_interleave(x, repeats, dim, size):
    return x.repeat_interleave(repeats, dim)


@aclnn("Embedding", "weight index > y")
def embedding(weight, index):
    return F.embedding(index, weight)


@aclnn("IndexSelect", "x dim:int index > y")
def index_select(x, dim, index):
    return x.index_select(dim, index)


@aclnn("Gather", "x dim:int index > y")
def gather(x, dim, index):
    return x.gather(dim, index)


@aclnn("Index", "x index:list y:out")
def index(x, index, y):
    return x[tuple(index)]


@aclnn("SearchSorted", "sorted values int32:bool right:bool sorter? > y")
def search_sorted(ordered, values, int32, right, sorter):
    return torch.searchsorted(ordered, values, right=right, out_int32=int32)


# ------------------------------------------------------------------------------------------------------- products


@aclnn("Matmul", "x other > y")
def matmul(x, other):
    return torch.matmul(x, other)


@aclnn("Mm", "x other > y")
def mm(x, other):
    return torch.mm(x, other)


@aclnn("BatchMatMul", "x other > y")
def bmm(x, other):
    return torch.bmm(x, other)


@aclnn("Addmm", "bias x other beta:scalar alpha:scalar > y")
def addmm(bias, x, other, beta, alpha):
    return torch.addmm(bias, x, other, beta=beta, alpha=alpha)


@aclnn("FlashAttentionScore",
       "query key value shift? drop? padding? hidden? prefix:ints scale:double keep:double before:int after:int "
       "heads:int layout:text precision:int sparse_mode:int > largest sum softmax y")  # fmt: skip
def flash_attention(
    query, key, value, shift, drop, padding, hidden, prefix, scale, keep, before, after, heads, layout, precision,
    sparse_mode,
):  # fmt: skip
    """hidden: True where a query does not see a key; in sparse mode 2 the pattern of causal masks, of any size."""
    if layout != "BNSD" or keep != 1 or shift is not None or drop is not None:
        raise NotImplementedError(f"{layout}, dropout or a shift")
    rows, columns = query.shape[2], key.shape[2]
    if sparse_mode == 2:
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    visible = None if hidden is None else ~hidden.bool()
    result = F.scaled_dot_product_attention(
        query, key, value, visible, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return None, None, None, result
