"""Triton's interpreter, mended to compute what the compiled kernel computes.

`mend()` has to run before a kernel is first interpreted. Looked at: Triton 3.7.1 and 3.9.0.
What it changes:

- Casts to bfloat16 round to nearest even (the interpreter truncates float32 and reinterprets the
  other types); all casts from and to bfloat16 go through float32.
- Arithmetic, comparisons, reductions and atomics on bfloat16 raise TypeError: the interpreter
  would compute on the bit patterns as if they were integers. (Of what Triton itself converts first,
  nothing is refused: max and min.)
- maximum, minimum and clamp drop a NaN, as PTX max.f32 does, instead of returning it.
- A reduction by one's own function combines halves instead of one element after the other: faster
  by orders of magnitude, and nearer to the order on a GPU.
- exp is exp2(x * log2(e)) with a rounded product, exp2 flushes subnormal results: ex2.approx[.ftz].
- fma rounds once.
- A masked load without `other` gives NaN or 0x5A where masked (it gave 0): it is undefined.
- Arguments have the compiled kernel's types: a float is float32 (it stayed a Python float), an
  integer from 2**31 is int64 (its data was uint32), a bool is int1 (it raised). Loop variables are
  int32 or int64 tensors (they were Python integers that cannot overflow).
- Overflow in int32 arithmetic raises.
- `and`, `or`, `not`, `min`, `max` are elementwise on tensors (`a and b` gave b); `if` of several
  elements raises (it was True), and so does `a < b < c`.
- The interpreted language is put in place once a launch, not at every call of a function, and a
  check for overflow is one operation: less than half the time.
- What a kernel raises is raised as it is, not as the text of an InterpreterError.

What it cannot show: ex2.approx and the division of float32 err by up to 2 ulp, here by half a one
or so (`exp2_off_by` plants an error); ptxas contracts a * b + c to an fma; a sum has another order;
a float out of an integer's range converts to something else; programs run one after the other.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from . import interpreter_ops
from .interpreter_ops import Handle, mend_operations, replace

INTERPRETING = bool(triton.knobs.runtime.interpret)


def _arguments(original: Any) -> Any:
    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool | int | float):
            name = triton.runtime.jit.mangle_type(arg).replace("u1", "i1")
            dtype = tl.str_to_ty(name, None)
            data = np.array([arg], interpreter._get_np_dtype(dtype))
            return tl.tensor(Handle(data, dtype), dtype)
        return original(arg)

    return implicit_cvt


def loop_range(begin: Any, end: Any = None, step: Any = 1, **_: Any) -> Iterator[Any]:
    """What range and tl.range become: the variable is a tensor, as in a compiled kernel."""
    semantic = interpreter.interpreter_semantic
    begin, end = (0, begin) if end is None else (begin, end)
    bounds = [semantic.to_tensor(x) for x in (begin, end, step)]
    dtype = tl.int64 if any(x.dtype.int_bitwidth == 64 for x in bounds) else tl.int32
    for value in range(*(int(x.handle.data.item()) for x in bounds)):
        yield semantic.scalar_constant(value, dtype)


def bool_op(name: str, left: Any, right: Callable[[], Any]) -> Any:
    """`and`, `or`: elementwise and without short cut on tensors, as a compiled kernel has it."""
    semantic = interpreter.interpreter_semantic
    if isinstance(left, tl.tensor):
        return getattr(semantic, f"logical_{name}")(left, semantic.to_tensor(right()))
    return (left and right()) if name == "and" else (left or right())


def not_op(x: Any) -> Any:
    return interpreter.interpreter_semantic.not_(x) if isinstance(x, tl.tensor) else not x


def truth(x: Any) -> bool:
    if isinstance(x, tl.tensor) and x.handle.data.size != 1:
        raise TypeError("a tensor of several elements is neither true nor false")
    return bool(x)


def extreme(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls min or max; the compiler takes Python's for tl.minimum and tl.maximum."""
    if function in (min, max) and any(isinstance(x, tl.tensor) for x in args):
        return {min: tl.minimum, max: tl.maximum}[function](*args)
    return function(*args, **kwargs)


class _Transformer(interpreter.ASTTransformer):
    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        return super().visit_Assign(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call):
            name = getattr(node.iter.func, "attr", getattr(node.iter.func, "id", None))
            if name == "range":
                node.iter.func = ast.Name(id="loop_range", ctx=ast.Load())
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        name = "and" if isinstance(node.op, ast.And) else "or"
        result, *others = node.values
        for value in others:
            later = ast.parse("lambda: 0", mode="eval").body
            later.body = value
            result = _call("bool_op", ast.Constant(name), result, later)
        return result

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) > 1:
            raise TypeError(f"the compiler refuses the chained comparison {ast.unparse(node)}")
        return self.generic_visit(node)

    def _visit_test(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("truth", node.test)
        return node

    visit_If = visit_While = visit_IfExp = visit_Assert = _visit_test

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if getattr(node.func, "id", None) in ("min", "max"):
            node.args.insert(0, node.func)
            node.func = ast.Name(id="extreme", ctx=ast.Load())
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("not_op", node.operand) if isinstance(node.op, ast.Not) else node


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(args), keywords=[])


_in_place = set[frozenset[str]]()


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules that its calls of the language go through."""
    found = function.__globals__.values()
    return frozenset(module.__name__ for module in (tl, tl.core) if any(x is module for x in found))


def _patch_once(original: Any) -> Any:
    """Triton puts the interpreted language in place again at every call of a device function, which
    took a third of the time; here once a launch."""

    def patch_lang(function: Any) -> Any:
        if (languages := _languages(function)) in _in_place:
            return interpreter._LangPatchScope()
        _in_place.add(languages)
        return original(function)

    return patch_lang


def _numpys_type(original: Any) -> Any:
    """Triton makes a table of all types at every call."""
    known = functools.cache(original)
    return lambda dtype: known(dtype) if type(dtype) is tl.dtype else original(dtype)


def _run(original: Any) -> Any:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _in_place.clear()  # the last launch restored the language
        try:
            with np.errstate(all="ignore"):
                return original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__:
                cause = cause.__cause__
            raise cause from None

    return run


@contextmanager
def exp2_off_by(error: float) -> Iterator[None]:
    """Every exp2 is too small by that share, also of whole numbers: ex2.approx may err by 2^-22."""
    with patch.object(interpreter_ops, "exp2_error", error):
        yield


_mended = False


def mend() -> None:
    """Mends the interpreter of this process; further calls do nothing."""
    global _mended
    if _mended:
        return
    if not INTERPRETING:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    mend_operations()
    replace(interpreter, "_implicit_cvt", _arguments)
    replace(interpreter, "_patch_lang", _patch_once)
    replace(interpreter, "_get_np_dtype", _numpys_type)
    for function in (loop_range, bool_op, not_op, truth, extreme):
        # The rewritten kernels see the globals of Triton's module.
        setattr(interpreter, function.__name__, function)
    replace(interpreter.FunctionRewriter, "ast_transformer", lambda _: _Transformer())
    interpreter.InterpretedFunction.rewritten_fn.clear()
    replace(interpreter.InterpretedFunction, "run", _run)
    _mended = True
