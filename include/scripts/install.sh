#!/usr/bin/env bash
# Installs what is missing: two Python environments under .env/ (airflow, and cluster, which plays the
# GPU host), rsync and OpenSSH. With the word `dev` also what the tests need.
# Root uses apt-get; an ordinary user gets the same Debian packages unpacked under .env/tools.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEBIAN_FRONTEND=noninteractive
tools=$PWD/.env/tools
mkdir -p .env
exec 9>.env/install.lock
flock 9

say() { printf '%s\n' "$*" >&2; }
stop() { say "install: $*"; exit 1; }

python=$(command -v python3.11 || true)
[ -n "$python" ] || python=$(command -v python3 || stop "Python 3.11 is missing: install the package python3.")
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
  || stop "Python 3.11 is needed, $python is $("$python" -V 2>&1). Put python3.11 on the PATH."

# Debian packages, by root or, unpacked aside, by anybody.
packages() {
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

# What was unpacked for an ordinary user comes after the machine's own.
. include/scripts/tools.sh

missing=()
command -v rsync >/dev/null || missing+=(rsync)
command -v ssh >/dev/null || missing+=(openssh-client)
command -v sshd >/dev/null || missing+=(openssh-server)
[ -x .env/cluster/bin/python ] || "$python" -c 'import ensurepip' 2>/dev/null || ls "$tools"/root/usr/share/python-wheels/pip-*.whl >/dev/null 2>&1 || missing+=("$([ "$(id -u)" = 0 ] && echo python3-venv || echo python3-pip-whl)")
if [ "${1:-}" = dev ]; then
  command -v chromium >/dev/null || missing+=(chromium)
  # the browser's driver is linked to it
  ldconfig -p | grep -q libatomic.so.1 || ls "$tools"/root/usr/lib/*/libatomic.so.1 >/dev/null 2>&1 || missing+=(libatomic1)
  command -v ip >/dev/null || missing+=(iproute2)
  [ "$(id -u)" != 0 ] || command -v slurmctld >/dev/null || missing+=(slurm-wlm munge)
fi
[ ${#missing[@]} = 0 ] || packages "${missing[@]}"

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
  digest=$(cat "$@" | sha256sum | cut -c1-16)
  [ "$(cat "$folder/built-from" 2>/dev/null)" = "$digest" ] && return
  say "installing $folder from $*"
  local base
  base=$(cat "$1" | sha256sum | cut -c1-16)
  [ "$(cat "$folder/base" 2>/dev/null)" = "$base" ] || new_environment "$folder"
  local files=() file
  for file in "$@"; do files+=(-r "$file"); done
  "$folder/bin/python" -m pip install -q --disable-pip-version-check "${files[@]}" \
    || stop "pip could not install $* into $folder; see its message above."
  "$folder/bin/python" -m compileall -q "$folder/lib" >/dev/null 2>&1 || true
  echo "$base" > "$folder/base"
  echo "$digest" > "$folder/built-from"
}

if [ "${1:-}" = dev ]; then
  environment airflow requirements.txt requirements-dev.txt
  environment cluster requirements-cluster.txt requirements-dev.txt
else
  [ -f .env/airflow/built-from ] && [ "$(cat .env/airflow/base)" = "$(sha256sum < requirements.txt | cut -c1-16)" ] \
    || environment airflow requirements.txt
  [ -f .env/cluster/built-from ] && [ "$(cat .env/cluster/base)" = "$(sha256sum < requirements-cluster.txt | cut -c1-16)" ] \
    || environment cluster requirements-cluster.txt
fi
