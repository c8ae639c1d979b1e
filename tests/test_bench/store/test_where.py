"""`--where`: expressions over columns, which reach columns, literals and operators alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pandas as pd
import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.store import where
from skipcost.bench.store.where import rows_where

FRAME = pd.DataFrame(
    {
        "variant": ["unet", "unet3+", None],
        "width": pd.array([8, 16, None], dtype="Int64"),
        "latency_s": [0.1, float("nan"), 0.3],
        "bias": pd.array([True, False, None], dtype="boolean"),
        "graph": [True, True, False],
    },
    index=pd.Index(["a", "b", "c"], name="case_id"),
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("variant == 'unet3+'", "b"),
        ("width > 8 and variant == 'unet3+'", "b"),
        ("width > 8 or latency_s > 0.2", "bc"),
        ("(width > 8) | (latency_s > 0.2)", "bc"),
        ("(width >= 8) & ~(latency_s > 0.2)", "ab"),
        ("8 < width <= 16", "b"),
        ("16 >= width > 8", "b"),
        ("variant in ['unet', 'unet++']", "a"),
        ("variant in ('unet', 'unet3+')", "ab"),
        ("variant not in {'unet'}", "bc"),
        ("variant == ['unet']", "a"),
        ("variant != 'unet'", "bc"),
        ("bias", "a"),
        ("not bias", "b"),
        ("graph and bias == True", "a"),
        ("latency_s * 1e3 < 200", "a"),
        ("width / 2 + 1 == 5", "a"),
        ("-width < -8", "b"),
        ("width % 16 == 0", "b"),
        ("width // 5 == 3", "b"),
        ("width // 0 > 1", ""),
        ("latency_s == None", "b"),
        ("latency_s is not None", "ac"),
        ("width is None", "c"),
        ("latency_s == latency_s", "ac"),
        ("case_id == 'b'", "b"),
        ("10000000000000000000000 > width", "ab"),
        ("  width > 8", "b"),
    ],
)
def test_an_expression_keeps_the_rows_for_which_it_holds(text: str, kept: str) -> None:
    """As pandas reads it."""
    assert "".join(rows_where(FRAME, text).index) == kept


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("@pd.compat", "invalid syntax"),
        ("__import__('os')", "is a call"),
        ("variant.str.contains('u')", "is a call"),
        ("variant.str == 'u'", "is a attribute"),
        ("(lambda: width)() > 1", "is a call"),
        ("width == (lambda: 8)", "is a lambda"),
        ("[w for w in variant] == 'u'", "is a listcomp"),
        ("variant[0] == 'u'", "is a subscript"),
        ("f'{width}' == variant", "is a joinedstr"),
        ("(x := 8) < width", "is a namedexpr"),
        ("width if bias else graph", "is a ifexp"),
        ("width ** 99 > 1", "is a binop"),
        ("variant in [width]", "a list holds numbers and texts"),
        ("b'u' == variant", "is a constant"),
        ("breadth > 8", "'breadth' is no column"),
        ("__name__ == 'x'", "'__name__' is no column"),
        ("pd", "'pd' is no column"),
        ("width", "conditions are asked for"),
        ("1 < 2", "takes a column on one side"),
        ("'u' in variant", "takes a column on one side"),
        ("width > 8 & bias", "put brackets round each"),
        ("variant > 3", "not supported between"),
        ("variant + 'x' == 'unetx'", "variant is no number"),
        ("'x' * 10000000000 == variant", "'x' is no number"),
        ("1 / 0 < width", "division by zero"),
        ("", "invalid syntax"),
        ("width >", "invalid syntax"),
        ("width\0 > 8", "null bytes"),
        ("(" * 500 + "bias" + ")" * 500, "nested parentheses"),
        ("not " * 9999 + "bias", "nested too deeply"),
    ],
)
def test_what_is_no_column_literal_or_operator_is_refused(text: str, why: str) -> None:
    """One sentence with what was met, what is accepted, and the columns."""
    with pytest.raises(BenchError) as refused:
        rows_where(FRAME, text)

    told = str(refused.value)
    assert why in told
    assert "accepted are columns, numbers, texts" in told
    assert told.endswith("columns are: variant, width, latency_s, bias, graph")
    assert "\n" not in told


def test_no_other_name_is_in_reach() -> None:
    """The evaluator calls nothing by a name that a text holds: it has no eval, and takes no column for code."""
    named = {node.id for node in ast.walk(ast.parse(Path(where.__file__).read_text())) if isinstance(node, ast.Name)}

    assert not named & {"eval", "exec", "compile", "getattr", "globals", "vars", "__import__"}
