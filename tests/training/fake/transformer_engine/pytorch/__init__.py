from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def _weight(*shape: int, made: dict[str, Any]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=made["params_dtype"], device=made["device"]))


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, **made: Any) -> None:
        super().__init__()
        self.weight = _weight(outputs, inputs, made=made)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return linear(x, self.weight)


class LayerNormLinear(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, return_layernorm_output: bool, eps: float, **made: Any
    ) -> None:
        super().__init__()
        self.layer_norm_weight = _weight(inputs, made=made)
        self.weight = _weight(outputs, inputs, made=made)
        self.both, self.eps = return_layernorm_output, eps

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        out = linear(normed, self.weight)
        return (out, normed) if self.both else out


class LayerNormMLP(nn.Module):
    checkpoint = False

    def __init__(self, inputs: int, inner: int, activation: str, eps: float, **made: Any) -> None:
        super().__init__()
        assert activation == "swiglu"
        self.layer_norm_weight = _weight(inputs, made=made)
        self.fc1_weight = _weight(2 * inner, inputs, made=made)
        self.fc2_weight = _weight(inputs, inner, made=made)
        self.eps = eps

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        normed = rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        gate, up = linear(normed, self.fc1_weight).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.fc2_weight)


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
    return torch_checkpoint(function, *args, use_reentrant=use_reentrant)
