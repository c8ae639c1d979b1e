"""Makes Triton's interpreter compute as a GPU does where it computes otherwise; for tests only.

As it comes (triton 3.6 to 3.9) the interpreter adds, multiplies and compares the bit patterns of bf16 as integers
(triton#11584), cuts fp32 to bf16 where hardware rounds, takes tf32 for fp32, propagates NaN through `tl.maximum` (to
3.7), and reads 0 where a load is masked and does not say what to read. `install` replaces the methods behind these.
They are private to triton: it first sees that they are as known here, and then runs kernels whose results are certain.

Left as they are: reductions, scans, `tl.fma` and `tl.clamp` of bf16. Kernels widen to fp32 right after a load.
"""
# ruff: noqa: ANN001, ANN002, ANN003, ANN202 - Triton reads a kernel's annotations as types; methods are as triton's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

TF32_BITS = np.uint32(0xFFFFE000)  # sign, exponent, and those 10 bits of the mantissa that tensor cores read
BELOW_HALF = np.uint32(0x7FFF)  # just less than half of the last bit that bf16 keeps
NAN_BITS = np.uint32(0x7FC0)


class UnfaithfulError(RuntimeError):
    """This triton's interpreter cannot be made faithful; the message says which triton, and what differs."""


def install() -> None:
    """Replace what is unfaithful for the whole process and test the outcome; a second call changes nothing.

    Raises UnfaithfulError, with everything as it was, where this triton is not as the replacements know it.
    """
    if not triton.knobs.runtime.interpret:
        _refuse("does not interpret: set TRITON_INTERPRET=1 before it is first imported")
    builder = getattr(interpreter, "InterpreterBuilder", None)
    originals = {name: getattr(builder, name, None) for name in REPLACEMENTS}
    if all(hasattr(original, "replaces") for original in originals.values()):
        return
    replacements = {name: REPLACEMENTS[name](original) for name, original in originals.items()}
    for name, original in originals.items():
        _check_signature(name, original, replacements[name])
    for name, replacement in replacements.items():
        replacement.replaces = originals[name]
        setattr(builder, name, replacement)
    try:
        self_test()
    except Exception as error:
        for name, original in originals.items():
            setattr(builder, name, original)
        if isinstance(error, UnfaithfulError):
            raise
        _refuse(f"breaks in the self-test with {type(error).__name__}: {error}")


def _check_signature(name: str, original: Any, replacement: Callable[..., Any]) -> None:
    if not callable(original):
        _refuse(f"has no InterpreterBuilder.{name}")
    known, found = ([*inspect.signature(each).parameters] for each in (replacement, original))
    if "rest" in known:  # what follows is handed on as it comes
        known, found = known[: known.index("rest")], found[: known.index("rest")]
    if found != known:
        _refuse(f"has InterpreterBuilder.{name}({', '.join(found)}), not ({', '.join(known)})")


def _refuse(reason: str) -> NoReturn:
    message = (
        f"triton {triton.__version__} {reason}. Without tests/helpers/faithful.py its interpreter computes bf16 and "
        "tf32 wrongly, so no kernel was checked: adapt that file to this triton, or install one from 3.6 to 3.9"
    )
    raise UnfaithfulError(message)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    """The numbers of a handle, bf16 as fp32."""
    if not _is_bf16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_to_bf16(values: Any) -> Any:
    """A handle with fp32 values rounded to the nearest bf16, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + BELOW_HALF + odd) >> np.uint32(16)
    return interpreter.TensorHandle(np.where(np.isnan(values), NAN_BITS, rounded).astype(np.uint16), tl.bfloat16)


def _cut_to_tf32(values: Any) -> Any:
    return np.where(np.isnan(values), values, (values.view(np.uint32) & TF32_BITS).view(np.float32))


def _dot(original: Callable[..., Any]) -> Any:
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        operands = [_wide(a), _wide(b)]
        if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            operands = [_cut_to_tf32(each) for each in operands]
        with np.errstate(all="ignore"):
            product = np.matmul(*operands, dtype=d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


def _cast(original: Callable[..., Any]) -> Any:
    def cast_impl(self, src, dst_type):
        types = (src.dtype.scalar, dst_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            return _round_to_bf16(src.data)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_wide(src), tl.float32)
        with np.errstate(all="ignore"):  # a GPU does not warn of overflow either
            return original(self, src, dst_type)

    return cast_impl


def _binary(original: Callable[..., Any]) -> Any:
    def binary_op(self, lhs, rhs, op):
        with np.errstate(all="ignore"):
            if not (_is_bf16(lhs) and _is_bf16(rhs)):
                return original(self, lhs, rhs, op)
            result = op(_wide(lhs), _wide(rhs))
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _round_to_bf16(result)

    return binary_op


def _unary(original: Callable[..., Any]) -> Any:
    def unary_op(self, arg, op):
        with np.errstate(all="ignore"):
            return _round_to_bf16(op(_wide(arg))) if _is_bf16(arg) else original(self, arg, op)

    return unary_op


def _maximum(_original: Callable[..., Any]) -> Any:
    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    return create_maxnumf


def _minimum(_original: Callable[..., Any]) -> Any:
    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    return create_minnumf


def _masked_load(original: Callable[..., Any]) -> Any:
    def create_masked_load(self, ptrs, mask, other, *rest, **named):
        if other is None:
            element = ptrs.get_element_ty()
            numbers = np.dtype(interpreter._get_np_dtype(element))
            garbage = np.full(ptrs.data.shape, -1, dtype=f"int{8 * numbers.itemsize}")  # as a float, NaN
            other = interpreter.TensorHandle(garbage.view(numbers), element)
        return original(self, ptrs, mask, other, *rest, **named)

    return create_masked_load


REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "create_dot": _dot,
    "cast_impl": _cast,
    "binary_op": _binary,
    "unary_op": _unary,
    "create_maxnumf": _maximum,
    "create_minnumf": _minimum,
    "create_masked_load": _masked_load,
}


@triton.jit
def _convert(x, result, size: tl.constexpr) -> None:
    """Store x [size] as result [size], in the type of the result."""
    i = tl.arange(0, size)
    tl.store(result + i, tl.load(x + i).to(result.dtype.element_ty))


@triton.jit
def _combine(x, y, result, size: tl.constexpr) -> None:
    """Store as result [8, size] what x and y [size] can be to each other, computed in their own type."""
    i = tl.arange(0, size)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(result + i, a + b)
    tl.store(result + size + i, a - b)
    tl.store(result + 2 * size + i, a * b)
    tl.store(result + 3 * size + i, -a)
    tl.store(result + 4 * size + i, tl.where(a > b, a, b))
    tl.store(result + 5 * size + i, tl.maximum(a, b))
    tl.store(result + 6 * size + i, tl.minimum(a, b))
    tl.store(result + 7 * size + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _multiply(a, b, result, size: tl.constexpr, precision: tl.constexpr) -> None:
    """Store the product of a and b [size, size] as result [size, size]."""
    place = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    total = tl.zeros((size, size), dtype=result.dtype.element_ty)
    total = tl.dot(tl.load(a + place), tl.load(b + place), total, input_precision=precision, out_dtype=total.dtype)
    tl.store(result + place, total)


@triton.jit
def _load_half(x, result, size: tl.constexpr) -> None:
    """Store as result [size] the first half of x, then whatever a masked load without `other` gives."""
    i = tl.arange(0, size)
    tl.store(result + i, tl.load(x + i, mask=i < size // 2))


def self_test() -> None:
    """Run kernels whose results are certain; UnfaithfulError names the first that is wrong."""
    for test in (_test_casts, _test_arithmetic, _test_products, _test_masked_loads):
        test()


def _test_casts() -> None:
    """Ties go to even, what is above them up, the largest number to infinity; NaN whose upper bits are 0 stays NaN."""
    step = 2.0**-7  # between 1 and 2, in bf16
    special = [float("inf"), -float("inf"), float("nan"), -0.0, 3.4e38, 2.0**-133, 1.5 * 2.0**-133, 2.0**-140]
    ties = [1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 1 + step / 2 + 2.0**-23, 1 + step / 2 - 2.0**-23, 1 / 3, 1e9]
    x = torch.tensor([*special, *ties, 0.0])
    x.view(torch.int32)[-1] = 0x7F800001
    rounded = torch.empty(16, dtype=torch.bfloat16)
    _convert[(1,)](x, rounded, size=16)
    _expect("the cast from fp32 to bf16", rounded, x.to(torch.bfloat16))
    back = torch.empty(16)
    _convert[(1,)](rounded, back, size=16)
    _expect("the cast from bf16 to fp32", back, rounded.float())


def _test_arithmetic() -> None:
    """All that two numbers can be to each other: of either sign, tiny, huge, infinite and NaN, in bf16 and fp32."""
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0078125, 3.0, 2.0**-120, -3.3e38, float("inf"), float("nan"), 0.1])
    pairs = torch.cartesian_prod(numbers, numbers)[:64]
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (each.contiguous().to(dtype) for each in (pairs[:, 0], pairs[:, 1]))
        result = torch.empty(8, 64, dtype=dtype)
        _combine[(1,)](a, b, result, size=64)
        expected = [a + b, a - b, a * b, -a, torch.where(a > b, a, b), a.fmax(b), a.fmin(b), a.maximum(b)]
        names = ("a + b", "a - b", "a * b", "-a", "a > b", "tl.maximum", "tl.minimum", "tl.maximum with NaN")
        for name, actual, wanted in zip(names, result, expected, strict=True):
            _expect(f"{name} in {dtype}", actual + 0, wanted + 0)  # hardware may choose which zero is the larger


def _test_products() -> None:
    """Whole numbers below 2**8 are exact in bf16, and so are the sums of their products in fp32."""
    a, b = (torch.arange(256.0).mul(step).remainder(255).sub(127).view(16, 16) for step in (7, 11))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _expect(f"tl.dot of {dtype}", _product(a.to(dtype), b.to(dtype), "ieee"), a @ b)
    cut = torch.full((16, 16), 1 + 2.0**-11 + 2.0**-12)  # to the nearest tf32, this would be 1 + 2**-10
    ones = torch.eye(16)
    for left, right in ((cut, ones), (ones, cut)):
        _expect("tl.dot with tf32 operands", _product(left, right, "tf32"), torch.ones(16, 16))
        _expect("tl.dot with input_precision='ieee'", _product(left, right, "ieee"), cut)


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    result = torch.empty(16, 16)
    _multiply[(1,)](a, b, result, size=16, precision=precision)
    return result


def _test_masked_loads() -> None:
    """A masked element without `other` is NaN: kernels that rely on it are found out."""
    x = torch.arange(16.0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        result = torch.empty(16, dtype=dtype)
        _load_half[(1,)](x.to(dtype), result, size=16)
        _expect(f"a masked load of {dtype}", result, torch.where(x < 8, x, torch.nan).to(dtype))


def _expect(what: str, actual: Tensor, expected: Tensor) -> None:
    """Compare every bit, but let any NaN stand for any other."""
    for got, wanted in zip(actual.flatten(), expected.flatten(), strict=True):
        if not (got.isnan() and wanted.isnan()) and not torch.equal(
            *(x[None].view(torch.uint8) for x in (got, wanted))
        ):
            _refuse(f"fails in the self-test: {what} gives {got:.9g}, not {wanted:.9g}")
