"""Transformer blocks of transformer-engine's fused layers, for Llama and similar models, in bf16 and FP8.

A block fuses the matrix products of a layer: one for queries, keys and values, one after attention, and
the feed-forward network as one module. RMSNorms are fused into the products that follow them. Qwen 2's
biases belong to the first product; Qwen 3 normalizes each head's queries and keys before the rotary
embedding. Fused weights are concatenated (``FUSED``), never rounded or permuted, so ``plain_weights``
returns transformers' weights bit for bit.

**ZeRO-3.** A block is one unit (a "leaf") to DeepSpeed: its weights are gathered as a whole before its
forward and before its backward. Activation checkpointing is inside the block, so the recomputation finds
the gathered weights; around the layers it would not.

**LoRA.** The adapters are peft's, under peft's names, so that peft can save them. Base products use the
frozen, fused weights. Adapters of products that share an input share one pair of small products, whose
sum with the base needs no extra pass (``addmm``). With frozen weights the feed-forward network is two
products with the activation between them: the adapters get their inputs there, and its backward does not
prepare weight gradients, which are not needed.

**FP8.** Per-tensor scaling; the weights are quantized once per step, not once per micro-batch.

**Frozen weights in one byte.** Weights that LoRA does not change are quantized once, as they are read, and
their bfloat16 copies are freed. Hopper's products need a weight in both layouts: the transposed copy is
kept if memory allows, else a block's backward makes and drops it. Logits and gradients equal those of
weights quantized every step. These weights are not parameters, so that DeepSpeed does not cast, move or
partition them; each rank holds all of them.

**One rank.** No micro-batch's own gradient is needed: the products add to the step's gradients directly
(``accumulate``), which saves writing, reading and adding them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from fastcpt.families import cannot_fuse, head_width
from fastcpt.training.data import Batch

QKV = ("q_proj", "k_proj", "v_proj")
# a fused weight: transformers' weights in it, in the order of rows
FUSED = {
    "qkv.layer_norm_weight": ["input_layernorm.weight"],
    "qkv.weight": [f"self_attn.{name}.weight" for name in QKV],
    "qkv.bias": [f"self_attn.{name}.bias" for name in QKV],
    "q_norm.weight": ["self_attn.q_norm.weight"],
    "k_norm.weight": ["self_attn.k_norm.weight"],
    "proj.weight": ["self_attn.o_proj.weight"],
    "mlp.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.fc1_weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.fc2_weight": ["mlp.down_proj.weight"],
    # the feed-forward network with frozen weights
    "fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "fc2.weight": ["mlp.down_proj.weight"],
}
# reads the weights of the layer of a number, under their names in transformers' layer
ReadLayer = Callable[[int], Mapping[str, torch.Tensor]]


class DropTransposed(torch.autograd.Function):  # type: ignore[misc]
    """Passes a block's input through; its backward, the last of the block, drops transposed weight copies."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weights: list[Any]) -> torch.Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        for weight in ctx.weights:
            weight.update_usage(columnwise_usage=False)
        return grad, None


class HostCopy:
    """A block's input, kept in host memory until the backward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden, self.device = hidden, hidden.device

    def send(self) -> None:
        """Replace the GPU's copy by one in pinned host memory."""
        pinned = self.device.type == "cuda"
        host = torch.empty_like(self.hidden, device="cpu", pin_memory=pinned, requires_grad=False)
        self.hidden = host.copy_(self.hidden.detach(), non_blocking=True)

    def fetch(self) -> torch.Tensor:
        """The input on its device; after ``send``, a new copy that requires a gradient, as the original did."""
        if self.hidden.requires_grad:
            return self.hidden
        return self.hidden.to(self.device, non_blocking=True).requires_grad_()


class Packing:
    """The current micro-batch's layout, shared by all blocks."""

    def __init__(self, frequencies: torch.Tensor, fp8: Any | None, keep_fp8_weights: bool) -> None:
        """``frequencies`` [S, D / 2] float32: the rotary angle of each position; S is the longest row.

        ``fp8`` is transformer-engine's recipe or None. ``keep_fp8_weights``: keep quantized weights for
        all micro-batches of a step (2 bytes per weight); for frozen weights in one byte, keep the
        transposed copies (1 more byte).
        """
        self.size = len(frequencies)
        self.angles = torch.cat([frequencies, frequencies], dim=-1)[:, None, None, :].contiguous()
        self.fp8, self.keep_fp8_weights = fp8, keep_fp8_weights
        self.weights_changed = True  # since the last micro-batch
        self.cu_seqlens = torch.empty(0, dtype=torch.int32)  # [segments + 1]

    def set_batch(self, batch: Batch, device: torch.device) -> None:
        """Set ``cu_seqlens`` for a micro-batch, taken as one long row."""
        # pad to a multiple of 32 segments (empty ones), so that kernels are not replanned for each count
        cu_seqlens = torch.zeros(-(-len(batch.lengths) // 32) * 32 + 1, dtype=torch.int32)
        cu_seqlens[1 : len(batch.lengths) + 1] = torch.tensor(
            batch.lengths, dtype=torch.int32
        ).cumsum(0)
        cu_seqlens[len(batch.lengths) + 1 :] = cu_seqlens[len(batch.lengths)]
        self.cu_seqlens = cu_seqlens.to(device, non_blocking=True)

    @property
    def first(self) -> bool | None:
        """transformer-engine's ``is_first_microbatch``."""
        return self.weights_changed if self.fp8 is not None and self.keep_fp8_weights else None


class Block(nn.Module):  # type: ignore[misc]
    """A fused transformer layer, built from transformers' layer and its weights."""

    def __init__(
        self,
        layer: Any,
        weights: Mapping[str, torch.Tensor],
        config: Any,
        packing: Packing,
        attention: str,
        accumulate: bool = False,
        one_byte: bool = False,
    ) -> None:
        """``layer`` may have peft's adapters on its linear layers.

        ``weights``: its weights under transformers' names. ``accumulate``: a matrix's gradient is not
        returned to autograd but added to its ``main_grad`` by the product that computes it. ``one_byte``:
        the matrices are frozen and kept only in FP8.
        """
        super().__init__()
        import transformer_engine.pytorch as te

        self.packing, self.attention = packing, attention
        self.recomputed = self.input_on_host = self.feed_forward_recomputed = False
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        hidden, self.width = config.hidden_size, head_width(config)
        self.split = [heads * self.width, groups * self.width, groups * self.width]
        norm = weights["input_layernorm.weight"]
        self.frozen = not norm.requires_grad
        made = {
            "bias": False,
            "params_dtype": norm.dtype,
            "device": "meta" if one_byte else norm.device,
            "fuse_wgrad_accumulation": accumulate,
        }
        normed = {**made, "normalization": "RMSNorm", "eps": config.rms_norm_eps}
        attn, self.self_attn = layer.self_attn, adapters_of(layer.self_attn)
        self.qkv = te.LayerNormLinear(
            hidden,
            sum(self.split),
            return_layernorm_output=not self.self_attn._modules.keys().isdisjoint(QKV),
            **{**normed, "bias": "self_attn.q_proj.bias" in weights},
        )
        if "self_attn.q_norm.weight" in weights:
            own = {"eps": config.rms_norm_eps, "device": made["device"], "dtype": norm.dtype}
            self.q_norm, self.k_norm = (te.RMSNorm(self.width, **own) for _ in range(2))
        self.proj = te.Linear(heads * self.width, hidden, **made)
        self._make_feed_forward(layer.mlp, (hidden, config.intermediate_size), made, normed)
        if attention == "transformer_engine":
            self.core = te.DotProductAttention(
                heads,
                self.width,
                num_gqa_groups=groups,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                layer_number=attn.layer_idx + 1,
            )
        self.one_byte: list[Any] = []  # the frozen matrices, of shape [out, in]
        self._take(weights, accumulate, one_byte)

    def _make_feed_forward(
        self, plain: nn.Module, sides: tuple[int, int], made: dict[str, Any], normed: dict[str, Any]
    ) -> None:
        """Create its modules without weights: two products for frozen weights, else one module for both."""
        import transformer_engine.pytorch as te

        hidden, inner = sides
        if not self.frozen:
            self.mlp = te.LayerNormMLP(hidden, inner, activation="swiglu", **normed)
            return
        self.mlp = adapters_of(plain)
        widening = not self.mlp._modules.keys().isdisjoint(("gate_proj", "up_proj"))
        self.fc1 = te.LayerNormLinear(hidden, 2 * inner, return_layernorm_output=widening, **normed)
        self.activation = te.ops.SwiGLU()
        self.fc2 = te.Linear(inner, hidden, **made)

    def _take(self, weights: Mapping[str, torch.Tensor], accumulate: bool, one_byte: bool) -> None:
        """Fill the fused weights; adapters keep their own weights but lose their base layer."""
        names = {name for name, _ in self.named_parameters()}
        for name, parts in FUSED.items():
            if name not in names:
                continue
            taken = [weights[part] for part in parts]
            if one_byte:
                self._freeze(name, taken)
                continue
            fused = self.get_parameter(name)
            with torch.no_grad():
                fused.copy_(torch.cat(taken))
            fused.requires_grad_(taken[0].requires_grad)
            if accumulate and fused.ndim > 1:
                fused.main_grad = torch.zeros_like(fused)
        for adapted in (self.self_attn, self.mlp) if self.frozen else ():
            for linear in adapted.children():
                linear.base_layer = nn.Identity()

    def _freeze(self, name: str, parts: list[torch.Tensor]) -> None:
        """Set a module's frozen weight: a matrix in FP8, not as a parameter; a norm unchanged."""
        place, _, attribute = name.rpartition(".")
        module = self.get_submodule(place)
        whole = torch.cat([part.detach() for part in parts])
        if whole.ndim == 1:
            setattr(module, attribute, nn.Parameter(whole, requires_grad=False))
            return
        delattr(module, attribute)
        setattr(module, attribute, fp8_weight(whole, self.packing.keep_fp8_weights))
        self.one_byte.append(getattr(module, attribute))

    def recompute(self, what: Literal["full", "mlp", "none"], input_on_host: bool = False) -> None:
        """Set what the backward recomputes: the whole layer, the feed-forward network or nothing.

        ``input_on_host``: keep the input of a recomputed layer in host memory.
        """
        self.recomputed, self.input_on_host = what == "full", input_on_host
        if self.frozen:
            self.feed_forward_recomputed = what == "mlp"
        else:
            self.mlp.checkpoint = what == "mlp"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] for the T tokens of a whole micro-batch."""
        if not (self.recomputed and torch.is_grad_enabled()):
            return self._forward(hidden)
        import transformer_engine.pytorch as te

        out: torch.Tensor
        if not self.input_on_host:
            out = te.checkpoint(self._forward, hidden, use_reentrant=False)
            return out
        copy = HostCopy(hidden)
        out = te.checkpoint(lambda: self._forward(copy.fetch()), use_reentrant=False)
        copy.send()
        return out

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = self.packing.first
        if self.one_byte and not self.packing.keep_fp8_weights and torch.is_grad_enabled():
            hidden = DropTransposed.apply(hidden, self.one_byte)
        qkv = self.qkv(hidden, is_first_microbatch=first)
        if isinstance(qkv, tuple):
            qkv, normed = qkv
            qkv = adapt(self.self_attn, qkv, normed, QKV, self.split)
        context = self._attend(qkv)
        out = self.proj(context, is_first_microbatch=first)
        hidden = hidden + adapt(self.self_attn, out, context, ("o_proj",), [out.shape[-1]])
        if self.feed_forward_recomputed and torch.is_grad_enabled():
            import transformer_engine.pytorch as te

            out = te.checkpoint(self._feed_forward, hidden, use_reentrant=False)
            return hidden + out
        return hidden + self._feed_forward(hidden)

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = self.packing.first
        out: torch.Tensor
        if not self.frozen:
            out = self.mlp(hidden, is_first_microbatch=first)
            return out
        widened = self.fc1(hidden, is_first_microbatch=first)
        if isinstance(widened, tuple):
            widened, normed = widened
            half = widened.shape[-1] // 2
            widened = adapt(self.mlp, widened, normed, ("gate_proj", "up_proj"), [half, half])
        inner = self.activation(widened)
        out = self.fc2(inner, is_first_microbatch=first)
        return adapt(self.mlp, out, inner, ("down_proj",), [out.shape[-1]])

    def _attend(self, qkv_TD: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

        cu_seqlens, size = self.packing.cu_seqlens, self.packing.size
        q, k, v = (
            part.view(len(qkv_TD), -1, self.width) for part in qkv_TD.split(self.split, dim=-1)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        turned = {"tensor_format": "thd", "fused": True, "cu_seqlens": cu_seqlens}
        q = apply_rotary_pos_emb(q, self.packing.angles, **turned)
        k = apply_rotary_pos_emb(k, self.packing.angles, **turned)
        if self.attention == "transformer_engine":
            context: torch.Tensor = self.core(
                q,
                k,
                v.contiguous(),
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=size,
                max_seqlen_kv=size,
            )
            return context
        from flash_attn import flash_attn_varlen_func

        context = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, size, size, causal=True)
        return context.flatten(1)


def adapters_of(part: nn.Module) -> nn.Module:
    """peft's adapters of attention or the feed-forward network, under their names."""
    adapted = nn.Module()
    for name, linear in list(part.named_children()):
        if hasattr(linear, "base_layer"):
            adapted.add_module(name, linear)
    return adapted


def adapt(
    adapted: nn.Module,
    base: torch.Tensor,
    inputs: torch.Tensor,
    names: Sequence[str],
    widths: Sequence[int],
) -> torch.Tensor:
    """``base`` [T, sum(widths)] plus the outputs of the adapters ``names`` for ``inputs``."""
    present = adapted._modules
    found = [present[name] for name in names if name in present]
    if not found:
        return base
    (adapter,) = found[0].active_adapters
    dropped = found[0].lora_dropout[adapter](inputs)  # one mask for all adapters of this input
    down = [linear.lora_A[adapter].weight for linear in found]
    small = dropped @ (torch.cat(down) if len(down) > 1 else down[0]).T
    up = [
        present[name].lora_B[adapter].weight * present[name].scaling[adapter]
        if name in present
        else base.new_zeros(width, 0)
        for name, width in zip(names, widths, strict=True)
    ]
    return torch.addmm(base, small, (torch.block_diag(*up) if len(up) > 1 else up[0]).T)


def with_fused_blocks(
    causal: Any,
    size: int,
    attention: str,
    fp8: bool,
    keep_fp8_weights: bool,
    zero3: Any | None,
    device: torch.device,
    accumulate: bool = False,
    one_byte: bool = False,
    read: ReadLayer | None = None,
) -> Packing:
    """Replace a model's layers by ``Block``s, in place; returns their shared ``Packing``.

    ``size`` is the length of the longest row; ``accumulate`` and ``one_byte`` as in ``Block``. ``zero3``
    is DeepSpeed's configuration if weights are partitioned: each layer is gathered, fused and partitioned
    again before the next one. ``read`` reads a layer's weights if the layers are placeholders.
    """
    config = causal.config
    rotary = causal.model.rotary_emb
    positions = torch.arange(size, device=device, dtype=torch.float32)
    frequencies = positions[:, None] * rotary.inv_freq.to(device, torch.float32)
    packing = Packing(frequencies, fp8_recipe() if fp8 else None, keep_fp8_weights)
    layers = causal.model.layers
    for n, layer in enumerate(layers):
        before = list(layer.parameters())
        with _whole(before, zero3):
            weights = own_weights(layer) if read is None else read(n)
            block = Block(layer, weights, config, packing, attention, accumulate, one_byte)
        del weights
        layers[n] = block
        kept = {id(parameter) for parameter in block.parameters()}
        for parameter in before:  # free the storage: DeepSpeed still references the parameters
            if id(parameter) not in kept:
                whole = parameter if zero3 is None else parameter.ds_tensor
                whole.data = whole.data.new_empty(0)
        if zero3 is not None:
            import deepspeed

            deepspeed.zero.Init(module=block, config_dict_or_path=zero3)
    return packing


def can_fuse(config: Mapping[str, Any], dtype: str, attention: str, size: int) -> bool:
    """Whether a model (its ``read_config``) can use fused blocks on this host."""
    return (
        importlib.util.find_spec("transformer_engine") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and cannot_fuse(config, dtype, attention, size) is None
    )


def own_weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's weights under transformers' names, even if peft has wrapped them."""
    return {name.replace(".base_layer.", "."): p for name, p in layer.named_parameters()}


@contextmanager
def _whole(parameters: list[Any], zero3: Any | None) -> Iterator[None]:
    if zero3 is None:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def fp8_recipe() -> Any:
    """Scales from each tensor's own maximum, without state between steps."""
    from transformer_engine.common.recipe import Float8CurrentScaling

    return Float8CurrentScaling()


def fp8_weight(weight: torch.Tensor, transposed: bool) -> Any:
    """transformer-engine's FP8 tensor of a matrix [out, in], scaled as its layers scale their weights.

    ``transposed``: with the transposed copy for the backward, in one more byte.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    scaling = Float8CurrentScaling().fp8_quant_fwd_weight
    quantizer = te.Float8CurrentScalingQuantizer(
        te.DType.kFloat8E4M3,
        weight.device,
        rowwise=True,
        columnwise=transposed,
        force_pow_2_scales=scaling.power_2_scale,
        amax_epsilon=scaling.amax_epsilon,
    )
    with torch.no_grad():
        return quantizer(weight)


def autocast(fp8: Any | None) -> Any:
    """transformer-engine's FP8 context for a recipe; a null context without one."""
    if fp8 is None:
        return nullcontext()
    import transformer_engine.pytorch as te

    return te.autocast(enabled=True, recipe=fp8)


def plain_weights(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Split fused weights back into transformers' weights, exactly; others stay as they are."""
    width = head_width(config)
    qkv = [config.num_attention_heads * width] + 2 * [config.num_key_value_heads * width]
    gated = 2 * [config.intermediate_size]
    rows = {"qkv.weight": qkv, "qkv.bias": qkv, "mlp.fc1_weight": gated, "fc1.weight": gated}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        place = re.fullmatch(r"(.*layers\.\d+\.)(.+)", name)
        if not place or place[2] not in FUSED:
            plain[name] = weight
            continue
        parts = weight.split(rows.get(place[2], [len(weight)]))
        for part, piece in zip(FUSED[place[2]], parts, strict=True):
            plain[place[1] + part] = piece.clone() if len(parts) > 1 else piece
    return plain
