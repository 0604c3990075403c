"""Computes the losses of documents in batches of windows, which the ranks share.

Windows are sorted by length, batched, and the batches distributed over the ranks. A window's loss depends
only on its own tokens, as attention is causal and padding comes last. Losses are summed per document in
double precision. So the result does not depend on the batch size or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from fastcpt.progress import Progress
from fastcpt.training.ranks import rank, say_once, world_size
from fastcpt.training.validation import EvaluationError, HeldOutDocument, Window, windows_of

# Tokens per batch, padding included: enough to keep a GPU busy; what fits a CPU's caches.
GPU_BATCH, CPU_BATCH = 16_384, 2_048
SCORED_AT_ONCE = 2048  # tokens whose logits exist at the same time, here as two float32 copies


class Scorer(nn.Module):  # type: ignore[misc]
    """A model whose forward returns losses."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, row_T: torch.Tensor, place_T: torch.Tensor, chunks: int
    ) -> torch.Tensor:
        """The loss (float64 ``[T]``) of each token ``input_ids[row, place]`` of ``[B, S]``.

        Rows are padded at the end, which causal attention never sees. The output layer is called
        ``chunks`` times, to limit the memory for logits.
        """
        causal = self.model
        causal = causal.get_base_model() if hasattr(causal, "get_base_model") else causal
        hidden = causal.model(input_ids=input_ids, use_cache=False)[0]  # [B, S, H]
        # a token is predicted from the hidden state before it
        wanted, targets_T = hidden[row_T, place_T - 1], input_ids[row_T, place_T]
        del hidden
        losses = [
            nn.functional.cross_entropy(causal.lm_head(states).float(), asked, reduction="none")
            for states, asked in zip(
                wanted.tensor_split(chunks), targets_T.tensor_split(chunks), strict=True
            )
        ]
        return torch.cat(losses).double()


def document_losses(
    scorer: Scorer,
    documents: list[HeldOutDocument],
    size: int,
    device: torch.device,
    batch_tokens: int | None = None,
    what: str = "",
) -> npt.NDArray[np.float64]:
    """The summed negative log likelihood (nats) of each document's tokens, without the first.

    Every rank gets all sums. ``EvaluationError`` if the model's vocabulary or context is too small.
    """
    _check_fit(scorer.model, documents, size)
    windows = windows_of([len(document.input_ids) for document in documents], size)
    windows.sort(key=lambda window: window.begin - window.end)  # the longest first
    fast = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    batches = list(_batches(windows, batch_tokens or fast))
    sums = torch.zeros(len(documents), dtype=torch.float64, device=device)
    progress = Progress(f"evaluate {what}", "windows", len(windows), say_once)
    for start in range(0, len(batches), world_size()):
        # One batch per rank. A partitioned model needs the same calls on all ranks, so each calls the
        # output layer as often as the largest batch needs, even if it has no batch left.
        together = batches[start : start + world_size()]
        most = max(sum(window.end - window.first for window in batch) for batch in together)
        batch = together[rank()] if rank() < len(together) else []
        sums += _losses(scorer, documents, batch, math.ceil(most / SCORED_AT_ONCE), device)
        progress.add(sum(map(len, together)))
    if dist.is_initialized():
        dist.all_reduce(sums)
    answer: npt.NDArray[np.float64] = sums.cpu().numpy()
    return answer


def _batches(windows: list[Window], batch_tokens: int) -> Iterable[list[Window]]:
    """Consecutive windows (the longest first) whose padded size stays within ``batch_tokens``."""
    begin = 0
    while begin < len(windows):
        longest = windows[begin].end - windows[begin].begin
        many = max(1, batch_tokens // longest)
        yield windows[begin : begin + many]
        begin += many


@torch.no_grad()  # type: ignore[untyped-decorator]
def _losses(
    scorer: Scorer,
    documents: list[HeldOutDocument],
    batch: list[Window],
    chunks: int,
    device: torch.device,
) -> torch.Tensor:
    """What a batch of windows (longest first) adds to each document's sum, float64."""
    longest = batch[0].end - batch[0].begin if batch else 1
    input_ids = np.zeros((max(1, len(batch)), longest), np.int64)
    rows, places, owners = ([np.empty(0, np.int64)] for _ in range(3))
    for row, window in enumerate(batch):
        tokens = documents[window.document].input_ids[window.begin : window.end]
        input_ids[row, : len(tokens)] = tokens
        counted = window.end - window.first
        rows.append(np.full(counted, row))
        places.append(np.arange(window.first, window.end) - window.begin)
        owners.append(np.full(counted, window.document))
    row_T, place_T, owner_T = (
        torch.from_numpy(np.concatenate(parts)).to(device) for parts in (rows, places, owners)
    )
    losses = scorer(torch.from_numpy(input_ids).to(device), row_T, place_T, chunks)
    sums = torch.zeros(len(documents), dtype=torch.float64, device=device)
    return sums.index_add_(0, owner_T, losses)


def _check_fit(model: Any, documents: list[HeldOutDocument], size: int) -> None:
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    for document in documents:
        if len(document.input_ids) and int(document.input_ids.max()) >= vocabulary:
            raise EvaluationError(
                f"document '{document.id}' holds token {int(document.input_ids.max())}, the model "
                f"knows {vocabulary}: the corpus was built with another tokenizer than the model's"
            )
    if size > context:
        raise EvaluationError(
            f"corpus.max_seq_length ({size}) is longer than the model's context ({context})"
        )
