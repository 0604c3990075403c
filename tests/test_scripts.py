"""Scripts, Makefile and Python's use of the system work with what a Mac has (bash 3.2, make 3.81).

shellcheck reads them, a list of patterns looks for what it does not see, and they are run with a
PATH that has only what a Mac has, BSD's tools played by stand-ins that refuse GNU's options.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((REPOSITORY / "include" / "scripts").glob("*.sh"))

# What bash learnt after 3.2, and options that only GNU's tools take.
NEWER = {
    r"\b(mapfile|readarray|coproc)\b": "bash 4",
    r"\b(declare|local|typeset) +-[a-zA-Z]*[Ang]": "associative arrays and references: bash 4",
    r"\$\{\w+(\[[^]]*\])?(\^|,|@[A-Za-z])": "case and transformations: bash 4",
    r"\$\{\w+\[ *-": "an index from the end: bash 4.3",
    r"&>>|\|&|;;&|;&": "bash 4",
    r"\bexec +\{|\bwait +-n|\bshopt\b.*\b(globstar|lastpipe)\b|\[\[ +-v ": "bash 4",
    r"\b(BASHPID|EPOCHSECONDS|EPOCHREALTIME)\b|\bread +-[a-z]*[iN]|printf +-v *\S+\[": "bash 4",
    r"\bsed +(-[a-z]+ +)*(-i\b|-[a-z]*[rsz]\b)": "GNU's sed",
    r"\b(readlink|realpath) +-[a-z]*[fem]|\bstat +-c|\bdate +(-d|-I)|\bgrep +-[a-z]*P": "GNU's",
    r"\b(cp|mv|ln|install) +-[a-z]*[tT]\b|\bfind\b.*-(printf|regextype)": "GNU's",
    r"\bhead +-[nc] *-|\btouch +-d|\bsort +-[a-z]*[hRV]|\bls +--|\bcp +-[a-z]*[ud]": "GNU's",
    r"\b(sed|grep|cut|head|tail|sort|cat|tr|wc|cp|mv|rm|ln|ls|mkdir|touch|date|mktemp|xargs)( +-\w+)* +--\w": "GNU's",
    r"(^|[;&|(]|\b(then|do|else|exec)\b) *(flock|sha256sum|md5sum|nproc|setsid|timeout|tac|shuf)\b": "not there",
}
NEWER_MAKE = r"^\.(ONESHELL|RECIPEPREFIX)|\$\((file|guile|intcmp|let) |^\s*\S+ *(!=|:::?=)|^(undefine|private) |--output-sync"


def newer_than_a_mac(text: str) -> list[str]:
    """What of a bash script does not run there, a line each; comments do not count."""
    found = []
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        found += [
            f"{number}: {why}: {line.strip()}"
            for pattern, why in NEWER.items()
            if re.search(pattern, line)
        ]
    # under `set -u` bash before 4.4 takes an array of no words for one that is not set
    for name in re.findall(r"\b(\w+)=\( *\)", "\n".join(lines)):
        found += [
            f"{number}: '{name}' may be empty: {line.strip()}"
            for number, line in enumerate(lines, start=1)
            if re.search(rf"(?<!\+)(?<!\+\")\$\{{{name}\[[@*]\]\}}", line)
        ]
    return found


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", "--severity=warning", *SCRIPTS],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_needs_nothing_newer_than_a_mac_has(script: Path) -> None:
    assert newer_than_a_mac(script.read_text()) == []


def test_the_makefile_needs_no_newer_make() -> None:
    assert not re.search(NEWER_MAKE, (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [
        "mapfile -t lines < file",
        "declare -A count",
        'echo "${name^^}"',
        'echo "${name,}"',
        'echo "${words[-1]}"',
        'echo "${name@Q}"',
        "make &>> log",
        "make |& tee log",
        "sed -i s/a/b/ file",
        "sed -n -r s/a/b/p file",
        "readlink -f .",
        "stat -c %s file",
        "date -d yesterday",
        "grep -oP x file",
        "cp -t there here",
        "sort --unique names",
        "head -n -1 names",
        "exec 9> lock; flock 9",
        "sha256sum < file",
        'words=(); echo "${words[@]}"',
        "words=( ); run ${words[*]}",
    ],
)
def test_the_patterns_see_what_a_mac_lacks(line: str) -> None:
    assert newer_than_a_mac(line)


@pytest.mark.parametrize(
    "line",
    [
        "# mapfile is bash 4",
        "words=(a b); echo \"${words[@]}\" | sed -n '2,/^set/p'",
        'words=(); run ${words[@]+"${words[@]}"}',
        'echo "${name:-}" "${name:+x}" "${name#*,}" "${name//,/ }"',
        "mkdir -p a && mv a b && cut -c1-16 file",
    ],
)
def test_the_patterns_leave_the_rest_alone(line: str) -> None:
    assert newer_than_a_mac(line) == []


# What needs Linux

LINUX_ONLY = {
    *("sched_getaffinity", "sched_setaffinity", "preadv", "pwritev", "posix_fadvise", "epoll"),
    *("posix_fallocate", "copy_file_range", "memfd_create", "pidfd_open", "eventfd", "getrandom"),
    *("setresuid", "setresgid", "getxattr", "setxattr", "prlimit", "O_TMPFILE", "O_DIRECT"),
    *("O_PATH", "RUSAGE_THREAD", "SO_PEERCRED", "CLOCK_BOOTTIME"),
}


def test_python_asks_the_system_for_nothing_that_a_mac_lacks() -> None:
    """Unless it looks first whether that is there. ``preadv`` is missing in some builds only."""
    found = []
    for folder in ("dags", "plugins", "include"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            text = file.read_text()
            for node in ast.walk(ast.parse(text)):
                name = node.attr if isinstance(node, ast.Attribute) else ""
                if name in LINUX_ONLY and f'hasattr(os, "{name}")' not in text:
                    found.append(f"{file.relative_to(REPOSITORY)}:{node.lineno}: {name}")
    assert found == []


ON_A_MAC = """
import sys, pytest
class Mac:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self):
        sys.platform = "darwin"
sys.exit(pytest.main(sys.argv[1:], plugins=[Mac()]))
"""


@pytest.mark.slow
def test_what_needs_linux_is_skipped_on_a_mac_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MAC, "tests/cluster/test_jobs_in_trouble.py"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout
    assert "needs Linux: a host's processes are found in /proc" in done.stdout
    assert re.search(r"= \d+ skipped in", done.stdout), done.stdout


# A Mac's PATH

# Linux's own are not among them: flock, sha256sum, apt-get, ldconfig, nproc, dpkg-deb, ip.
PLAIN = ("bash", "sh", "id", "make", "sleep", "ssh", "sshd", "env", "true")
BSD = {
    name: r"""#!/bin/bash
for word in "$@"; do
  case "$word" in
    --|-) ;;
    --*) echo "NAME: illegal option -- $word" >&2; exit 64 ;;
    -[a-zA-Z]*) case "${word#-}" in *[REFUSED]*) echo "NAME: illegal option -- $word" >&2; exit 64 ;; esac ;;
  esac
done
exec REAL "$@"
""".replace("REFUSED", refused)
    for name, refused in {
        "cat": "AET",
        "cp": "tTu",
        "cut": "z",
        "dirname": "z",
        "grep": "P",
        "head": "z",
        "ls": "D",
        "mkdir": "Z",
        "mktemp": "p",
        "mv": "tT",
        "rm": "I",
        "sed": "irsz",
        "tr": "t",
    }.items()
}
OPENRSYNC = "openrsync: protocol version 29\nrsync version 2.6.9 compatible"


@pytest.fixture
def mac(tmp_path: Path) -> Path:
    """A folder that, as the PATH, has what a Mac with Homebrew's Python and rsync has."""
    folder = tmp_path / "mac"
    folder.mkdir()
    for name in PLAIN:
        (folder / name).symlink_to(str(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")))
    for name, text in BSD.items():
        stand_in(folder, name, text.replace("NAME", name).replace("REAL", str(shutil.which(name))))
    stand_in(folder, "uname", "#!/bin/sh\necho Darwin\n")
    stand_in(folder, "rsync", "#!/bin/sh\necho 'rsync  version 3.4.1  protocol version 32'\n")
    interpreter = Path(sys.base_prefix, "bin", "python3.11")
    stand_in(folder, "python3.11", f'#!/bin/sh\nexec {interpreter} "$@"\n')
    return folder


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts and the Makefile with environments that need no package."""
    folder = tmp_path / "check out"
    (folder / "include").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "include" / "scripts", folder / "include" / "scripts")
    shutil.copy(REPOSITORY / "Makefile", folder)
    for name in ("requirements.txt", "requirements-cluster.txt", "requirements-dev.txt"):
        (folder / name).write_text(f"# {name}\n")
    return folder


def on(mac: Path, checkout: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    home = checkout.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [str(mac / "env"), *command],
        cwd=checkout,
        env={"PATH": str(mac), "HOME": str(home), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def digest_of_file(checkout: Path, *files: str) -> str:
    content = b"".join((checkout / file).read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16]


def installed(checkout: Path, *names: str) -> None:
    """Environments as install.sh leaves them, whose interpreters say what they are given."""
    files = {"airflow": "requirements.txt", "cluster": "requirements-cluster.txt"}
    for name in names or files:
        folder = checkout / ".env" / name
        (folder / "bin").mkdir(parents=True)
        stand_in(folder / "bin", "python", '#!/bin/bash\nprintf "<%s>" "${@##*/}"; echo\n')
        for note in ("base", "built-from"):
            (folder / note).write_text(f"{digest_of_file(checkout, files[name])}\n")


@pytest.mark.slow
def test_an_environment_is_installed_once_and_added_to_when_the_requirements_change(
    mac: Path, checkout: Path
) -> None:
    installed(checkout, "cluster")
    installations = [on(mac, checkout, "include/scripts/install.sh") for _ in range(2)]
    said = [ended(one) for one in installations]
    assert sorted(said) == [(0, ""), (0, "installing .env/airflow from requirements.txt\n")]
    airflow = checkout / ".env" / "airflow"
    assert (
        airflow / "built-from"
    ).read_text() == f"{digest_of_file(checkout, 'requirements.txt')}\n"
    assert list(airflow.glob("lib/*/site-packages/pip"))
    assert ended(on(mac, checkout, "make", "install")) == (0, "")
    stand_in(mac, "shellcheck", "#!/bin/sh\n")
    code, words = ended(on(mac, checkout, "make", "install-dev"))
    assert code == 0, words
    assert "installing .env/airflow from requirements.txt requirements-dev.txt" in words
    both = digest_of_file(checkout, "requirements.txt", "requirements-dev.txt")
    assert (airflow / "built-from").read_text() == f"{both}\n"
    assert (airflow / "base").read_text() == f"{digest_of_file(checkout, 'requirements.txt')}\n"
    # an environment with more than is asked for will do
    assert ended(on(mac, checkout, "make", "install")) == (0, "")


@pytest.mark.parametrize(
    ("name", "answer", "words", "sentence"),
    [
        (
            "python3.11",
            "[ $1 = -V ] && echo Python 3.9.6; exit 1",
            [],
            r"Python 3\.11 is needed, \S+ is Python 3\.9\.6: brew install python@3\.11, or uv python install 3\.11\.",
        ),
        (
            "rsync",
            f"echo '{OPENRSYNC}'",
            [],
            r"missing: rsync\. Get it with Homebrew: brew install rsync\.",
        ),
        ("rsync", None, [], r"missing: rsync\. Get it with Homebrew: brew install rsync\."),
        (
            "uname",
            "echo Darwin",
            ["dev"],
            r"missing: shellcheck\. Get it with Homebrew: brew install shellcheck\.",
        ),
    ],
    ids=["old python", "apple's rsync", "no rsync", "no shellcheck"],
)
def test_what_a_mac_lacks_is_named_in_one_sentence(
    mac: Path, checkout: Path, name: str, answer: str | None, words: Sequence[str], sentence: str
) -> None:
    (mac / name).unlink()
    if answer:
        stand_in(mac, name, f"#!/bin/sh\n{answer}\n")
    code, said = ended(on(mac, checkout, "include/scripts/install.sh", *words))
    assert code == 1
    assert re.fullmatch(f"install: {sentence}\n", said), said


def test_make_run_hands_on_what_it_is_given(mac: Path, checkout: Path) -> None:
    installed(checkout)
    code, said = ended(on(mac, checkout, "make", "run", "DATA=my folder", "SET=gpus=1 seed=2"))
    assert code == 0, said
    assert said == (
        "<local_stack.py><run><--data><my folder><--recipe><><--tokenizer><><--instructions><>"
        "<--set><gpus=1><--set><seed=2>\n"
    )


def test_make_run_ends_where_the_model_cannot_be_had(mac: Path, checkout: Path) -> None:
    installed(checkout)
    stand_in(checkout / "include" / "scripts", "install_smollm2.sh", "#!/bin/sh\nexit 3\n")
    code, said = ended(on(mac, checkout, "make", "run", "RECIPE=smollm2"))
    assert code != 0
    assert "local_stack.py" not in said


@pytest.mark.parametrize("tokenizer", ["", "/a folder/tokenizer"])
def test_the_commands_of_a_run_without_airflow_are_started(
    mac: Path, checkout: Path, tokenizer: str
) -> None:
    installed(checkout)
    (checkout / "out" / "corpus").mkdir(parents=True)
    (checkout / "out" / "corpus" / "corpus_manifest.json").touch()
    script = "include/scripts/run_fast_cpt_training.sh"
    given = {"DOCUMENTS": "docs", "OUTPUT": "out", "RECIPE": "sample", "TOKENIZER": tokenizer}
    code, said = ended(on(mac, checkout, script, **given))
    assert code == 0, said
    words = "<--tokenizer><tokenizer>" if tokenizer else ""
    called = [line for line in said.splitlines() if line.startswith("<")]
    assert called[0] == (
        f"<create_fast_cpt_corpus.py><--input_dir><docs><--output_dir><filtered><--config><sample>{words}"
    )
    assert called[1] == (
        f"<cpt_corpus_builder.py><--input_dir><filtered><--output_dir><corpus><--config><sample>{words}"
    )
    assert called[2].startswith("<train_on_cluster.py>")


def test_the_help_of_a_run_without_airflow_is_its_head(mac: Path, checkout: Path) -> None:
    code, said = ended(on(mac, checkout, "include/scripts/run_fast_cpt_training.sh", "--help"))
    assert code == 0
    assert said.startswith("Filter, build, transfer, train and evaluate from a shell")
    assert "set -euo" not in said
