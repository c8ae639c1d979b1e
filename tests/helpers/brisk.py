"""Lets Triton's interpreter leave out work that changes nothing, half of its time and more; for tests only.

As it comes (triton 3.6 to 3.9) the interpreter computes every sum, difference and product of whole numbers a second
time, in 64 bits, to say that it overflowed, and then says nothing, since its options say `debug=False`; it writes out
the table of types for each value; and for each call of one kernel by another it goes through all of the language,
replacing what is replaced already. `install` mends these three; where a triton is made otherwise, it is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Make the interpreter of this process quicker; a second call changes nothing."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug and hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)
    for name, quicker in (("_get_np_dtype", _remembered), ("_patch_lang", _once)):
        original = getattr(interpreter, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(interpreter, name, quicker(original))


def _remembered(original: Callable[..., Any]) -> Callable[..., Any]:
    """Write out the table of types once for each type; a block has its elements' type."""
    scalar = functools.cache(original)

    @functools.wraps(original)
    def get_np_dtype(tt_dtype: Any) -> Any:
        element = tt_dtype.scalar
        return original(element) if element.is_ptr() else scalar(element)  # a pointer's type has no hash

    return get_np_dtype


def _once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace no language that is replaced: a kernel calls another while its own replacements hold."""

    @functools.wraps(original)
    def patch_lang(fn: Callable[..., Any]) -> Any:
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in (tl, *seen)):
            return original(fn)
        return None  # what a call by a kernel gets is not looked at

    return patch_lang
