"""`--where`: an expression over the columns of a table that reaches columns, literals and operators, and nothing else.

It is parsed as Python and worked out here, node by node, so that what is not in the tables below cannot be said at all.
A missing value counts as in pandas: of comparisons only `!=` holds for it. `== None` asks for one.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import pandas as pd

from skipcost.bench.errors import BenchError

ACCEPTED = (
    "columns, numbers, texts, lists, True, False and None, with == != < <= > >=, in, and, or, not, + - * / // % "
    "and brackets"
)
ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.eq,
    ast.IsNot: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
LOGIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
PLAIN = (int, float, str, type(None))  # bool is an int


def rows_where(frame: pd.DataFrame, text: str) -> pd.DataFrame:
    """The rows for which an expression holds; BenchError in one sentence for what is none."""
    try:
        holds = _condition(_value(ast.parse(text.strip(), mode="eval").body, frame))
        kept: pd.DataFrame = frame[holds.fillna(value=False).astype(bool)]
    except (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError) as error:
        deep = isinstance(error, RecursionError | MemoryError)
        why = "it is nested too deeply" if deep else error.msg if isinstance(error, SyntaxError) else str(error)
        message = (
            f"--where {text!r} cannot be worked out: {why}; accepted are {ACCEPTED}; columns are: "
            f"{', '.join(frame.columns)}"
        )
        raise BenchError(message) from None
    return kept


def _value(node: ast.expr, frame: pd.DataFrame) -> Any:  # noqa: PLR0911 - a line for each form that there is
    """What a part of the expression is worth: a column, a literal, or a column that was worked out."""
    match node:
        case ast.Name(name):
            return _column(name, frame)
        case ast.Constant(value) if isinstance(value, PLAIN):
            return value
        case ast.List(parts) | ast.Tuple(parts) | ast.Set(parts):
            return [_literal(part, frame) for part in parts]
        case ast.UnaryOp(ast.USub(), part):
            return -_number(_value(part, frame))
        case ast.UnaryOp(ast.Not() | ast.Invert(), part):
            return ~_condition(_value(part, frame))
        case ast.BinOp(left, kind, right) if type(kind) in ARITHMETIC:
            return ARITHMETIC[type(kind)](_number(_value(left, frame)), _number(_value(right, frame)))
        case ast.BinOp(left, kind, right) if type(kind) in LOGIC:
            return _joined(kind, [left, right], frame)
        case ast.BoolOp(kind, parts):
            return _joined(kind, parts, frame)
        case ast.Compare(first, kinds, others):
            return _compared(first, kinds, others, frame)
    message = f"{ast.unparse(node)[:60]!r} is a {type(node).__name__.lower()}, which is not accepted"
    raise ValueError(message)


def _column(name: str, frame: pd.DataFrame) -> pd.Series[Any]:
    if name == frame.index.name:
        return frame.index.to_series()
    if name not in frame.columns:
        message = f"{name!r} is no column"
        raise ValueError(message)
    return frame[name]


def _literal(node: ast.expr, frame: pd.DataFrame) -> Any:
    value = _value(node, frame)
    if not isinstance(value, PLAIN):
        message = f"a list holds numbers and texts, not {ast.unparse(node)[:60]!r}"
        raise ValueError(message)  # noqa: TRY004 - the user's text is wrong, not a type in the program
    return value


def _number(value: Any) -> Any:
    """A number or a column of numbers, to compute with."""
    plain = isinstance(value, int | float)
    if plain or (isinstance(value, pd.Series) and pd.api.types.is_numeric_dtype(value)):
        return value
    message = f"{value.name if isinstance(value, pd.Series) else repr(value)[:60]} is no number to compute with"
    raise ValueError(message)


def _is_condition(value: Any) -> bool:
    return isinstance(value, pd.Series) and pd.api.types.is_bool_dtype(value)


def _condition(value: Any) -> Any:
    """A column of truth values: what may be missing is neither true nor false."""
    if not _is_condition(value):
        message = "conditions are asked for, and joined by and, or, not: put brackets round each, as in (width > 8)"
        raise ValueError(message)
    return value.astype("boolean")


def _joined(kind: ast.AST, parts: list[ast.expr], frame: pd.DataFrame) -> Any:
    whole = _condition(_value(parts[0], frame))
    for part in parts[1:]:
        whole = LOGIC[type(kind)](whole, _condition(_value(part, frame)))
    return whole


def _compared(first: ast.expr, kinds: list[ast.cmpop], others: list[ast.expr], frame: pd.DataFrame) -> Any:
    """A chain such as 8 < width <= 64 holds where each of its comparisons does."""
    values = [_value(each, frame) for each in (first, *others)]
    found = [_pair(left, kind, right) for left, kind, right in zip(values, kinds, values[1:], strict=False)]
    whole = found[0].astype("boolean")
    for each in found[1:]:
        whole &= each.astype("boolean")
    return whole


def _pair(left: Any, kind: ast.cmpop, right: Any) -> pd.Series[Any]:
    among = isinstance(right, list)
    if isinstance(left, pd.Series) and among and isinstance(kind, ast.In | ast.Eq):
        return left.isin(right)
    if isinstance(left, pd.Series) and among and isinstance(kind, ast.NotIn | ast.NotEq):
        return ~left.isin(right)
    column = left if isinstance(left, pd.Series) else right
    if among or isinstance(left, list) or not isinstance(column, pd.Series) or type(kind) not in ORDERS:
        message = "a comparison takes a column on one side; a list stands behind in"
        raise ValueError(message)
    if left is None or right is None:
        missing = column.isna()
        return ~missing if isinstance(kind, ast.NotEq | ast.IsNot) else missing
    compared = ORDERS[type(kind)](left, right)
    return compared.astype("boolean") if isinstance(compared, pd.Series) else pd.Series(compared, column.index)
