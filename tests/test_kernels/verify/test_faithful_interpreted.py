"""The interpreter computes as a GPU does, and quicker; a triton it does not know is refused.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/verify/test_faithful_interpreted.py
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed, so there is no interpreter: pip install 'skipcost[gpu]'", allow_module_level=True
    )

import brisk
import faithful
import triton
import triton.language as tl
from faithful import REPLACEMENTS, UnfaithfulError, install, self_test
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
BITS = st.integers(-(2**31), 2**31 - 1)  # of a number of 32 bits: every NaN, every subnormal


def from_bits(numbers: list[int]) -> torch.Tensor:
    """Numbers in fp32, in a length that Triton takes."""
    return torch.tensor(numbers, dtype=torch.int32).view(torch.float32)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all numbers are equal, with NaN for NaN."""
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Triton's own methods, put back for one check."""
    methods = {name: getattr(BUILDER, name).replaces for name in REPLACEMENTS}
    for name, method in methods.items():
        monkeypatch.setattr(BUILDER, name, method)
    return methods


def test_importing_the_helpers_makes_the_interpreter_faithful() -> None:
    """A check file does nothing for it, and doing it again changes nothing."""
    before = {name: getattr(BUILDER, name) for name in REPLACEMENTS}

    install()

    assert all(hasattr(method, "replaces") for method in before.values())
    assert before == {name: getattr(BUILDER, name) for name in REPLACEMENTS}


@settings(max_examples=40)
@given(st.lists(BITS, min_size=64, max_size=64))
def test_casts_of_any_bits_are_pytorchs(numbers: list[int]) -> None:
    """From fp32 to bf16 and back, and to fp16: ties, subnormals, infinities and every NaN."""
    x = from_bits(numbers)

    for dtype in (torch.bfloat16, torch.float16):
        rounded, back = torch.empty(64, dtype=dtype), torch.empty(64)
        faithful._convert[(1,)](x, rounded, size=64)
        faithful._convert[(1,)](rounded, back, size=64)
        assert same(rounded, x.to(dtype))
        assert same(back, x.to(dtype).float())


@settings(max_examples=40)
@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=128, max_size=128))
def test_bf16_arithmetic_of_any_bits_is_pytorchs(numbers: list[int]) -> None:
    """Sums, differences, products, signs, comparisons, and what both maxima do with NaN."""
    a, b = torch.tensor(numbers, dtype=torch.int16).view(torch.bfloat16).view(2, 64)
    result = torch.empty(8, 64, dtype=torch.bfloat16)

    faithful._combine[(1,)](a, b, result, size=64)

    ignoring = (torch.where(a.isnan(), b, torch.where(b.isnan(), a, each(a, b))) for each in (torch.max, torch.min))
    expected = [a + b, a - b, a * b, -a, torch.where(a > b, a, b), *ignoring, a.maximum(b)]
    for actual, wanted in zip(result, expected, strict=True):
        assert same(actual, wanted)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_are_of_what_the_operands_are(dtype: torch.dtype, precision: str) -> None:
    """Random operands of 16 bits are multiplied exactly, those of 32 bits too, or cut to 10 bits of mantissa before."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype)
    result = torch.empty(16, 16)

    faithful._multiply[(1,)](a, b, result, size=16, precision=precision)

    cut = precision == "tf32" and dtype == torch.float32
    a, b = ((x.view(torch.int32) & -(1 << 13)).view(torch.float32) if cut else x for x in (a, b))
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


def test_products_in_float64_stay_exact() -> None:
    """Gradients are checked against differences in float64, through kernels that ask for "ieee" or "tf32"."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16, dtype=torch.float64)

    for precision in ("ieee", "tf32"):
        result = torch.empty(16, 16, dtype=torch.float64)
        faithful._multiply[(1,)](a, b, result, size=16, precision=precision)
        torch.testing.assert_close(result, a @ b, rtol=1e-14, atol=1e-14)


def test_overflow_and_nan_raise_no_warning() -> None:
    """Numbers beyond fp16 become infinite, infinity minus itself NaN; numpy's warnings would be errors here."""
    x, result = torch.tensor([1e30, -1e30, float("inf"), float("nan")]), torch.empty(4, dtype=torch.float16)
    faithful._convert[(1,)](x, result, size=4)
    combined = torch.empty(8, 4)
    faithful._combine[(1,)](x, x.clone(), combined, size=4)
    full, product = torch.full((16, 16), float("inf")), torch.empty(16, 16)
    faithful._multiply[(1,)](full, torch.zeros(16, 16), product, size=16, precision="ieee")

    assert same(result, x.half())
    assert same(combined[1], x - x)
    assert product.isnan().all()


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_the_self_test_misses_each_replacement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one method as triton has it, the self-test fails; but where that triton has it right, it may pass."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    right = {"unary_op": version < (3, 8), "create_maxnumf": version >= (3, 8), "create_minnumf": version >= (3, 8)}
    monkeypatch.setattr(BUILDER, name, getattr(BUILDER, name).replaces)

    if right.get(name):
        self_test()
    else:
        with pytest.raises(
            UnfaithfulError, match=rf"triton {triton.__version__} fails in the self-test: .* gives .*, not"
        ):
            self_test()


def test_a_method_that_takes_other_arguments_is_refused(
    stock: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names triton's version, the method and its arguments, and nothing is replaced."""
    monkeypatch.setattr(BUILDER, "binary_op", lambda self, left, right, op: (self, left, right, op))

    with pytest.raises(UnfaithfulError) as caught:
        install()

    assert f"triton {triton.__version__} has InterpreterBuilder.binary_op(self, left, right, op)" in str(caught.value)
    assert "not (self, lhs, rhs, op)" in str(caught.value)
    assert BUILDER.create_dot is stock["create_dot"]


@pytest.mark.usefixtures("stock")
def test_a_method_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a triton without the class itself."""
    monkeypatch.delattr(BUILDER, "create_masked_load")

    with pytest.raises(
        UnfaithfulError, match=r"has no InterpreterBuilder\.create_masked_load\. Without tests/helpers/faithful"
    ):
        install()

    monkeypatch.delattr(interpreter, "InterpreterBuilder")
    with pytest.raises(UnfaithfulError, match=r"has no InterpreterBuilder\.create_dot"):
        install()


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), UnfaithfulError("wrong sum")], ids=["breaks", "differs"])
def test_a_failed_self_test_leaves_triton_as_it_was(
    error: Exception, stock: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signatures fit, results do not: the error says so, and the interpreter is triton's own again."""

    def fail() -> None:
        assert all(getattr(BUILDER, name) is not method for name, method in stock.items())
        raise error

    monkeypatch.setattr(faithful, "self_test", fail)

    with pytest.raises(UnfaithfulError, match=r"wrong sum|breaks in the self-test with ZeroDivisionError: by 0"):
        install()

    assert {name: getattr(BUILDER, name) for name in REPLACEMENTS} == stock


@triton.jit  # type: ignore[untyped-decorator]
def _sum_and_largest(x, y, result, size: tl.constexpr) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001 - of Triton
    """Store x + y [size] as result [0:size], and then their largest, which a kernel of the language finds."""
    i = tl.arange(0, size)
    total = tl.load(x + i) + tl.load(y + i)
    tl.store(result + i, total)
    tl.store(result + size, tl.max(total, 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_what_is_quicker_gives_what_it_gave(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums beyond a type wrap without a word, in the interpreter as it comes too; and a kernel may call another."""
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    x, y = torch.full((4,), limit, dtype=dtype), torch.arange(4).to(dtype)
    quicker, as_it_comes = torch.zeros(2, 5, dtype=dtype)
    _sum_and_largest[(1,)](x, y, quicker, size=4)
    for name in ("_get_np_dtype", "_patch_lang"):
        monkeypatch.setattr(interpreter, name, getattr(interpreter, name).__wrapped__)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())

    _sum_and_largest[(1,)](x, y, as_it_comes, size=4)

    assert torch.equal(quicker, as_it_comes)
    assert torch.equal(quicker[:4], x + y)
    assert tl.core.is_builtin(tl.load)  # after a launch the language is triton's own


def test_being_quicker_is_taken_up_once() -> None:
    """A second call changes nothing, and what is not done is the sum whose verdict nobody hears."""
    before = interpreter._get_np_dtype, interpreter._patch_lang

    brisk.install()

    assert (interpreter._get_np_dtype, interpreter._patch_lang) == before
    assert not interpreter.interpreter_builder.options.sanitize_overflow
