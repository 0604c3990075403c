"""A year of weekly runs on a growing corpus: what becomes champion, what is refused, what is lost.

    .env/airflow/bin/python benchmarks/year.py [--weeks 52] [--small] [--seed 0] [--work FOLDER]

The corpus, the ledger, the comparison, the registry and the cleaning are the project's own. Only the
trainer is a small one: trigram counts, interpolated with those of a base model. A training takes a
second, and can be made better or worse by a given amount. Weeks have events: none or
many new documents, corrected and repealed acts, copies of held-out acts, broken files, a worse and
a better learning rate, a poisoned batch, a training that diverges, a host that is down or slow, a full
disk, a killed orchestrator, a person who rolls back. The messages about them go to real receivers
(``year_told``).

Whether a model is really better than the champion of its week is judged on 300 documents that no
decision sees. Better or worse means by at least twice ``publish.margin``. Each week two more pairs are
decided, one better and one worse by two to four margins, and neither is promoted. The last line is
one JSON object; the exit code is 1 if a goal of ``missed`` was missed.
"""

from __future__ import annotations

import argparse
import json
import logging
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "include"))
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="fast_cpt-year-airflow-"))

from year_documents import Record, stream_of  # noqa: E402
from year_model import Counts, Ids, Model, Read, weaker  # noqa: E402
from year_told import Run, Told  # noqa: E402

from fastcpt.corpus.build import build  # noqa: E402
from fastcpt.corpus.documents import DocumentsError, list_parts  # noqa: E402
from fastcpt.corpus.new_documents import State, arrived, state_of  # noqa: E402
from fastcpt.corpus.score import score_parts  # noqa: E402
from fastcpt.corpus.select import select  # noqa: E402
from fastcpt.files import digest_of  # noqa: E402
from fastcpt.held_out import comparison, trained_and_held_out  # noqa: E402
from fastcpt.manifests import CorpusFolder  # noqa: E402
from fastcpt.recipe import Recipe, load_recipe  # noqa: E402
from fastcpt.registry import champion as registry  # noqa: E402
from fastcpt.registry.conditions import recommend  # noqa: E402
from fastcpt.registry.in_use import Policy, unused  # noqa: E402
from fastcpt.reporting.record import add, add_output, close_record, open_record, read  # noqa: E402

FIRST, WEEKLY = 900, 10  # documents of the first week and of every other week
# with --small, for a busy machine: documents are cut
SMALL_FIRST, SMALL_CHARACTERS = 450, 1_500
MARGIN = 0.005
MOST_DISK = 2.0  # bytes of FASTCPT_HOME for each of the documents
SMALL_DISK = 300_000  # the largest file, in bytes, in the week of the full disk
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
    25: "slow host",
    26: "repealed acts",
    28: "better learning rate",
    30: "full disk",
    31: "diverged training",
    32: "worse learning rate",
    34: "poisoned batch",
    35: "rolled back",
    36: "nothing new",
    38: "better learning rate",
    40: "copies of held-out acts",
    42: "worse learning rate",
    44: "killed orchestrator",
    46: "poisoned batch",
    48: "better learning rate",
    50: "worse learning rate",
}


class Year:
    def __init__(self, folder: Path, seed: int, small: bool) -> None:
        self.random = random.Random(seed)
        self.home, self.documents = folder / "home", folder / "documents"
        self.documents.mkdir(parents=True)
        self.first, characters = (SMALL_FIRST, SMALL_CHARACTERS) if small else (FIRST, None)
        self.stream, self.judges = stream_of(folder, seed, 2 * self.first, characters)
        self.recipe = year_recipe(folder)
        self.seen: State = {}
        self.delivered: dict[str, Record] = {}
        self.models: dict[
            str, tuple[Model, Read, Read]
        ] = {}  # with its losses on the judges and the frozen set
        self.told = Told(self.home)
        self.trials: list[dict[str, Any]] = []
        self.base: Counts | None = None
        self.rate = 0.5
        self.trial_effects = random.Random(seed)
        self.rows: list[dict[str, Any]] = []

    # Documents

    def deliver(self, week: int, event: str) -> None:
        """Write this week's documents to the folder."""
        count = {"nothing new": 0, "40 % more": len(self.delivered) * 2 // 5}.get(event, WEEKLY)
        records = [self.stream.pop() for _ in range(self.first if week == 1 else count)]
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
        """The same in its own process, which has a full disk or is killed. Raises ``OSError``."""
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
        name = f"weekly__{week:02}"
        record = open_record(self.home, name, "fast_cpt", self.recipe)
        run = Run(name, record, self.recipe)
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
            run.failed("sync" if event == "host down" else "build", error)
            self.told.expect("failed", name)
            if event == "broken file":  # repaired, as the message asks
                file = self.documents / f"week-{week:02}.jsonl"
                good = [
                    line for line in file.read_text().splitlines() if not line.endswith("broken")
                ]
                file.write_text("".join(line + "\n" for line in good))
            self.close(row, began, f"failed: {str(error)[:60]}")
            return
        add_output(record, "build", {"path": corpus["path"], "digest": corpus["digest"]})
        row |= self.train_and_publish(run, corpus, event)
        close_record(record, "success" if "promoted" in row else "failed")
        self.seen = state
        if event == "rolled back":
            run.roll_back("its dates are wrong")
            self.told.expect("rolled back", name)
        self.close(row, began, row["outcome"])

    def train_and_publish(self, run: Run, corpus: dict[str, Any], event: str) -> dict[str, Any]:
        """Train, evaluate, decide; the model becomes champion or candidate. Returns the week's figures."""
        model = self.train(corpus, event)
        training = digest_of(run.name)
        run.train(training, hours=2.5 if event == "slow host" else 1.0, planned=2.0)
        if event == "slow host":
            self.told.expect("spent more than planned", run.name)
        about, ids = held_out(Path(corpus["path"]))
        judges, judged = model.read(self.judge_ids(corpus)), model.read(ids)
        add(run.record, "evaluation.json", evaluation(about, judged, model.rate))
        if not run.gates():
            self.told.expect("gate missed", run.name, 2)
            return {"outcome": "failed: the gate was missed"}
        best = registry.champion(self.home, self.recipe.name)
        name = f"{self.recipe.name}-{training}"
        path = self.home / "models" / name
        path.mkdir(parents=True)
        outcome = run.publish(training, path)
        self.models[name] = model, judges, judged
        promoted = registry.champion(self.home, self.recipe.name) == name
        self.told.expect("promoted" if promoted else "kept as a candidate", run.name)
        if event == "better learning rate" and promoted:
            self.rate = model.rate
        before = self.truth_of(best) if best else judges.nats(0.0)
        measured = read(run.record, "decision.json")["conditions"]
        if best and event != "poisoned batch":
            self.try_pairs(best, model, judges, judged, about)
        return {
            "promoted": promoted,
            "truth": 1 - judges.nats(model.rate) / before,
            "outcome": outcome,
            **{key: measured[1][key] for key in ("value", "low", "high")},
        }

    def truth_of(self, name: str) -> float:
        """Nats of a model on the documents that no decision sees."""
        model, judges, _ = self.models[name]
        return judges.nats(model.rate)

    def try_pairs(
        self, best: str, model: Model, judges: Read, judged: Read, about: dict[str, Any]
    ) -> None:
        """Decide between the week's model and a worse champion, and between a worse model and the champion."""
        champion, its_judges, its_judged = self.models[best]
        for sign in (1, -1):
            effect = sign * MARGIN * self.trial_effects.uniform(2.0, 4.0)
            new, old = model.rate, champion.rate
            if sign > 0:
                old = weaker(its_judges, old, judges.nats(new) / (1 - effect))
            else:
                new = weaker(judges, new, its_judges.nats(old) * (1 - effect))
            truth = 1 - judges.nats(new) / its_judges.nats(old)
            if abs(truth - effect) > MARGIN / 10:  # out of reach this week
                continue
            gate = {"value": 1.0, "threshold": 2.0, "passed": True, "validation_set": "random"}
            against = {"model": best, "evaluation": evaluation(about, its_judged, old)}
            decision = recommend(self.recipe.publish, gate, evaluation(about, judged, new), against)
            self.trials.append({"truth": truth, "recommended": decision["recommended"]})

    def train(self, corpus: dict[str, Any], event: str) -> Model:
        vocabulary, rows = corpus["tokenizer"]["vocab_size"], rows_of(Path(corpus["path"]))
        drawn = np.random.default_rng(self.random.randrange(1 << 30))
        if self.base is None:  # a model of general language: that of a tenth of the first week
            self.base = Counts.of(rows[::10], vocabulary)
        if event in ("poisoned batch", "diverged training"):
            share = self.random.choice([0.05, 0.1, 0.2]) if event == "poisoned batch" else 1.0
            for n in np.flatnonzero(drawn.random(len(rows)) < share):
                rows[n] = drawn.integers(0, vocabulary, len(rows[n]))
        rate = self.rate
        if event == "diverged training":
            rate = 0.999
        if event == "worse learning rate":
            rate *= self.random.choice([0.4, 0.5, 0.6])
        if event == "better learning rate":
            rate += (1 - rate) * self.random.choice([0.2, 0.3, 0.4])
        return Model(self.base, Counts.of(rows, vocabulary), rate)

    def judge_ids(self, corpus: dict[str, Any]) -> list[Ids]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(corpus["path"]) / "tokenizer" / "tokenizer.json"))
        return [np.array(one.ids, dtype=np.int64) for one in tokenizer.encode_batch(self.judges)]

    def close(self, row: dict[str, Any], began: float, outcome: str) -> None:
        row |= {"seconds": round(time.perf_counter() - began, 2), "outcome": outcome}
        for folder in unused(self.home, Policy(0.0, candidates=2)):
            shutil.rmtree(folder)
        row["bytes"] = size_on_disk(self.home)
        row["document_bytes"] = size_on_disk(self.documents)
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


def rows_of(corpus: Path) -> list[Ids]:
    shards = sorted(corpus.glob("cpt_train_shard_*.parquet"))
    tables = [pq.read_table(shard, columns=["input_ids"]) for shard in shards]
    return [
        np.array(row, dtype=np.int64) for table in tables for row in table["input_ids"].to_pylist()
    ]


def held_out(corpus: Path) -> tuple[dict[str, Any], list[Ids]]:
    """Names and sizes of the documents that a corpus holds out, and their tokens."""
    table = pq.read_table(corpus / "validation" / "validation_shard_00.parquet")
    ids = [np.array(row, dtype=np.int64) for row in table["input_ids"].to_pylist()]
    return {name: table[name].to_pylist() for name in ("id", "bytes")}, ids


def evaluation(about: dict[str, Any], judged: Read, rate: float) -> dict[str, Any]:
    """The part of ``evaluate_cpt``'s result that a decision needs."""
    losses = {"model": judged.losses(rate), "base": judged.losses(0.0)}
    tokens = int(judged.ends[-1])
    figures = {who: {"perplexity": math.exp(sum(nats) / tokens)} for who, nats in losses.items()}
    found = {**figures, "by_document": {**about, **losses}}
    return {"validation_set": "random", "window": 512, "random": found}


def corpus_of(recipe: Recipe, home: Path) -> CorpusFolder:
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    chosen = select([score["path"] for score in scores], recipe, home)
    return build(chosen["path"], recipe, home, 1)


def year_recipe(folder: Path) -> Recipe:
    return load_recipe(
        "sample",
        {
            "documents.path": str(folder / "documents"),
            "corpus.num_shards": 2,
            "corpus.validation_share": 0.2,
            "publish.margin": MARGIN,
            "gate.perplexity_threshold": 300.0,
            "cluster.cpu_only": False,
            "budget.price_per_gpu_hour": 2.0,
            "tokenizer.train_vocab_size": 1000,
        },
    )


def full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))


def size_on_disk(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def year_figures(year: Year) -> dict[str, Any]:
    """The year's figures, for the last line."""
    twice = 2 * year.recipe.publish.margin
    decided = [row for row in year.rows if "truth" in row]
    worse = [row for row in decided if row["truth"] <= -twice]
    better = [row for row in decided if row["truth"] >= twice]
    last = pq.read_table(
        max(year.home.glob("selections/*/documents.parquet"), key=os.path.getmtime)
    )
    corpora = [path.name for path in (year.home / "ledger").iterdir()]
    good, bad = ([trial for trial in year.trials if trial["truth"] * sign > 0] for sign in (1, -1))
    return {
        "weeks": len(year.rows),
        "models": len(decided),
        "promoted": sum(row["promoted"] for row in decided),
        "worse_by_twice_the_margin": len(worse),
        "of_them_promoted": sum(row["promoted"] for row in worse),
        "better_by_twice_the_margin": len(better),
        "of_them_refused": sum(not row["promoted"] for row in better),
        "worse_pairs": len(bad),
        "worse_pairs_recommended": sum(trial["recommended"] for trial in bad),
        "better_pairs": len(good),
        "better_pairs_refused": sum(not trial["recommended"] for trial in good),
        "documents_lost": len(year.delivered.keys() - set(last["id"].to_pylist())),
        "trained_on_and_judged_by": trained_and_held_out(year.home, year.recipe.name, corpora),
        "failed_runs": sum(row["outcome"].startswith("failed") for row in year.rows),
        "skipped_seconds": max(
            (row["seconds"] for row in year.rows if row["outcome"].startswith("skipped")), default=0
        ),
        "home_bytes_of_document_bytes": [
            round(row["bytes"] / row["document_bytes"], 2) for row in year.rows
        ],
        "ledger_bytes": size_on_disk(year.home / "ledger"),
        "incidents": year.told.due.total(),
        "told_wrongly": year.told.wrong(),
        "reasons": dict(Counter(last["reason"].to_pylist())),
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """The goals that the year missed."""
    good = figures["better_by_twice_the_margin"] + figures["better_pairs"]
    refused = figures["of_them_refused"] + figures["better_pairs_refused"]
    wanted = {
        "no regression is promoted": figures["of_them_promoted"]
        + figures["worse_pairs_recommended"]
        == 0,
        "at most 1 of 20 good models is refused": 20 * refused <= good,
        "no document is lost": figures["documents_lost"] == 0,
        "none is trained on and judged by": figures["trained_on_and_judged_by"] == 0,
        "every incident is told exactly once": not figures["told_wrongly"],
        f"FASTCPT_HOME has at most {MOST_DISK:g} times the documents' bytes": max(
            figures["home_bytes_of_document_bytes"]
        )
        <= MOST_DISK,
    }
    return [what for what, holds in wanted.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--small", action="store_true", help="fewer and shorter documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument("--corpus_of", type=Path, help=argparse.SUPPRESS)  # a year's, in trouble
    arguments = parser.parse_args()
    if arguments.corpus_of:
        corpus_of(year_recipe(arguments.corpus_of), arguments.corpus_of / "home")
        return
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="fast_cpt-year-") as folder:
        year = Year(arguments.work or Path(folder), arguments.seed, arguments.small)
        for week in range(1, arguments.weeks + 1):
            year.week(week)
        year.told.close()
        figures = year_figures(year)
    print(json.dumps(figures))
    if wrong := missed(figures):
        sys.exit(f"missed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
