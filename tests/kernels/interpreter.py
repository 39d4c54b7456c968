"""Repairs of Triton's interpreter, made by importing this before a kernel runs.

Where the interpreter (3.6 and 3.7) differs from the hardware, or fails:

1. bfloat16 is kept as raw bits: products and sums are of integers, casts truncate. Here they go
   through float32, and casts round to nearest even.
2. With numpy >= 2.4 a run-time bound of ``range`` is a TypeError.
3. Every call of a helper patches ``triton.language`` anew, which is slow and never undone. Here
   it happens once a launch.
4. Products are BLAS's, whose rounding depends on where in its tile a row lies. Here the sums of 16
   columns of half precision, or of all of float32, are rounded once.
5. Programs run in one order only. ``program_order`` shuffles them.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)


def _rounded(data):
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


_cast = InterpreterBuilder.cast_impl
_float_cast = InterpreterBuilder.create_fp_to_fp
_binary = InterpreterBuilder.binary_op
_dot = InterpreterBuilder.create_dot


def _cast_impl(self, source, target_type):
    target = target_type.scalar
    if source.dtype.scalar == tl.bfloat16:
        if target == tl.bfloat16:
            return TensorHandle(source.data, target)
        numpy_type = interpreter._get_np_dtype(target_type)
        return TensorHandle(_widened(source).astype(numpy_type), target)
    if target == tl.bfloat16:
        return TensorHandle(_rounded(source.data.astype(np.float32)), target)
    return _cast(self, source, target_type)


def _create_fp_to_fp(self, source, target_type, rounding_mode):
    if tl.bfloat16 in (source.dtype.scalar, target_type.scalar):
        return _cast_impl(self, source, target_type)
    return _float_cast(self, source, target_type, rounding_mode)


def _binary_op(self, left, right, operation):
    if left.dtype.scalar != tl.bfloat16:
        return _binary(self, left, right, operation)
    result = operation(_widened(left), _widened(right))
    if result.dtype == np.bool_:
        return TensorHandle(result, left.dtype.scalar)
    return TensorHandle(_rounded(result), tl.bfloat16)


def _create_dot(self, left, right, start, input_precision, max_num_imprecise_acc):
    if left.dtype.scalar not in (tl.bfloat16, tl.float16, tl.float32):
        return _dot(self, left, right, start, input_precision, max_num_imprecise_acc)
    total = start.data
    left_data, right_data = (_widened(side).astype(np.float64) for side in (left, right))
    # mma.sync multiplies 16 columns of half precision at once
    step = left_data.shape[-1] if left.dtype.scalar == tl.float32 else 16
    for k in range(0, left_data.shape[-1], step):
        product = left_data[..., k : k + step] @ right_data[..., k : k + step, :]
        total = (total + product).astype(np.float32)
    return TensorHandle(total, start.dtype.scalar)


InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
InterpreterBuilder.binary_op = _binary_op
InterpreterBuilder.create_dot = _create_dot


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


interpreter._patch_lang_tensor = _patch_lang_tensor


class _Nothing:
    def restore(self):
        pass


_patch = interpreter._patch_lang
_in_launch = False
_patched: set[frozenset[int]] = set()
_scopes: list = []


def _patch_lang(function):
    modules = (tl, tl.core)
    values = function.__globals__.values()
    key = frozenset(id(v) for v in values if inspect.ismodule(v) and v in modules)
    if not _in_launch:
        return _patch(function)
    if key not in _patched:
        _patched.add(key)
        _scopes.append(_patch(function))
    return _Nothing()


interpreter._patch_lang = _patch_lang

_seed: int | None = None


@contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Run the programs of every launch in an order shuffled by ``seed``; None for the usual one."""
    global _seed
    previous, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = previous


class _GridExecutor(interpreter.GridExecutor):
    def __call__(self, *args_dev, **kwargs):
        global _in_launch
        known = inspect.getfullargspec(self.fn).args
        kwargs = {k: v for k, v in kwargs.items() if k in known}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        _in_launch = True
        interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in args.items()
            }
            grid = self.grid(args) if callable(self.grid) else self.grid
            grid = (*grid, *(1,) * (3 - len(grid)))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = list(np.ndindex(*grid))
            if _seed is not None:
                random.Random(_seed).shuffle(programs)
            for program in programs:
                interpreter.interpreter_builder.set_grid_idx(*program)
                # A GPU does not warn of log(0) or of NaN.
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    self.fn(**args)
        finally:
            _in_launch = False
            while _scopes:
                _scopes.pop().restore()
            _patched.clear()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)


interpreter.GridExecutor = _GridExecutor
