"""Perplexity and bits per byte of a model on the held-out documents (docs/evaluation.md).

Every token except a document's first is predicted once. A long document is read in windows that start
half a window apart. A window counts only tokens that the previous one did not, so after the first window
every token has at least half a window of context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from fastcpt.files import digest_of, read_json, sha256_of_file, write_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Model
from fastcpt.training.inference import final_of, model_for_inference, model_identity, ranks
from fastcpt.training.made_from import EVALUATION_FORMAT
from fastcpt.training.model import ModelError, base_of
from fastcpt.training.questions import (
    Question,
    answered,
    questions_of,
    read_right,
    table_of,
    texts_of,
)
from fastcpt.training.ranks import rank, say_once
from fastcpt.training.scoring import Scorer, document_losses
from fastcpt.training.validation import (
    EvaluationError,
    HeldOutDocument,
    read_held_out,
    sequence_length,
    validation_files,
)

ADAPTER = "adapter "  # before an area's name
QUESTIONS = "questions"  # the set of texts whose likelihoods answer the questions
# For each (set, label): the summed loss (nats) of each document.
Losses = dict[tuple[str, str], npt.NDArray[np.float64]]


def evaluate(
    checkpoint: str,
    validation: Path,
    output: Path,
    *,
    base: str | None = None,
    base_evaluation: Path | None = None,
    recipe: Recipe | None = None,
    batch_tokens: int | None = None,
    in_parts: bool | None = None,
) -> dict[str, Any]:
    """Write ``output`` (evaluation.json) and return its content; called by every rank.

    ``checkpoint`` and ``base`` are folders or hub names, also of adapters; a training's output folder
    means its final model. ``validation`` is the folder of a corpus or of one validation set.
    For each set (``random``, ``newest``) and each of ``model`` and ``base``: ``perplexity``,
    ``bits_per_byte``, ``loss`` (nats per token), ``tokens``, ``documents``, the same ``by_area`` and
    ``by_year``. ``by_document``: each document's ``id``, ``bytes`` and summed loss (nats) of both, for
    paired comparisons. If ``checkpoint`` has adapters of areas, ``adapters`` has for each of them, on its
    area's documents, ``adapter``, ``model`` (the mean of all) and ``base``. ``questions`` has for
    ``model`` and ``base`` the result of ``questions.table_of`` on the gate's set.
    Without a recipe there are no questions, the window is the corpus's sequence length and weights are
    bfloat16. An evaluation of the same inputs is not repeated. From ``base_evaluation``, an earlier one,
    the base's figures are reused if base and documents are the same. Raises ``EvaluationError``.
    """
    checkpoint = final_of(checkpoint)
    asked, areas = _Asked.of(validation, recipe), _areas_of(checkpoint)
    base_identity = model_identity(base) if base else None
    made_from = asked.digest(model_identity(checkpoint), base_identity)
    if output.is_file() and (found := read_json(output)).get("made_from") == made_from:
        print(f"{output} is complete", flush=True)
        return dict(found)
    subjects = {label: sorted(area.subjects) for label, area in areas.items()}
    base_made_from = asked.digest(base_identity, subjects) if base else None
    known = _base_figures(base_evaluation, base_made_from)
    sets = {name: read_held_out(files) for name, files in asked.files.items()}
    questions, texts = _questions(checkpoint, sets[asked.gate_set], asked.questions)
    scored = {**sets, QUESTIONS: texts} if texts else sets
    losses: Losses = {}
    with ranks() as device:
        for path, labels in _to_load(checkpoint, None if known else base):
            own = areas if path == checkpoint else {}
            scorer = _loaded(path, own, asked.model, device, in_parts)
            plain = path != base  # the base is the checkpoint with its adapters switched off
            losses |= _losses_of(
                scorer, [*labels, *own], own, plain, scored, asked.window, device, batch_tokens
            )
            del scorer
            if device.type == "cuda":
                torch.cuda.empty_cache()  # for the next model
        result: dict[str, Any] = {
            name: _figures_of_set(name, documents, areas, losses, known.get(name))
            for name, documents in sets.items()
        }
        if questions:
            result[QUESTIONS] = _figures_of_questions(questions, losses, known.get(QUESTIONS))
        result |= asked.facts() | {"made_from": made_from, "base_made_from": base_made_from}
        if rank() == 0:
            write_json(output, result)
    return result


class _Asked(NamedTuple):
    """The settings of an evaluation apart from the model: documents, window, precision, questions."""

    files: dict[str, list[Path]]
    contents: dict[str, list[str]]  # the digests of the files
    gate_set: str
    window: int
    model: Model
    questions: int

    @classmethod
    def of(cls, validation: Path, recipe: Recipe | None) -> _Asked:
        files = validation_files(validation)
        gate_set = recipe.gate.validation_set if recipe else next(iter(files))
        if gate_set not in files:
            raise EvaluationError(
                f"--validation_data {validation} has no {gate_set} set, which gate.validation_set "
                f"asks for; it has {', '.join(files)}"
            )
        return cls(
            files,
            {name: [sha256_of_file(file) for file in files[name]] for name in files},
            gate_set,
            recipe.corpus.max_seq_length if recipe else sequence_length(validation),
            recipe.model if recipe else Model(),
            recipe.evaluation.questions if recipe else 0,
        )

    def digest(self, *models: Any) -> str:
        """The digest that identifies an evaluation of these models."""
        asked = self.contents, self.window, self.model.dtype, self.questions
        return digest_of(*models, self.gate_set, EVALUATION_FORMAT, *asked)

    def facts(self) -> dict[str, Any]:
        return {
            "validation_set": self.gate_set,
            "window": self.window,
            "stride": self.window // 2,
        }


def _losses_of(
    scorer: Scorer,
    labels: list[str],
    areas: dict[str, _Area],
    plain: bool,
    sets: dict[str, list[HeldOutDocument]],
    window: int,
    device: torch.device,
    batch_tokens: int | None,
) -> Losses:
    """The losses of a loaded model under each of its labels; an area's adapter reads its own documents."""
    losses: Losses = {}
    for label, (name, documents) in product(labels, sets.items()):
        begin = time.monotonic()
        asked = areas[label].documents(documents) if label in areas else documents
        if not asked:
            continue
        with _switched(scorer.model, label, areas, plain=label == "base" and plain):
            what = f"{label}, {name}"
            found = document_losses(scorer, asked, window, device, batch_tokens, what)
        losses[name, label] = found
        figures = loss_figures(asked, found, f"{label} on the {name} validation set")
        say_once(
            f"evaluated {label}, {name}: perplexity {figures['perplexity']:.4f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte, {figures['tokens']:,} tokens "
            f"in {time.monotonic() - begin:.1f} s"
        )
    return losses


def _figures_of_set(
    name: str,
    documents: list[HeldOutDocument],
    areas: dict[str, _Area],
    losses: Losses,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """A set's figures: of model, base and each area's adapter.

    ``known``: the set's figures in an earlier evaluation, from which the base's are reused.
    """
    beside = {who: losses[name, who] for who in ("model", "base") if (name, who) in losses}
    result: dict[str, Any] = {
        who: loss_figures(documents, found, f"{who} on the {name} validation set")
        for who, found in beside.items()
    }
    tables = {
        label.removeprefix(ADAPTER): area.figures(documents, losses[name, label], beside)
        for label, area in areas.items()
        if (name, label) in losses
    }
    by_document: dict[str, Any] = {
        "id": [document.id for document in documents],
        "bytes": [document.bytes for document in documents],
        **{who: found.tolist() for who, found in beside.items()},
    }
    if known:
        result["base"], by_document["base"] = known["base"], known["by_document"]["base"]
        for label, table in tables.items():
            table["base"] = known["adapters"][label]["base"]
    if tables:
        result["adapters"] = tables
    result["by_document"] = by_document
    return result


def _questions(
    model: str, documents: list[HeldOutDocument], most: int
) -> tuple[list[Question], list[HeldOutDocument]]:
    """Questions about held-out documents, and the texts whose losses answer them."""
    if not most:
        return [], []
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model '{model}': no tokenizer can be loaded, which evaluation.questions needs (0 asks "
            f"nothing): {error}"
        ) from error
    texts = [tokenizer.decode(one.input_ids, skip_special_tokens=True) for one in documents]
    # a text begins with BOS if the corpus's documents do
    first = int(documents[0].input_ids[0])
    begin = [first] if first == tokenizer.bos_token_id else []
    questions = questions_of(documents, texts, most)
    return questions, texts_of(
        questions, lambda text: begin + tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def _figures_of_questions(
    questions: list[Question], losses: Losses, known: dict[str, Any] | None
) -> dict[str, Any]:
    """The answers of model and base; ``known``: the answers in an earlier evaluation."""
    right = {
        who: answered(questions, losses[QUESTIONS, who])
        for who in ("model", "base")
        if (QUESTIONS, who) in losses
    }
    if known:
        right["base"] = read_right(known["base"])
    found = {"model": table_of(questions, right["model"], right.get("base"))}
    if "base" in right:
        found["base"] = table_of(questions, right["base"])
    return found


def _base_figures(earlier: Path | None, made_from: str | None) -> dict[str, Any]:
    """An earlier evaluation of the same base on the same documents; empty if there is none."""
    if earlier is None or made_from is None or not earlier.is_file():
        return {}
    found: dict[str, Any] = read_json(earlier)
    if found.get("base_made_from") != made_from:
        return {}
    print(f"the base model was evaluated before: {earlier}", flush=True)
    return found


class _Area(NamedTuple):
    """A legal area that has an adapter of its own."""

    folder: Path
    subjects: frozenset[str]

    def documents(self, documents: list[HeldOutDocument]) -> list[HeldOutDocument]:
        return [one for one in documents if self.subjects & set(one.areas)]

    def figures(
        self,
        documents: list[HeldOutDocument],
        own: npt.NDArray[np.float64],
        beside: dict[str, npt.NDArray[np.float64]],
    ) -> dict[str, Any]:
        """The adapter's figures on its area's documents, and the other models' on the same ones.

        ``own``: the adapter's losses on the area's documents; ``beside``: others' losses on all ``documents``.
        """
        its = [bool(self.subjects & set(one.areas)) for one in documents]
        by = {"adapter": own} | {who: losses[its] for who, losses in beside.items()}
        chosen = self.documents(documents)
        tables = {
            who: loss_figures(chosen, losses, f"{who} on an area") for who, losses in by.items()
        }
        kept = ("perplexity", "bits_per_byte", "loss", "tokens", "documents")
        return {who: {key: table[key] for key in kept} for who, table in tables.items()}


def _areas_of(checkpoint: str) -> dict[str, _Area]:
    """The areas that a model has adapters for, by label; empty for most models."""
    listed = Path(checkpoint) / "areas.json"
    if not listed.is_file():
        return {}
    return {
        f"{ADAPTER}{area}": _Area(listed.parent / "areas" / area, frozenset(subjects))
        for area, subjects in read_json(listed).items()
    }


def _loaded(
    path: str, areas: dict[str, _Area], model: Model, device: torch.device, in_parts: bool | None
) -> Scorer:
    scorer: Scorer
    attention, wrap = model.attn_implementation, partial(_scorer, areas)
    scorer, _ = model_for_inference(
        path, attention, model.dtype, device, wrap=wrap, in_parts=in_parts
    )
    return scorer


def _scorer(areas: dict[str, _Area], model: Any) -> Scorer:
    """A scorer of the model with the areas' adapters loaded."""
    for n, area in enumerate(areas.values()):
        model.load_adapter(str(area.folder), adapter_name=f"area{n}")
    return Scorer(model)


@contextmanager
def _switched(model: Any, label: str, areas: dict[str, _Area], plain: bool) -> Iterator[None]:
    """Switch the model to an area's adapter, to its own, or (``plain``) to none."""
    if label in areas:
        model.set_adapter(f"area{list(areas).index(label)}")
        yield
        model.set_adapter("default")
        return
    with model.disable_adapter() if plain else nullcontext():
        yield


def _to_load(checkpoint: str, base: str | None) -> list[tuple[str, list[str]]]:
    """The models to load, each with its labels; an adapter's model also serves as its base."""
    if base is not None and base == base_of(checkpoint) != checkpoint:
        return [(checkpoint, ["model", "base"])]
    return [(checkpoint, ["model"])] + ([(base, ["base"])] if base is not None else [])


def loss_figures(
    documents: list[HeldOutDocument], losses: npt.NDArray[np.float64], what: str = "model"
) -> dict[str, Any]:
    """Figures over all documents, ``by_area`` and ``by_year``, from each document's summed loss.

    A document with several areas counts in each, one without area or year in none. Raises
    ``EvaluationError`` for a loss that is not finite or too large for a perplexity.
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

    def grouped(keys: Callable[[HeldOutDocument], Iterable[Any]]) -> dict[str, Any]:
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
