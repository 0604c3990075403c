"""A year of weekly runs on a growing corpus: what becomes champion, what is refused, what is lost.

    .env/airflow/bin/python benchmarks/year.py [--weeks 52] [--seed 0] [--work FOLDER]

The corpus, the ledger, the comparison, the registry and the cleaning are the project's own. What is
small is the trainer: counts of three tokens, interpolated with those of a base model, so that a
training takes a second, and a better or worse one can be made to measure. Weeks have events: none or
many new documents, corrected and repealed acts, copies of held-out acts, broken files, a worse and
a better learning rate, a poisoned batch, a host that is down, a full disk, a killed orchestrator.

Whether a model is really better than the champion of its week is judged on 300 documents that no
decision sees. Better or worse is what differs by twice ``publish.margin``. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import zstandard

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "include"))

from fastcpt.corpus.build import build  # noqa: E402
from fastcpt.corpus.documents import DocumentsError, list_parts  # noqa: E402
from fastcpt.corpus.new_documents import State, arrived, state_of  # noqa: E402
from fastcpt.corpus.sample import generate_sample  # noqa: E402
from fastcpt.corpus.score import score_parts  # noqa: E402
from fastcpt.corpus.select import select  # noqa: E402
from fastcpt.files import digest_of  # noqa: E402
from fastcpt.gate import decide as gate_of  # noqa: E402
from fastcpt.held_out import comparison, trained_and_held_out  # noqa: E402
from fastcpt.manifests import CorpusFolder  # noqa: E402
from fastcpt.recipe import Recipe, load_recipe  # noqa: E402
from fastcpt.registry import champion as registry  # noqa: E402
from fastcpt.registry.conditions import decide  # noqa: E402
from fastcpt.registry.in_use import Policy, unused  # noqa: E402
from fastcpt.reporting.record import add_output, close_record, open_record  # noqa: E402

Ids = npt.NDArray[np.int64]
Record = dict[str, Any]
JUDGES = 300  # documents that no decision sees
FIRST, WEEKLY = 900, 10  # documents of the first week and of each other
MARGIN = 0.005
SAMPLE = 2_600  # documents: the sample has no more different acts
SMALL_DISK = 300_000  # bytes a file may have in the week of the full disk
EVENTS = {
    3: "nothing new",
    6: "worse learning rate",
    8: "copies of held-out acts",
    10: "corrected acts",
    12: "better learning rate",
    14: "poisoned batch",
    16: "host down",
    18: "40 % more",
    20: "broken file",
    22: "worse learning rate",
    24: "killed orchestrator",
    26: "repealed acts",
    28: "better learning rate",
    30: "full disk",
    32: "worse learning rate",
    34: "poisoned batch",
    36: "nothing new",
    38: "better learning rate",
    40: "copies of held-out acts",
    42: "worse learning rate",
    44: "killed orchestrator",
    46: "poisoned batch",
    48: "better learning rate",
    50: "worse learning rate",
}


class Counts(NamedTuple):
    """How often each sequence of one, two and three tokens stands in what was trained on."""

    keys: tuple[Ids, Ids, Ids]
    values: tuple[Ids, Ids, Ids]
    vocabulary: int

    @classmethod
    def of(cls, documents: Iterable[Ids], vocabulary: int) -> Counts:
        every = [sequences(one, vocabulary) for one in documents]
        found = [
            np.unique(np.concatenate([one[n] for one in every]), return_counts=True)
            for n in range(3)
        ]
        keys, values = zip(*found, strict=True)
        return cls(keys, values, vocabulary)

    def shares(self, ids: Ids) -> tuple[npt.NDArray[np.float64], ...]:
        """The probability of each token but the first two after none, one and two before it."""
        found = [
            self._count(n, key[2 - n :]) for n, key in enumerate(sequences(ids, self.vocabulary))
        ]
        before = [
            np.full(len(found[0]), self.values[0].sum()),
            self._count(0, ids[1:-1]),
            self._count(1, sequences(ids, self.vocabulary)[1][:-1]),
        ]
        return tuple(
            np.divide(a, b, out=np.zeros(len(a)), where=b > 0)
            for a, b in zip(found, before, strict=True)
        )

    def _count(self, length: int, keys: Ids) -> npt.NDArray[np.float64]:
        known = self.keys[length]
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, self.values[length][place], 0).astype(np.float64)


def sequences(ids: Ids, vocabulary: int) -> tuple[Ids, Ids, Ids]:
    two = ids[:-1] * vocabulary + ids[1:]
    return ids, two, two[:-1] * vocabulary + ids[2:]


class Model(NamedTuple):
    """``rate``: how much of it is what was learnt; the rest is the base model."""

    base: Counts
    learnt: Counts | None
    rate: float

    def losses(self, documents: Iterable[Ids]) -> list[float]:
        """The summed loss (nats) of each document, its first two tokens left out."""
        return [float(-np.log(self._likelihoods(ids)).sum()) for ids in documents]

    def _likelihoods(self, ids: Ids) -> npt.NDArray[np.float64]:
        def of(counts: Counts) -> npt.NDArray[np.float64]:
            one, two, three = counts.shares(ids)
            return 0.5 * three + 0.3 * two + 0.19 * one + 0.01 / counts.vocabulary

        if self.learnt is None:
            return of(self.base)
        return self.rate * of(self.learnt) + (1 - self.rate) * of(self.base)


class Year:
    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.home, self.documents = folder / "home", folder / "documents"
        self.documents.mkdir(parents=True)
        self.stream, self.judges = stream_of(folder, seed)
        self.recipe = recipe_of(folder)
        self.seen: State = {}
        self.delivered: dict[str, Record] = {}
        self.models: dict[str, Model] = {}
        self.base: Counts | None = None
        self.rate = 0.5
        self.rows: list[dict[str, Any]] = []

    # Documents

    def deliver(self, week: int, event: str) -> None:
        """What comes to the folder this week."""
        count = {"nothing new": 0, "40 % more": len(self.delivered) * 2 // 5}.get(event, WEEKLY)
        records = [self.stream.pop() for _ in range(FIRST if week == 1 else count)]
        if event == "corrected acts":
            for record in self.random.sample(list(self.delivered.values()), 8):
                changed = json.loads(json.dumps(record))
                changed["full_text"] += " Point (a) of this act is corrected as follows."
                changed["metadata"]["date"] = "2025-12-31"
                records.append(changed)
        if event == "copies of held-out acts":
            records += self.copies(week)
        if event == "repealed acts":
            self.repeal(12)
        self.delivered |= {record["id"]: record for record in records}
        if records:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            if event == "broken file":
                lines += '{"id": "broken\n' * (len(self.delivered) // 10)
            (self.documents / f"week-{week:02}.jsonl").write_text(lines)

    def copies(self, week: int) -> list[Record]:
        held_out = pq.read_table(comparison(self.home, self.recipe.name) / "documents.parquet")
        some = held_out.select(["id", "text"]).to_pylist()[:6]
        copied = []
        for number, one in enumerate(some):
            words = one["text"].split(" ")
            words[number::40] = ["reprinted"] * len(words[number::40])
            copied.append(
                {"id": f"copy-{week}-{number}", "full_text": " ".join(words), "metadata": {}}
            )
        return copied

    def repeal(self, count: int) -> None:
        gone = set(self.random.sample(sorted(self.delivered), count))
        for file in self.documents.glob("*.jsonl"):
            kept = [
                line for line in file.read_text().splitlines() if json.loads(line)["id"] not in gone
            ]
            file.write_text("".join(line + "\n" for line in kept))
        for name in gone:
            del self.delivered[name]

    # A run

    def corpus(self) -> dict[str, Any]:
        return dict(corpus_of(self.recipe, self.home))

    def in_trouble(self, limited: bool = False, killed_after: float | None = None) -> None:
        """The same in a process of its own that has a full disk, or is killed. ``OSError``."""
        command = [sys.executable, __file__, "--corpus_of", str(self.home.parent)]
        child = subprocess.Popen(
            command,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=full_disk if limited else None,
        )
        try:
            _, said = child.communicate(timeout=killed_after)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return
        if child.returncode:
            raise OSError(said.strip().splitlines()[-1])

    def week(self, week: int) -> None:
        event = EVENTS.get(week, "")
        self.deliver(week, event)
        began = time.perf_counter()
        row: dict[str, Any] = {"week": week, "event": event}
        state = state_of(list_parts(self.recipe.documents))
        if not arrived(self.seen, state):
            self.close(row, began, "skipped: nothing is new")
            return
        run = f"weekly__{week:02}"
        record = open_record(self.home, run, "fast_cpt", self.recipe)
        try:
            if event == "full disk":
                self.in_trouble(limited=True)
            if event == "killed orchestrator":
                self.in_trouble(killed_after=self.random.uniform(1.5, 5.0))
            corpus = self.corpus()
            if event == "host down":
                raise ConnectionError("the GPU host does not answer")
        except (DocumentsError, OSError) as error:
            close_record(record, "failed")
            if event == "broken file":  # mended, as the message asks for
                file = self.documents / f"week-{week:02}.jsonl"
                good = [
                    line for line in file.read_text().splitlines() if not line.endswith("broken")
                ]
                file.write_text("".join(line + "\n" for line in good))
            self.close(row, began, f"failed: {str(error)[:60]}")
            return
        add_output(record, "build", {"path": corpus["path"], "digest": corpus["digest"]})
        row |= self.publish(run, record, corpus, event)
        close_record(record, "success")
        self.seen = state
        self.close(row, began, row["outcome"])

    def publish(self, run: str, record: Path, corpus: dict[str, Any], event: str) -> dict[str, Any]:
        """Train, evaluate, decide; the model becomes champion or candidate. Returns the week's figures."""
        model = self.train(corpus, event)
        name = f"{self.recipe.name}-{digest_of(run)}"
        (self.home / "models" / name).mkdir(parents=True)
        evaluation = evaluate(Path(corpus["path"]), model)
        gate = gate_of(evaluation, self.recipe.gate.perplexity_threshold, "random")
        best = registry.champion(self.home, self.recipe.name)
        compared, trained_on = None, 0
        if best:
            known = registry.models(self.home, self.recipe.name)[best]
            corpora = [corpus["digest"], known["corpus"]]
            trained_on = trained_and_held_out(self.home, self.recipe.name, corpora)
            before = registry.evaluation_of(self.home, self.recipe.name, best)
            compared = {"model": best, "evaluation": before}
        decision = decide(self.recipe.publish, gate, evaluation, compared, trained_on)
        facts = {"run": run, "record": record.name, "path": str(self.home / "models" / name)}
        facts |= {"training": name, "corpus": corpus["digest"], "decision": decision}
        outcome = registry.add_model(self.home, self.recipe.name, name, facts, evaluation)
        self.models[name] = model
        truth = self.truth(
            corpus, model, self.models[best] if best else model._replace(learnt=None)
        )
        measured = decision["conditions"][1]
        promoted = registry.champion(self.home, self.recipe.name) == name
        if event == "better learning rate" and promoted:
            self.rate = model.rate
        kept = {key: measured[key] for key in ("value", "low", "high")}
        return {
            "promoted": promoted,
            "truth": truth,
            "trained_on": trained_on,
            "outcome": outcome,
            **kept,
        }

    def train(self, corpus: dict[str, Any], event: str) -> Model:
        vocabulary, rows = corpus["tokenizer"]["vocab_size"], rows_of(Path(corpus["path"]))
        drawn = np.random.default_rng(self.random.randrange(1 << 30))
        if self.base is None:  # a model of general language: that of a tenth of the first week
            self.base = Counts.of(rows[::10], vocabulary)
        if event == "poisoned batch":
            share = self.random.choice([0.05, 0.1, 0.2])
            for n in np.flatnonzero(drawn.random(len(rows)) < share):
                rows[n] = drawn.integers(0, vocabulary, len(rows[n]))
        rate = self.rate
        if event == "worse learning rate":
            rate *= self.random.choice([0.4, 0.5, 0.6])
        if event == "better learning rate":
            rate += (1 - rate) * self.random.choice([0.2, 0.3, 0.4])
        return Model(self.base, Counts.of(rows, vocabulary), rate)

    def truth(self, corpus: dict[str, Any], model: Model, before: Model) -> float:
        """The share of nats that the model saves of the other's, on documents no decision sees."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(corpus["path"]) / "tokenizer" / "tokenizer.json"))
        ids = [np.array(one.ids, dtype=np.int64) for one in tokenizer.encode_batch(self.judges)]
        old, new = sum(before.losses(ids)), sum(model.losses(ids))
        return (old - new) / old

    def close(self, row: dict[str, Any], began: float, outcome: str) -> None:
        row |= {"seconds": round(time.perf_counter() - began, 2), "outcome": outcome}
        for folder in unused(self.home, Policy(0.0, candidates=2)):
            shutil.rmtree(folder)
        row["bytes"] = bytes_of(self.home)
        row["document_bytes"] = bytes_of(self.documents)
        self.rows.append(row)
        figures = "".join(
            f" {key} {row[key]:+.3%}"
            for key in ("value", "low", "high", "truth")
            if row.get(key) is not None
        )
        print(
            f"{row['week']:2} {row['event']:24}{row['seconds']:6.1f} s {outcome[:60]:60}{figures}",
            flush=True,
        )


def stream_of(folder: Path, seed: int) -> tuple[list[Record], list[str]]:
    """Documents in the order in which they come (from the end), and the texts that judge."""
    generate_sample(folder / "sample", documents=SAMPLE, seed=seed)
    parsed = folder / "sample" / "parsed"
    packed = (parsed / "part-02.jsonl.zst").read_bytes()
    lines = [
        *(parsed / "part-00.jsonl").read_bytes().splitlines(),
        *gzip.decompress((parsed / "part-01.jsonl.gz").read_bytes()).splitlines(),
        *zstandard.ZstdDecompressor().decompress(packed).splitlines(),
    ]
    records = pq.read_table(parsed / "part-03.parquet").to_pylist()
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the sample has records that cannot be read
            continue
    records = [
        record
        for record in records
        if isinstance(record, dict) and isinstance(record.get("full_text") or None, str)
    ]
    random.Random(seed).shuffle(records)
    judges = [record for record in records if record["id"].startswith("3")][:JUDGES]
    works = {record["id"][1:] for record in judges}
    stream = [record for record in records if not any(work in record["id"] for work in works)]
    return stream, [record["full_text"] for record in judges]


def rows_of(corpus: Path) -> list[Ids]:
    shards = sorted(corpus.glob("cpt_train_shard_*.parquet"))
    tables = [pq.read_table(shard, columns=["input_ids"]) for shard in shards]
    return [
        np.array(row, dtype=np.int64) for table in tables for row in table["input_ids"].to_pylist()
    ]


def evaluate(corpus: Path, model: Model) -> dict[str, Any]:
    """What ``evaluate_cpt`` writes, as far as a decision reads it."""
    table = pq.read_table(corpus / "validation" / "validation_shard_00.parquet")
    ids = [np.array(row, dtype=np.int64) for row in table["input_ids"].to_pylist()]
    losses = {"model": model.losses(ids), "base": model._replace(learnt=None).losses(ids)}
    tokens = sum(len(one) - 2 for one in ids)
    figures = {who: {"perplexity": math.exp(sum(nats) / tokens)} for who, nats in losses.items()}
    about = {name: table[name].to_pylist() for name in ("id", "bytes")}
    found = {**figures, "by_document": {**about, **losses}}
    return {"validation_set": "random", "window": 512, "random": found}


def corpus_of(recipe: Recipe, home: Path) -> CorpusFolder:
    scores = score_parts(list_parts(recipe.documents), recipe, home, 4)
    chosen = select([score["path"] for score in scores], recipe, home)
    return build(chosen["path"], recipe, home, 4)


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(
        "sample",
        {
            "documents.path": str(folder / "documents"),
            "corpus.num_shards": 2,
            "corpus.validation_share": 0.2,
            "publish.margin": MARGIN,
            "gate.perplexity_threshold": 1000.0,
            "tokenizer.train_vocab_size": 1000,
        },
    )


def full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))


def bytes_of(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def judged(year: Year) -> dict[str, Any]:
    """The year's figures, for the last line."""
    twice = 2 * year.recipe.publish.margin
    decided = [row for row in year.rows if "truth" in row]
    worse = [row for row in decided if row["truth"] <= -twice]
    better = [row for row in decided if row["truth"] >= twice]
    last = pq.read_table(
        max(year.home.glob("selections/*/documents.parquet"), key=os.path.getmtime)
    )
    corpora = [path.name for path in (year.home / "ledger").iterdir()]
    half = year.rows[len(year.rows) // 2]
    return {
        "weeks": len(year.rows),
        "models": len(decided),
        "promoted": sum(row["promoted"] for row in decided),
        "worse_by_twice_the_margin": len(worse),
        "of_them_promoted": sum(row["promoted"] for row in worse),
        "better_by_twice_the_margin": len(better),
        "of_them_refused": sum(not row["promoted"] for row in better),
        "documents_lost": len(year.delivered.keys() - set(last["id"].to_pylist())),
        "trained_on_and_judged_by": trained_and_held_out(year.home, year.recipe.name, corpora),
        "failed_runs": sum(row["outcome"].startswith("failed") for row in year.rows),
        "skipped_seconds": max(
            (row["seconds"] for row in year.rows if row["outcome"].startswith("skipped")), default=0
        ),
        "home_bytes_of_document_bytes": {
            str(row["week"]): round(row["bytes"] / row["document_bytes"], 2)
            for row in (half, year.rows[-1])
        },
        "reasons": dict(Counter(last["reason"].to_pylist())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder; a temporary one without it")
    parser.add_argument("--corpus_of", type=Path, help=argparse.SUPPRESS)  # a year's, in trouble
    arguments = parser.parse_args()
    if arguments.corpus_of:
        corpus_of(recipe_of(arguments.corpus_of), arguments.corpus_of / "home")
        return
    with tempfile.TemporaryDirectory(prefix="fast_cpt-year-") as folder:
        year = Year(arguments.work or Path(folder), arguments.seed)
        for week in range(1, arguments.weeks + 1):
            year.week(week)
        figures = judged(year)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
