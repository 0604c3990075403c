from __future__ import annotations

from itertools import pairwise

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    *,
    tensor_format: str,
    fused: bool,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    assert tensor_format == "thd"
    assert fused
    ends = cu_seqlens.tolist()
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    angles = freqs[positions, 0]  # [T, 1, D]
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
