"""The corpus engine compared with datatrove, on the same documents, machine and cores, in one run.

    python benchmarks/corpus.py --data FOLDER --tokenizer FOLDER [--no_ten] [--peer_python PYTHON]

Both read JSONL, score or filter, find near-duplicates by MinHash over 5-word sequences, tokenize
with the same tokenizer and write token files. Ours also collapses versions, checks the splits,
packs and compresses. The peer runs two of its own filters (Gopher's and FineWeb's quality) and
keeps what they would drop, so that both tokenize the same. Documents are counted before duplicates.

datatrove (0.10.1) has a separate environment, which the script makes under ``.env/datatrove``
without ``--peer_python``. Peak memory is the sum of the proportional set sizes of a run's
processes (shared pages count once), sampled five times a second. The ten
copies of the tenfold corpus differ in every fifth word. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ["datatrove[processing]==0.10.1", "tokenizers", "spacy", "orjson", "zstandard"]

OURS = """
import json, sys, logging
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="  %(message)s")
from fastcpt.corpus.build import build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import load_recipe
data, tokenizer, home = sys.argv[1:]
recipe = load_recipe("cpt_config_fast", {
    "documents.path": data, "tokenizer.path": tokenizer,
    "selection.top_share": None, "selection.target_tokens": None,
})
scores = score_parts(list_parts(recipe.documents), recipe, Path(home))
selection = select([score["path"] for score in scores], recipe, Path(home))
corpus = build(selection["path"], recipe, Path(home))
print(json.dumps({"read": selection["documents"]} | {key: corpus[key] for key in
      ("documents", "tokens", "padding_share", "bytes_per_token")}))
"""

PEER = """
import sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster
from datatrove.pipeline.dedup import MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
from datatrove.utils.typeshelper import Languages

data, tokenizer, home, workers = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
tasks = len(list(Path(data).glob("*.jsonl.zst")))
config = MinhashConfig()

def read():
    return JsonlReader(data, text_key="full_text", glob_pattern="*.jsonl.zst", compression="zstd")

filters = [GopherQualityFilter(), FineWebQualityFilter()]

def scored(document):
    for number, step in enumerate(filters):
        document.metadata[f"filter_{number}"] = str(step.filter(document))
    return True

def run(name, pipeline, tasks, workers):
    LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=workers,
                          logging_dir=str(home / "logs" / name), start_method="fork").run()

if __name__ == "__main__":
    run("signatures", [read(), LambdaFilter(scored), MinhashDedupSignature(
        str(home / "signatures"), config=config, language=Languages.english)], tasks, workers)
    run("buckets", [MinhashDedupBuckets(str(home / "signatures"), str(home / "buckets"),
        config=config)], config.num_buckets, workers)
    run("cluster", [MinhashDedupCluster(str(home / "buckets"), str(home / "remove"),
        config=config)], 1, 1)
    run("tokens", [read(), MinhashDedupFilter(str(home / "remove")),
        DocumentTokenizer(str(home / "tokens"), tokenizer + "/tokenizer.json",
                          eos_token="<|endoftext|>", seed=0)], tasks, workers)
    run("merged", [DocumentTokenizerMerger(str(home / "tokens"), str(home / "merged"),
        save_filename="corpus", seed=0)], 1, 1)
"""

WEB_FILTERS = """
import json, sys
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
filters = {"gopher_repetition": GopherRepetitionFilter(), "gopher_quality": GopherQualityFilter(),
           "c4": C4QualityFilter(), "fineweb": FineWebQualityFilter()}
passed = dict.fromkeys([*filters, "all"], 0)
count = 0
for document in JsonlReader(sys.argv[1], text_key="full_text", glob_pattern="*.jsonl.zst",
                            compression="zstd")():
    if count == int(sys.argv[2]):
        break
    count += 1
    text = document.text
    kept = True
    for name, step in filters.items():
        document.text = text
        good = step.filter(document) is True
        passed[name] += good
        kept = kept and good
    passed["all"] += kept
print(json.dumps({name: number / count for name, number in passed.items()}))
"""

BARE = """
import os, sys
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import time
from tokenizers import Tokenizer
from fastcpt.corpus.documents import read_documents
from fastcpt.recipe_sections import Fields
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
texts = [document.text for part in sys.argv[2:] for document in read_documents(part, Fields())]
started = time.monotonic()
tokens = 0
while texts:
    batch, size = [], 0
    while texts and size < 1 << 20:
        batch.append(texts.pop())
        size += len(batch[-1])
    tokens += sum(len(item) for item in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
print(tokens, time.monotonic() - started)
"""

TOKENIZE = """
import sys, time
from pathlib import Path
import numpy as np
from fastcpt.corpus.documents import read_documents
from fastcpt.corpus.processes import in_processes
from fastcpt.corpus.tokenizer import describe, faster
from fastcpt.corpus.tokens import tokenize_part
from fastcpt.recipe_sections import Fields
tokenizer_folder, home, *parts = sys.argv[1:]
tokenizer = faster(describe(Path(tokenizer_folder) / "tokenizer.json"), [], Path(home))
everything = np.arange(1_000_000)
calls = [(part, part, Fields(), tokenizer, everything, Path(home)) for part in parts]
started = time.monotonic()
tokens = sum(result["tokens"] for _, result in in_processes(tokenize_part, calls))
print(tokens, time.monotonic() - started)
"""


@dataclass
class Run:
    """A command's wall and CPU seconds, the peak memory of its processes, and its output."""

    seconds: float
    cpu: float
    peak_gb: float
    output: str


def measured(command: list[str]) -> Run:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment())
    peak = [0]
    ended = threading.Event()
    watch = threading.Thread(target=watch_memory, args=(process.pid, peak, ended))
    watch.start()
    output, _ = process.communicate()
    seconds = time.monotonic() - started
    ended.set()
    watch.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"{command[:3]} failed with {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, peak[0] / 1e9, output)


def watch_memory(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.2):
        total, waiting = 0, [pid]
        while waiting:
            one = waiting.pop()
            try:
                sizes = Path(f"/proc/{one}/smaps_rollup").read_text().partition("\nPss:")[2]
                total += int(sizes.split()[0]) * 1024
                for task in Path(f"/proc/{one}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
            except (OSError, ValueError, IndexError):
                continue
        peak[0] = max(peak[0], total)


def python_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "include")}


def peer_python(given: str | None) -> str:
    if given:
        return given
    folder = REPOSITORY / ".env" / "datatrove"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the peer's environment in {folder}")
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
    return str(python)


def ten_times(part: str, folder: Path) -> None:
    """Ten copies of every document of a part, no two alike: every fifth word is unique to the copy."""
    import io

    import zstandard

    from fastcpt.corpus.documents import Document, read_documents
    from fastcpt.recipe_sections import Fields

    for copy in range(10):
        with (
            (folder / f"{Path(part).name.split('.')[0]}-{copy}.jsonl.zst").open("wb") as file,
            zstandard.ZstdCompressor(level=1).stream_writer(file) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as lines,
        ):
            for document in read_documents(part, Fields()):
                assert isinstance(document, Document)
                words = document.text.split(" ")
                if copy:
                    words[::5] = [f"{word}{chr(97 + copy)}" for word in words[::5]]
                metadata = {
                    "title": document.title,
                    "date": document.date,
                    "doc_type": document.doc_type,
                    "subject_matter": list(document.subjects),
                    "language": document.language,
                }
                record = {
                    "id": f"{document.id} copy {copy}",
                    "full_text": " ".join(words),
                    "metadata": metadata,
                }
                lines.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="Folder of .jsonl.zst files.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--peer_python", help="A Python with datatrove 0.10.1 and spacy.")
    parser.add_argument("--no_ten", action="store_true", help="Leave the tenfold corpus out.")
    parser.add_argument("--no_peer", action="store_true", help="Leave datatrove out.")
    parser.add_argument("--web_sample", type=int, default=248, help="Acts tested with web filters.")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "include"))
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(ratios(arguments, Path(scratch))))


def ratios(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    data, tokenizer = str(arguments.data.resolve()), str(arguments.tokenizer.resolve())
    parts = sorted(str(path) for path in Path(data).glob("*.jsonl.zst"))
    processes = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {}
    ours = ours_on(data, tokenizer, scratch / "1x", "ours")
    corpus = json.loads(ours.output.splitlines()[-1])
    if not arguments.no_peer:
        python = peer_python(arguments.peer_python)
        figures |= beside_datatrove(ours, python, data, tokenizer, scratch, processes)
    figures["tokenize_ratio"] = tokenize_ratio(tokenizer, parts, scratch / "tokens", processes)
    figures["peak_gb_1x"] = round(ours.peak_gb, 3)
    if not arguments.no_ten:
        for made in ("tokens", "1x", "peer"):
            shutil.rmtree(scratch / made, ignore_errors=True)
        figures["peak_gb_10x"] = round(tenfold(parts, tokenizer, scratch, processes).peak_gb, 3)
    if not arguments.no_peer:
        passed = passed_by_web_filters(python, data, arguments.web_sample)
        figures["dropped_by_web_filters"] = round(1 - passed["all"], 3)
    figures |= {
        "bytes_per_token": round(corpus["bytes_per_token"], 3),
        "padding": round(corpus["padding_share"], 5),
        "tokens_per_s": round(corpus["tokens"] / ours.seconds),
        "documents_per_s": round(corpus["read"] / ours.seconds, 1),
        "processes": processes,
    }
    return figures


def shown(name: str, run: Run) -> Run:
    print(f"{name}: {run.seconds:.1f} s, {run.cpu:.1f} CPU s, {run.peak_gb:.2f} GB", flush=True)
    return run


def ours_on(data: str, tokenizer: str, home: Path, name: str) -> Run:
    run = shown(name, measured([sys.executable, "-c", OURS, data, tokenizer, str(home)]))
    print(f"  {run.output.splitlines()[-1]}")
    return run


def beside_datatrove(
    ours: Run, python: str, data: str, tokenizer: str, scratch: Path, processes: int
) -> dict[str, float]:
    script = scratch / "peer.py"
    script.write_text(PEER)
    command = [python, str(script), data, tokenizer, str(scratch / "peer"), str(processes)]
    peer = shown("datatrove", measured(command))
    return {
        "ratio_datatrove": round(peer.seconds / ours.seconds, 2),
        "ratio_datatrove_cpu": round(peer.cpu / ours.cpu, 2),
    }


def tokenize_ratio(tokenizer: str, parts: list[str], home: Path, processes: int) -> float:
    """Our tokens per second divided by those of bare ``encode_batch_fast``."""
    bare = bare_rate(tokenizer, parts, processes)
    run = measured([sys.executable, "-c", TOKENIZE, tokenizer, str(home), *parts])
    tokens, seconds = map(float, run.output.split())
    print(f"tokenizing: {tokens / seconds:,.0f} tokens/s, bare encode_batch_fast {bare:,.0f}")
    return round(tokens / seconds / bare, 2)


def tenfold(parts: list[str], tokenizer: str, scratch: Path, processes: int) -> Run:
    folder = scratch / "ten"
    folder.mkdir()
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(ten_times, parts, [folder] * len(parts)))
    return ours_on(str(folder), tokenizer, scratch / "10x", "ours, ten times")


def passed_by_web_filters(python: str, data: str, sample: int) -> dict[str, float]:
    command = [python, "-c", WEB_FILTERS, data, str(sample)]
    web = subprocess.run(command, check=True, capture_output=True, text=True)
    passed: dict[str, float] = json.loads(web.stdout.splitlines()[-1])
    print(f"acts that pass the web's filters: {passed}")
    return passed


def bare_rate(tokenizer: str, parts: list[str], processes: int) -> float:
    """Tokens per second of bare ``encode_batch_fast``, in as many processes as we use."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, tokenizer, *parts[number::processes]],
            stdout=subprocess.PIPE,
            text=True,
            env=python_environment(),
        )
        for number in range(processes)
    ]
    results = [tuple(map(float, process.communicate()[0].split())) for process in running]
    return sum(tokens for tokens, _ in results) / max(seconds for _, seconds in results)


if __name__ == "__main__":
    main()
