"""One run under a fault of ``orphans.py``: what the DAG does, with the product's functions, and its training.

    orphans_run.py FOLDER

FOLDER has ``facts.json`` (``money``), the provider and the trainer; the run leaves its ledger, its notes and
what it brought there.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / name) for name in ("include", "plugins", "tests")]

import provider  # noqa: E402
from bringing import Bring, Bringing  # noqa: E402
from fastcpt.cluster import checkpoints, jobs, remote  # noqa: E402
from fastcpt.cluster.agent.job_folder import ACTIVE  # noqa: E402
from fastcpt.cluster.check import check_host  # noqa: E402
from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask  # noqa: E402
from fastcpt.files import read_json, write_json  # noqa: E402
from fastcpt.recipe_sections import Rent  # noqa: E402
from fastcpt.rent import ledger, machines  # noqa: E402
from fastcpt.rent.provider import ProviderError  # noqa: E402

DAG = "fast_cpt"
# The training: steps of so long, a checkpoint every few of them, one never older than so here. It is
# long beside these: what is lost could be all of a short one.
STEPS, STEP_S, SAVE_STEPS, BRING_S = 150, 0.2, 5, 10.0
# In place of minutes: how long a silent machine is waited for, and one that nobody asks for waits.
SILENT_S, ORPHAN_S = 20.0, 25.0
TRAINER = """
import fcntl, hashlib, json, os, signal, sys, time
folder, notes, steps, pace, every = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
own = os.path.join(folder, "checkpoints")
os.makedirs(own, exist_ok=True)
def note(what, step):
    with open(notes, "a") as file:
        file.write("%s %d %.2f %s\\n" % (what, step, time.time(), folder))
gpu = open(notes + ".gpu", "w")
try:
    fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    note("twice", 0)
def save(step):
    name = os.path.join(own, "step_%d" % step)
    if os.path.isdir(name):
        return
    os.makedirs(name + ".new", exist_ok=True)
    text = b"weights " * 20000
    with open(os.path.join(name + ".new", "rank_0.pt"), "wb") as file:
        file.write(text)
    whole = {"rank_0.pt": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    with open(os.path.join(name + ".new", "digests.json"), "w") as file:
        json.dump(whole, file)
    os.rename(name + ".new", name)
    note("saved", step)
at = max([int(name[5:]) for name in os.listdir(own) if name[5:].isdigit()], default=0)
note("start", at)
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(1))
for step in range(at + 1, int(steps) + 1):
    time.sleep(pace)
    print("step", step, flush=True)
    note("step", step)
    if step % every == 0 or ending:
        save(step)
    if ending:
        sys.exit(143)
with open(os.path.join(folder, "training.json.new"), "w") as file:
    json.dump({"steps": steps}, file)
os.replace(os.path.join(folder, "training.json.new"), os.path.join(folder, "training.json"))
"""


def quick() -> None:
    """The product's waits, of minutes, in the seconds of this benchmark."""
    remote.OUTAGE_S = SILENT_S
    machines.VERIFY_S, machines.VERIFY_POLL_S, machines.LATE_S = 3.0, 0.3, 8.0


class Run:
    """One run's folder: its ledger (``home``), its provider, its notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.provider = folder, folder / "home", folder / "provider"
        self.name, self.notes = folder.name, folder / "notes"
        self.facts = read_json(folder / "facts.json") if (folder / "facts.json").exists() else {}

    def rentals(self) -> list[ledger.Rental]:
        return ledger.of_run(self.home, DAG, self.name)

    def step_of(self, what: str) -> list[tuple[int, float, str]]:
        """The step, the moment and the machine of each such note, in order."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        found = [line.split(" ", 3) for line in lines]
        return [(int(step), float(at), where) for kind, step, at, where in found if kind == what]


def orchestrate(run: Run) -> None:
    """Rent, train, bring, give back; as often as it takes."""
    (run.folder / "begun").touch()
    while True:
        try:
            rental = _take(run)
            done = _train(run, rental)
        except machines.MoneySpent:
            done = True
        except (ProviderError, machines.NotReleased, ConnectionLost, ClusterError) as error:
            print(f"{time.time():.1f} {type(error).__name__}: {error}", flush=True)
            done = False
            time.sleep(0.5)
        if done:
            break
    while True:
        try:
            machines.release_machines(run.home, DAG, run.name, "the run has ended")
            return
        except (ProviderError, machines.NotReleased) as error:
            print(f"{time.time():.1f} {type(error).__name__}: {error}", flush=True)
            time.sleep(0.5)


def _take(run: Run) -> ledger.Rental:
    """The run's machine, checked and watched; one that is silent goes back."""
    rent = Rent(**provider.commands(run.provider))
    rental = machines.rent_machine(run.home, DAG, run.name, rent, {"gpus": 1}, run.facts["money"])
    until = time.monotonic() + SILENT_S
    while True:
        try:
            root = check_host(_remote(run, rental), "fast_cpt")["root"]
            break
        except (ConnectionLost, ClusterError) as error:
            if time.monotonic() > until or isinstance(error, ClusterError):
                machines.release_machines(
                    run.home, DAG, run.name, f"it could not take the run: {error}"
                )
                raise
            time.sleep(0.5)
    assert rental.machine is not None
    watch = {
        "deadline_unix": ledger.deadline(run.rentals(), rental),
        "orphan_hours": ORPHAN_S / 3600,
        "reserve_seconds": 2.0,
        "release_command": rental.machine.release_command,
    }
    jobs.watch(_remote(run, rental), root, watch)
    write_json(run.folder / "watched.json", {"machine": rental.machine.id, "root": root})
    return rental


def _remote(run: Run, rental: ledger.Rental) -> Remote:
    machine = rental.machine
    assert machine is not None
    known = str(ledger.known_hosts(run.home, rental))
    key = str(run.provider / "client_key")
    return Remote(machine.host, machine.user, machine.port, key, known)


def _train(run: Run, rental: ledger.Rental) -> bool:
    """Train to the end, from the newest checkpoint; False where it has to be tried again."""
    host, root = _remote(run, rental), read_json(run.folder / "watched.json")["root"]
    folder, home = f"{root}/models/t", run.home / "checkpoints"
    if not jobs.runs(host, root, "train"):
        checkpoints.send_back(host, folder, home)
    words = [STEPS, STEP_S, SAVE_STEPS]
    program = ["python3", str(run.folder / "trainer.py"), folder, str(run.notes), *map(str, words)]
    job = jobs.Job("train", [program], {"RANK": "0"}, result=f"{folder}/training.json")
    if jobs.submit(host, root, job) == "complete":
        return True
    return asyncio.run(_watch(run, host, root, Bring("rented", folder, str(home), BRING_S / 60)))


async def _watch(run: Run, host: Remote, root: str, wanted: Bring) -> bool:
    """What the trigger does: ask, and bring checkpoints; whether the training has succeeded."""
    clock = asyncio.get_running_loop().time
    bringing, answered = Bringing(wanted, logging.getLogger("bringing"), clock), clock()
    try:
        while True:
            await asyncio.sleep(1.2)
            asked = [{"name": "train", "seen": None}]
            try:
                answer = await asyncio.to_thread(ask, host, "poll", root=root, jobs=asked)
            except ConnectionLost as error:
                if clock() - answered > SILENT_S:
                    why = f"it does not answer: {error}"
                    machines.release_machines(run.home, DAG, run.name, why)
                    raise
                continue
            answered = clock()
            state = answer["jobs"][0].get("status", {}).get("state")
            if state in ACTIVE:
                bringing.look(host)
                continue
            if state != "succeeded":
                with suppress(TimeoutError):
                    await asyncio.wait_for(bringing.last(host), SILENT_S)
            return bool(state == "succeeded")
    finally:
        await bringing.end()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(created).1f %(message)s")
    quick()
    orchestrate(Run(Path(sys.argv[1])))
