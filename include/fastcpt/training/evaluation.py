"""Perplexity and bits per byte of a model on the held-out documents (docs/evaluation.md).

Every token but a document's first is predicted once. A document longer than the window is read in
windows that begin half a window apart; a window counts only the tokens that the one before has not
counted, so all but the first have at least half a window of context.

The unit of work is a window: windows are sorted by length, put into batches, and the batches dealt
out to the ranks. A window's figure depends on nothing but its own tokens (causal attention, the
padding behind them), and sums are kept a document, in double precision: so neither the batch size
nor the number of ranks shows in the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import torch.distributed as dist

from fastcpt.files import digest_of, read_json, sha256_of_file, write_json
from fastcpt.recipe import Recipe
from fastcpt.training.inference import (
    Progress,
    identity,
    model_for_inference,
    rank,
    ranks,
    world_size,
)

FORMAT = 1
BATCH_TOKENS = 16_384  # of a batch, padding included; enough to keep a GPU busy
CHUNK = 2048  # tokens whose logits exist at one time
COLUMNS = ("id", "input_ids", "bytes", "year", "areas")


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked; the message says what to change."""


class Document(NamedTuple):
    id: str
    input_ids: npt.NDArray[np.int32]
    bytes: int  # of its text in UTF-8
    year: int | None
    areas: tuple[str, ...]


class Window(NamedTuple):
    """``input_ids[begin:end]`` of a document; predicted are the tokens from ``first`` on."""

    document: int
    begin: int
    first: int
    end: int


def evaluate(
    checkpoint: str,
    validation: Path,
    output: Path,
    *,
    base: str | None = None,
    recipe: Recipe | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """Write ``output`` (evaluation.json) and return its content; called by every rank.

    ``checkpoint`` and ``base`` are folders or hub names (adapters too), ``validation`` is a corpus
    folder or the folder of one validation set. For each set (``random``, ``newest``) and each of
    ``model`` and ``base``: ``perplexity``, ``bits_per_byte``, ``loss`` (nats a token), ``tokens``,
    ``documents``, and the same ``by_area`` and ``by_year``. Without a recipe the window is the
    corpus's own sequence length, and the weights are bfloat16. An evaluation of
    the same inputs is not done again. Raises ``EvaluationError``.
    """
    files = validation_files(validation)
    window = recipe.corpus.max_seq_length if recipe else _sequence_length(validation)
    dtype = recipe.model.dtype if recipe else "bfloat16"
    attention = recipe.model.attn_implementation if recipe else "auto"
    made_from = digest_of(
        FORMAT,
        identity(checkpoint),
        identity(base) if base else None,
        {name: [sha256_of_file(file) for file in files[name]] for name in files},
        window,
        dtype,
    )
    if output.is_file() and (found := read_json(output)).get("made_from") == made_from:
        print(f"{output} is complete", flush=True)
        return dict(found)
    sets = {name: read_documents(files[name]) for name in files}
    result: dict[str, Any] = {name: {} for name in sets}
    with ranks() as device:
        for label, path in (("model", checkpoint), ("base", base)):
            if path is None:
                continue
            model = model_for_inference(path, attention, dtype, device)
            for name, documents in sets.items():
                begin = time.monotonic()
                losses = document_losses(
                    model, documents, window, device, batch_tokens, f"{label}, {name}"
                )
                figures = figures_of(documents, losses, f"{label} on the {name} validation set")
                result[name][label] = figures
                Progress().say(
                    f"evaluated {label}, {name}: perplexity {figures['perplexity']:.4f}, "
                    f"{figures['bits_per_byte']:.4f} bits a byte, {figures['tokens']:,} tokens "
                    f"in {time.monotonic() - begin:.1f} s",
                    now=True,
                )
            del model  # the base model takes its place
            if device.type == "cuda":
                torch.cuda.empty_cache()
        result |= {
            "validation_set": recipe.gate.validation_set if recipe else next(iter(sets)),
            "window": window,
            "stride": window // 2,
            "made_from": made_from,
        }
        if rank() == 0:
            write_json(output, result)
    return result


def validation_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each validation set: ``random`` (validation/), ``newest`` (validation_newest/).

    Given the folder of a set itself, that set alone. ``EvaluationError`` where there is none.
    """

    def shards(place: Path) -> list[Path]:
        return sorted(place.glob("validation_shard_*.parquet"))

    def name(place: Path) -> str:
        return place.name.removeprefix("validation").removeprefix("_") or "random"

    if shards(folder):
        return {name(folder) if folder.name.startswith("validation") else "random": shards(folder)}
    # "validation" sorts before "validation_newest"
    found = {name(place): shards(place) for place in sorted(folder.glob("validation*"))}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise EvaluationError(
            f"--validation_data {folder}: no validation/validation_shard_*.parquet there; give a "
            "built corpus folder or the validation folder in it"
        )
    return found


def _sequence_length(validation: Path) -> int:
    for folder in (validation, validation.parent):
        manifest = folder / "corpus_manifest.json"
        if manifest.is_file():
            return int(read_json(manifest)["max_seq_length"])
    raise EvaluationError(
        f"{validation}: no corpus_manifest.json there tells the sequence length; give the recipe "
        "with --config"
    )


def read_documents(files: Iterable[Path]) -> list[Document]:
    """The documents of validation shards. ``EvaluationError`` for another kind of file."""
    documents = []
    for file in files:
        try:
            table = parquet.read_table(file)
        except pa.ArrowInvalid as error:
            raise EvaluationError(f"{file}: {error}; send the corpus again") from error
        missing = [column for column in COLUMNS if column not in table.column_names]
        if missing:
            raise EvaluationError(f"{file}: no column {', '.join(missing)}; build the corpus again")
        columns = [table[column].to_pylist() for column in COLUMNS if column != "input_ids"]
        ids = table["input_ids"].combine_chunks()
        ends = ids.value_lengths().to_numpy().cumsum()
        tokens = np.split(ids.flatten().to_numpy().astype(np.int32, copy=False), ends[:-1])
        for row, (name, size, year, areas) in enumerate(zip(*columns, strict=True)):
            documents.append(Document(name, tokens[row], size, year, tuple(areas or ())))
    if not any(len(document.input_ids) > 1 for document in documents):
        raise EvaluationError(f"{', '.join(map(str, files))}: no document of two tokens or more")
    return documents


def windows_of(lengths: Iterable[int], size: int) -> list[Window]:
    """Windows of ``size`` tokens, half of it apart, over documents of these lengths."""
    stride = size // 2
    windows = []
    for document, length in enumerate(lengths):
        first, begin = 1, 0  # nothing predicts a document's first token
        while first < length:
            end = min(begin + size, length)
            windows.append(Window(document, begin, first, end))
            first, begin = end, begin + stride
    return windows


def document_losses(
    model: Any,
    documents: list[Document],
    size: int,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
    what: str = "",
) -> npt.NDArray[np.float64]:
    """The summed negative log likelihood (nats) of each document's tokens but the first.

    Every rank gets the whole answer. ``EvaluationError`` where the model's vocabulary or context
    is too small.
    """
    _check_fit(model, documents, size)
    windows = windows_of([len(document.input_ids) for document in documents], size)
    windows.sort(key=lambda window: window.begin - window.end)  # the longest first
    batches = list(_batches(windows, batch_tokens))
    sums = torch.zeros(len(documents), dtype=torch.float64)
    progress = Progress()
    done = 0
    for batch in batches[rank() :: world_size()]:
        ids = np.zeros((len(batch), batch[0].end - batch[0].begin), np.int64)
        for row, window in enumerate(batch):
            ids[row, : window.end - window.begin] = documents[window.document].input_ids[
                window.begin : window.end
            ]
        losses = _window_losses(model, torch.from_numpy(ids).to(device), batch)
        for window, loss in zip(batch, losses, strict=True):
            sums[window.document] += loss
        done += len(batch)
        progress.say(f"evaluated {what}: {done * world_size():,} of {len(windows):,} windows")
    if dist.is_initialized():
        sums = sums.to(device)
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


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _window_losses(model: Any, input_ids: torch.Tensor, batch: list[Window]) -> list[float]:
    """The summed loss of each window of a batch (``input_ids [B, S]``, padded at the end)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    # No mask: causal attention never sees the padding behind a token.
    hidden = causal.model(input_ids=input_ids, use_cache=False)[0]  # [B, S, H]
    # The state of token t predicts token t + 1; only those asked for go through the output layer.
    rows = np.concatenate([np.full(window.end - window.first, n) for n, window in enumerate(batch)])
    places = np.concatenate(
        [np.arange(window.first, window.end) - window.begin - 1 for window in batch]
    )
    row_t = torch.from_numpy(rows).to(input_ids.device)
    place_t = torch.from_numpy(places).to(input_ids.device)
    wanted, targets = hidden[row_t, place_t], input_ids[row_t, place_t + 1]
    del hidden
    losses = torch.empty(len(targets), dtype=torch.float64, device=input_ids.device)
    for begin in range(0, len(targets), CHUNK):
        part = slice(begin, begin + CHUNK)
        logits = causal.lm_head(wanted[part]).float()
        losses[part] = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
    sums = torch.zeros(len(batch), dtype=torch.float64, device=input_ids.device)
    answer: list[float] = sums.index_add(0, row_t, losses).tolist()
    return answer


def _check_fit(model: Any, documents: list[Document], size: int) -> None:
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


def figures_of(
    documents: list[Document], losses: npt.NDArray[np.float64], what: str = "model"
) -> dict[str, Any]:
    """Figures over all documents, ``by_area`` and ``by_year``, from each document's summed loss.

    A document of several areas counts in each, one without area or year in none. Raises
    ``EvaluationError`` for a loss that is no number, or that no perplexity can be written for.
    """
    if not np.isfinite(losses).all():
        wrong = documents[int(np.flatnonzero(~np.isfinite(losses))[0])]
        raise EvaluationError(
            f"{what}: the loss on document '{wrong.id}' is not finite; the model's weights are "
            "broken (look at the loss curve of its training)"
        )
    tokens = np.array([max(0, len(document.input_ids) - 1) for document in documents])
    sizes = np.array([document.bytes for document in documents])

    def over(chosen: list[int]) -> dict[str, Any] | None:
        nats, count, size = losses[chosen].sum(), int(tokens[chosen].sum()), sizes[chosen].sum()
        if not count or not size:
            return None
        loss = float(nats / count)
        if loss > 700:  # exp overflows
            raise EvaluationError(
                f"{what}: a loss of {loss:.4g} a token; the model's weights are broken"
            )
        return {
            "perplexity": math.exp(loss),
            "bits_per_byte": float(nats / math.log(2) / size),
            "loss": loss,
            "tokens": count,
            "documents": len(chosen),
        }

    def grouped(keys: Callable[[Document], Iterable[Any]]) -> dict[str, Any]:
        groups: dict[str, list[int]] = {}
        for number, document in enumerate(documents):
            for key in keys(document):
                groups.setdefault(str(key), []).append(number)
        found = {key: over(groups[key]) for key in sorted(groups)}
        return {key: figures for key, figures in found.items() if figures}

    whole = over(list(range(len(documents))))
    if whole is None:
        raise EvaluationError(f"{what}: no tokens or no bytes are counted")
    return {
        **whole,
        "by_area": grouped(lambda document: set(document.areas)),
        "by_year": grouped(lambda document: [] if document.year is None else [document.year]),
    }
