"""Perplexity and bits per byte of held-out documents, for the trained model and its base.

**What is counted.** A document is ``BOS text EOT``. Every token but the first is predicted once,
from what stands before it in its own document: the first token of the text from BOS, the end from
the whole text. A tokenizer without BOS has nothing to predict the first token from; it is not
counted. ``perplexity = exp(sum of negative log likelihoods / tokens counted)``, and
``bits_per_byte = sum / ln 2 / UTF-8 bytes of the texts``, which compares across tokenizers.

**Windows.** A document longer than the context is read in windows that overlap by half: past the
first window, every counted token has between half and a whole context before it.

**The same number everywhere.** Batches are cut from all windows before they are dealt to the
ranks, losses are taken in float32 and summed a document in float64. Batch size and number of
ranks then change only the order of the sums (and, in bfloat16, roundings that average out).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet
import torch
from torch import nn

from fastcpt.files import digest_of, read_json, sha256_of_file, write_json
from fastcpt.training.inference import (
    SILENCE,
    Ranks,
    base_of,
    final_of,
    identity_of,
    join_ranks,
    place_model,
)

FORMAT = 1
CHUNK = 1024  # tokens whose logits exist at one time
LONGEST = 4096  # tokens of a window where no corpus manifest says how long a sequence is
GPU_BATCH, CPU_BATCH = 8, 2  # full windows a forward

Figures = dict[str, Any]


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked; the message says what to change."""


class Documents(NamedTuple):
    """One validation set, a document an entry."""

    ids: list[npt.NDArray[np.int32]]
    sizes: list[int]  # UTF-8 bytes of the text
    years: list[int | None]
    areas: list[list[str]]


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a document, of which those from ``first`` on are counted."""

    document: int
    begin: int
    end: int
    first: int


def evaluate(
    checkpoint: str,
    validation: Path,
    output: Path,
    *,
    base: str | None = None,
    gate_set: str = "random",
    attention: str = "auto",
    dtype: str = "bfloat16",
    batch_size: int | None = None,
    sharded: bool | None = None,
) -> dict[str, Any]:
    """Evaluate ``checkpoint``, and ``base`` beside it, on the sets of ``validation``.

    Called by every rank of a launcher, or by one process alone. ``validation`` is a corpus folder
    or one of its validation folders. ``batch_size`` counts full windows; shorter ones are taken
    together up to as many tokens. Writes ``output`` (docs/evaluation.md says what it holds) and
    returns its content; at once where it was made from the same inputs before. Raises
    ``EvaluationError`` and ``ModelError``.
    """
    begin = time.monotonic()
    checkpoint = final_of(checkpoint)
    sets = find_sets(validation)
    if gate_set not in sets:
        raise EvaluationError(
            f"{validation} has no {gate_set} validation set (found: {', '.join(sets) or 'none'}); "
            "set gate.validation_set to one that it has"
        )
    inputs = digest_of(
        FORMAT,
        identity_of(checkpoint),
        identity_of(base) if base else None,
        {name: [sha256_of_file(file) for file in files] for name, files in sets.items()},
        [gate_set, dtype],
    )
    if output.is_file() and read_json(output).get("inputs") == inputs:
        print(f"{output} is complete", flush=True)
        result: dict[str, Any] = read_json(output)
        return result
    ranks = join_ranks()
    documents = {name: read_documents(files) for name, files in sets.items()}
    context = _sequence_length(validation)
    figures: dict[str, dict[str, Figures]] = {name: {} for name in sets}
    for path, whose in _models(checkpoint, base):
        model, in_parts = place_model(
            path, ranks, attention=attention, dtype=dtype, sharded=sharded, wrap=Scorer
        )
        for who in whose:
            plain = who == "base" and len(whose) > 1
            for name, some in documents.items():
                with model.model.disable_adapter() if plain else nullcontext():
                    figures[name][who] = score(
                        model, some, ranks, context, batch_size, f"{who}, {name} set"
                    )
                shown = {key: figures[name][who][key] for key in HEADLINE}
                ranks.say(f"{who}, {name} set: {shown}")
        del model
        if in_parts or ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    result = {
        "validation_set": gate_set,
        # trained model before its base, whichever was evaluated first
        **{
            who: {key: figures[gate_set][who][key] for key in HEADLINE}
            for who in ("model", "base")
            if who in figures[gate_set]
        },
        **figures,
        "context": context,
        "seconds": round(time.monotonic() - begin, 1),
        "inputs": inputs,
    }
    if ranks.rank == 0:
        write_json(output, result)
    ranks.leave()
    return result


HEADLINE = ("perplexity", "bits_per_byte", "tokens", "loss")


def _models(checkpoint: str, base: str | None) -> Iterator[tuple[str, list[str]]]:
    """What to load, and which figures come of it: adapters and their base are loaded once."""
    if base is None:
        yield checkpoint, ["model"]
    elif base == base_of(checkpoint) != checkpoint:
        yield checkpoint, ["model", "base"]
    else:
        yield checkpoint, ["model"]
        yield base, ["base"]


def find_sets(validation: Path) -> dict[str, list[Path]]:
    """The Parquet files of each validation set: ``validation/`` is the random one,
    ``validation_X/`` the set X. A folder of Parquet files alone is taken for the random one."""
    folders = sorted(path for path in validation.glob("validation*") if path.is_dir())
    names = {path.name.removeprefix("validation").strip("_") or "random": path for path in folders}
    if not folders:
        names = {"random": validation}
    found = {name: sorted(path.glob("*.parquet")) for name, path in names.items()}
    return {name: files for name, files in found.items() if files}


def read_documents(files: list[Path]) -> Documents:
    """The documents of a validation set, as the corpus room writes them."""
    columns: dict[str, list[Any]] = defaultdict(list)
    ids: list[npt.NDArray[np.int32]] = []
    for file in files:
        table = parquet.read_table(file, columns=["input_ids", "bytes", "year", "areas"])
        for chunk in table["input_ids"].chunks:
            ids += np.split(chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy().cumsum())[
                :-1
            ]
        for name in ("bytes", "year", "areas"):
            columns[name] += table[name].to_pylist()
    return Documents(ids, columns["bytes"], columns["year"], [a or [] for a in columns["areas"]])


def _sequence_length(validation: Path) -> int:
    for folder in (validation, validation.parent):
        manifest = folder / "corpus_manifest.json"
        if manifest.is_file():
            return int(read_json(manifest)["max_seq_length"])
    return LONGEST


def windows(document: int, length: int, context: int) -> list[Window]:
    """The windows of a document of ``length`` tokens, which count each token but the first once."""
    found, begin, first = [], 0, 1
    while first < length:
        end = min(begin + context, length)
        found.append(Window(document, begin, end, first))
        begin, first = begin + context // 2, end
    return found


def batches(found: list[Window], tokens: int) -> list[list[Window]]:
    """Windows of like length together, longest first, padded to at most ``tokens`` a batch."""
    made: list[list[Window]] = []
    longest = 0
    for window in sorted(found, key=lambda w: (w.begin - w.end, w.document, w.begin)):
        length = window.end - window.begin
        if not made or (len(made[-1]) + 1) * longest > tokens:
            made.append([])
            longest = length
        made[-1].append(window)
    return made


class Scorer(nn.Module):  # type: ignore[misc]
    """A batch in, the negative log likelihood of each counted token out, in float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, counted: torch.Tensor, targets: torch.Tensor, calls: int
    ) -> torch.Tensor:
        """``ids [B, S]``, ``counted [B, S]`` bool, ``targets [T]`` -> losses ``[T]``.

        Rows are padded on the right, where a causal model needs no mask. Logits are taken in
        ``calls`` parts: of a partitioned output layer every rank has to make as many calls.
        """
        model = self.model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal.model(input_ids=ids, use_cache=False)[0][counted]
        losses = [
            nn.functional.cross_entropy(causal.lm_head(part).float(), asked, reduction="none")
            for part, asked in zip(
                hidden.tensor_split(calls), targets.tensor_split(calls), strict=True
            )
        ]
        return torch.cat(losses)


def score(
    model: nn.Module,
    documents: Documents,
    ranks: Ranks,
    context: int,
    batch_size: int | None = None,
    what: str = "evaluation",
) -> Figures:
    """The figures of one model on one validation set: of all, ``by_area`` and ``by_year``."""
    config = model.model.config
    longest = min(context, config.max_position_embeddings)
    size = batch_size or (GPU_BATCH if ranks.device.type == "cuda" else CPU_BATCH)
    highest = max((int(ids.max()) for ids in documents.ids if len(ids)), default=0)
    if highest >= config.vocab_size:
        raise EvaluationError(
            f"the validation set has token {highest}, the model a vocabulary of "
            f"{config.vocab_size}: they belong to different tokenizers"
        )
    found = [w for n, ids in enumerate(documents.ids) for w in windows(n, len(ids), longest)]
    all_batches = batches(found, size * longest)
    nll = torch.zeros(len(documents.ids), dtype=torch.float64, device=ranks.device)
    total = sum(window.end - window.first for window in found)
    done, begin = 0, time.monotonic()
    said = begin
    for start in range(0, len(all_batches), ranks.size):
        together = all_batches[start : start + ranks.size]
        counts = [sum(window.end - window.first for window in batch) for batch in together]
        own = together[ranks.rank] if ranks.rank < len(together) else []
        _add_losses(model, documents, own, max(1, -(-max(counts) // CHUNK)), nll)
        done += sum(counts)
        now = time.monotonic()
        if now - said > SILENCE:
            said = now
            left = (now - begin) / done * (total - done)
            ranks.say(f"{what}: {done:,} of {total:,} tokens, {left:.0f} s left")
    sums = ranks.sum(nll).cpu().numpy()
    counted = np.array([max(0, len(ids) - 1) for ids in documents.ids])
    return _tables(sums, counted, documents)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _add_losses(
    model: nn.Module, documents: Documents, batch: list[Window], calls: int, nll: torch.Tensor
) -> None:
    """Add the losses of a batch to its documents' sums; an empty batch only makes the calls."""
    rows = batch or [Window(0, 0, 2, 2)]  # nothing of it is counted
    length = max(window.end - window.begin for window in rows) - 1
    ids = np.zeros((len(rows), length), np.int64)
    counted = np.zeros((len(rows), length), bool)
    targets, owners = [], []
    for n, window in enumerate(rows if batch else []):
        tokens = documents.ids[window.document]
        ids[n, : window.end - window.begin - 1] = tokens[window.begin : window.end - 1]
        # the input before a target stands one place earlier
        counted[n, window.first - 1 - window.begin : window.end - 1 - window.begin] = True
        targets.append(tokens[window.first : window.end])
        owners.append(np.full(window.end - window.first, window.document))
    asked = np.concatenate(targets).astype(np.int64) if targets else np.zeros(0, np.int64)
    whose = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    device = nll.device
    losses = model(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(counted).to(device),
        torch.from_numpy(asked).to(device),
        calls,
    )
    nll.index_add_(0, torch.from_numpy(whose).to(device), losses.double())


def _tables(
    nll: npt.NDArray[np.float64], counted: npt.NDArray[np.int64], documents: Documents
) -> Figures:
    sizes = np.array(documents.sizes)

    def of(rows: list[int]) -> Figures:
        figures = figures_of(
            float(nll[rows].sum()), int(counted[rows].sum()), int(sizes[rows].sum())
        )
        return {**figures, "documents": len(rows)}

    by_area: dict[str, list[int]] = defaultdict(list)
    by_year: dict[str, list[int]] = defaultdict(list)
    for n, (year, areas) in enumerate(zip(documents.years, documents.areas, strict=True)):
        for area in areas:
            by_area[area].append(n)
        by_year["unknown" if year is None else str(year)].append(n)
    return {
        **of(list(range(len(counted)))),
        "by_area": {area: of(by_area[area]) for area in sorted(by_area)},
        "by_year": {year: of(by_year[year]) for year in sorted(by_year)},
    }


def figures_of(nll: float, tokens: int, size: int) -> Figures:
    """Loss, perplexity and bits per byte of ``tokens`` whose negative log likelihoods sum to ``nll``
    nats, in texts of ``size`` bytes; None for what is no finite number."""
    loss = nll / tokens if tokens else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nll / math.log(2) / size if size else math.nan
    values = {"perplexity": perplexity, "bits_per_byte": bits, "loss": loss}
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return {**finite, "tokens": tokens}
