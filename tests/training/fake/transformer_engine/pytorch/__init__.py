from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class DType:
    kFloat8E4M3 = torch.float8_e4m3fn


class Float8Tensor(torch.Tensor):
    """Values of FP8, and whether the transposed copy is there."""

    transposed: bool

    @staticmethod
    def __new__(cls, values: torch.Tensor, transposed: bool) -> Float8Tensor:
        made = torch.Tensor._make_subclass(cls, values)
        made.transposed = transposed
        return made

    def update_usage(self, columnwise_usage: bool) -> None:
        self.transposed = columnwise_usage


class Float8CurrentScalingQuantizer:
    def __init__(self, kind: torch.dtype, device: torch.device, **settings: Any) -> None:
        assert settings["rowwise"]
        self.kind, self.transposed = kind, settings["columnwise"]

    def __call__(self, values: torch.Tensor) -> Float8Tensor:
        return Float8Tensor(_rounded(values, self.kind), self.transposed)


def _rounded(values: torch.Tensor, kind: torch.dtype = DType.kFloat8E4M3) -> torch.Tensor:
    scale = torch.finfo(kind).max / values.detach().abs().max().float()
    narrow = (values.detach().float() * scale).to(kind)
    return (narrow.float() / scale).to(values.dtype)


_in_fp8 = False


@contextmanager
def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
    """Inside it weights that are not quantized yet are, before each product; nothing else is."""
    global _in_fp8
    before, _in_fp8 = _in_fp8, enabled
    try:
        yield
    finally:
        _in_fp8 = before


def _weight(*shape: int, made: dict[str, Any]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=made["params_dtype"], device=made["device"]))


class _Product(torch.autograd.Function):
    """``x @ weight.T``; the weight's gradient is added to ``weight.main_grad``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fresh: bool | None) -> Any:
        ctx.save_for_backward(x)
        ctx.weight, ctx.fresh = weight, fresh
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, out: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if ctx.fresh:
            ctx.weight.main_grad.zero_()
        ctx.weight.main_grad += out.T @ x
        return out @ ctx.weight, None, None


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.T`` by a weight in one byte; the backward makes its transposed copy, which stays."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Float8Tensor) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.as_subclass(torch.Tensor))

    @staticmethod
    def backward(ctx: Any, out: torch.Tensor) -> Any:
        ctx.weight.update_usage(columnwise_usage=True)
        return out @ ctx.weight.as_subclass(torch.Tensor), None


def _linear(add_up: bool, x: torch.Tensor, weight: torch.Tensor, fresh: bool | None) -> Any:
    if add_up:
        return _Product.apply(x, weight, fresh)
    if isinstance(weight, Float8Tensor):
        return _FrozenProduct.apply(x, weight)
    if _in_fp8:
        weight = weight + (_rounded(weight) - weight.detach())  # its gradient passes the rounding
    return nn.functional.linear(x, weight)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, **made: Any) -> None:
        super().__init__()
        self.weight = _weight(outputs, inputs, made=made)
        self.add_up = made["fuse_wgrad_accumulation"]
        assert not made["bias"]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return _linear(self.add_up, x, self.weight, is_first_microbatch)


class LayerNormLinear(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, return_layernorm_output: bool, eps: float, **made: Any
    ) -> None:
        super().__init__()
        self.layer_norm_weight = _weight(inputs, made=made)
        self.weight = _weight(outputs, inputs, made=made)
        self.bias = _weight(outputs, made=made) if made["bias"] else torch.empty(0)
        self.both, self.eps = return_layernorm_output, eps
        self.add_up = made["fuse_wgrad_accumulation"]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        out = _linear(self.add_up, normed, self.weight, is_first_microbatch)
        out = out + self.bias if len(self.bias) else out
        return (out, normed) if self.both else out


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


class ops:
    class SwiGLU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return silu(gate) * up


class LayerNormMLP(nn.Module):
    checkpoint = False

    def __init__(self, inputs: int, inner: int, activation: str, eps: float, **made: Any) -> None:
        super().__init__()
        assert activation == "swiglu"
        self.layer_norm_weight = _weight(inputs, made=made)
        self.fc1_weight = _weight(2 * inner, inputs, made=made)
        self.fc2_weight = _weight(inputs, inner, made=made)
        self.eps, self.add_up = eps, made["fuse_wgrad_accumulation"]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        product = _linear(self.add_up, normed, self.fc1_weight, is_first_microbatch)
        gate, up = product.chunk(2, dim=-1)
        return _linear(self.add_up, silu(gate) * up, self.fc2_weight, is_first_microbatch)


class DotProductAttention(nn.Module):
    def __init__(self, heads: int, width: int, *, num_gqa_groups: int, **_: Any) -> None:
        super().__init__()
        self.repeats = heads // num_gqa_groups

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        ends, out = cu_seqlens_q.tolist(), []
        for a, b in pairwise(ends):
            q_, k_, v_ = (part[a:b].transpose(0, 1) for part in (q, k, v))
            k_, v_ = (part.repeat_interleave(self.repeats, 0) for part in (k_, v_))
            seen = nn.functional.scaled_dot_product_attention(q_, k_, v_, is_causal=True)
            out.append(seen.transpose(0, 1))
        return torch.cat(out).flatten(1)


def checkpoint(function: Any, *args: Any, use_reentrant: bool) -> Any:
    in_fp8 = _in_fp8

    def again(*args: Any) -> Any:
        with autocast(in_fp8, None):
            return function(*args)

    return torch_checkpoint(again, *args, use_reentrant=use_reentrant)
