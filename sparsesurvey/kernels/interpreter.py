"""Triton 3.6's interpreter with three faults mended, so that a machine without a GPU can check the kernels' numerics.

It turns a one-element array into an int as numpy 2.4 no longer allows; it multiplies the bit patterns of bf16 numbers
in ``tl.dot`` (triton-lang/triton#11584); and it cuts float32 off to bf16 where a GPU rounds to nearest even.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def mend() -> None:
    """Mend the interpreter of this process; a second call changes nothing."""
    if not hasattr(Builder, "mended"):
        Builder.mended = True
        interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
        Builder.create_dot = _dot_of_numbers(Builder.create_dot)
        Builder.cast_impl = _rounding(Builder.cast_impl)


def _with_index(patch):
    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def _dot_of_numbers(dot):
    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *rest)
        return Handle(np.matmul(_widened(a), _widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def _widened(handle) -> np.ndarray:
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


def _rounding(cast):
    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
        return Handle(rounded.astype(np.uint16), dst_type.scalar)

    return cast_impl
