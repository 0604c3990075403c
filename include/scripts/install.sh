#!/usr/bin/env bash
# Installs what is missing: two Python environments under .env/ (airflow, and cluster, for the sample's
# GPU host), rsync and OpenSSH. With the argument `dev` also the test tools.
# Root uses apt-get; an ordinary user gets the same Debian packages unpacked under .env/tools; on macOS
# missing programs are named. Runs on bash 3.2 and with BSD tools: docs/macos.md says what that rules out.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEBIAN_FRONTEND=noninteractive
tools=$PWD/.env/tools
system=$(uname)
mkdir -p .env

say() { printf '%s\n' "$*" >&2; }
stop() { say "install: $*"; exit 1; }

# Homebrew's and uv's folders are not on the PATH of every program that calls make.
python=$(PATH="$PATH:/opt/homebrew/bin:/usr/local/bin:$HOME/.local/bin"; command -v python3.11 || command -v python3 || true)
get="install the package python3.11, or uv python install 3.11"
[ "$system" != Darwin ] || get="brew install python@3.11, or uv python install 3.11"
[ -n "$python" ] || stop "Python 3.11 is missing: $get."
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
  || stop "Python 3.11 is needed, $python is $("$python" -V 2>&1): $get."

# One installation at a time: the lock belongs to the open file and ends with this shell.
exec 9>.env/install.lock
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'

# Debian packages, by root or, unpacked aside, by anybody.
packages() {
  [ "$system" != Darwin ] || stop "missing: $*. Get it with Homebrew: brew install $*."
  command -v apt-get >/dev/null || stop "missing: $*. Install them with this machine's own package manager."
  say "installing Debian packages: $*"
  if [ "$(id -u)" = 0 ]; then
    apt-get -qq update && apt-get -qq install -y --no-install-recommends "$@" >/dev/null \
      || stop "apt-get could not install: $*."
    return
  fi
  mkdir -p "$tools/apt/lists/partial" "$tools/apt/cache/archives/partial" "$tools/root"
  local apt=(apt-get -qq -o "Dir::State::lists=$tools/apt/lists" -o "Dir::Cache=$tools/apt/cache"
             -o Debug::NoLocking=1 -o APT::Sandbox::User=)
  "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends --download-only "$@" >/dev/null \
    || stop "missing: $*, and apt-get could not download them for an ordinary user. Ask root to install them."
  local deb
  for deb in "$tools"/apt/cache/archives/*.deb; do dpkg-deb -x "$deb" "$tools/root"; done
}

# Packages unpacked for an ordinary user come after the machine's own on the PATH.
. include/scripts/tools.sh

# A string, not an array: bash 3.2 treats an empty array as unset.
missing=
command -v rsync >/dev/null || missing+=" rsync"
if [ "$system" = Darwin ]; then
  # Apple's rsync cannot fetch a list of files, and passes the quotes in an ssh command on to ssh
  case "$(rsync --version 2>&1)" in *openrsync*) missing+=" rsync" ;; esac
  command -v sshd >/dev/null || missing+=" openssh"
else
  command -v ssh >/dev/null || missing+=" openssh-client"
  command -v sshd >/dev/null || missing+=" openssh-server"
  [ -x .env/cluster/bin/python ] || "$python" -c 'import ensurepip' 2>/dev/null || ls "$tools"/root/usr/share/python-wheels/pip-*.whl >/dev/null 2>&1 \
    || missing+=" $([ "$(id -u)" = 0 ] && echo python3-venv || echo python3-pip-whl)"
fi
if [ "${1:-}" = dev ]; then
  command -v shellcheck >/dev/null || missing+=" shellcheck"
  if [ "$system" != Darwin ]; then
    command -v chromium >/dev/null || missing+=" chromium"
    # the browser's driver is linked to it
    ldconfig -p | grep -q libatomic.so.1 || ls "$tools"/root/usr/lib/*/libatomic.so.1 >/dev/null 2>&1 || missing+=" libatomic1"
    command -v ip >/dev/null || missing+=" iproute2"
    [ "$(id -u)" != 0 ] || command -v slurmctld >/dev/null || missing+=" slurm-wlm munge"
  fi
fi
# shellcheck disable=SC2086 # words
[ -z "$missing" ] || packages $missing

sha256() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'; }

new_environment() {
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$1"
  else
    "$python" -m venv --clear --without-pip "$1"
    local pip
    pip=$(ls "$tools"/root/usr/share/python-wheels/pip-*.whl)
    "$1/bin/python" "$pip/pip" install -q --no-index "$pip"
  fi
}

# An environment is built again when the files it was built from change.
environment() {
  local folder=.env/$1; shift
  local digest
  digest=$(cat "$@" | sha256)
  [ "$(cat "$folder/built-from" 2>/dev/null)" = "$digest" ] && return
  say "installing $folder from $*"
  local base
  base=$(sha256 < "$1")
  [ "$(cat "$folder/base" 2>/dev/null)" = "$base" ] || new_environment "$folder"
  local options=(-q --disable-pip-version-check) file
  for file in "$@"; do options+=(-r "$file"); done
  "$folder/bin/python" -m pip install "${options[@]}" \
    || stop "pip could not install $* into $folder; see its message above."
  "$folder/bin/python" -m compileall -q "$folder/lib" >/dev/null 2>&1 || true
  echo "$base" > "$folder/base"
  echo "$digest" > "$folder/built-from"
}

if [ "${1:-}" = dev ]; then
  environment airflow requirements.txt requirements-dev.txt
  environment cluster requirements-cluster.txt requirements-dev.txt
else
  [ -f .env/airflow/built-from ] && [ "$(cat .env/airflow/base)" = "$(sha256 < requirements.txt)" ] \
    || environment airflow requirements.txt
  [ -f .env/cluster/built-from ] && [ "$(cat .env/cluster/base)" = "$(sha256 < requirements-cluster.txt)" ] \
    || environment cluster requirements-cluster.txt
fi
