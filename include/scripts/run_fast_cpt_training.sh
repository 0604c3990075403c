#!/usr/bin/env bash
# Filter, build, transfer, train and evaluate from a shell, without Airflow. Ends with the gate's decision
# and the command for the next step.
#
#   run_fast_cpt_training.sh [skip] [skip]
#
# The first `skip` skips the filter, the second the build: the results of an earlier call are used.
# Environment variables:
#   DOCUMENTS     folder of documents                     (needed unless the filter is skipped)
#   RECIPE        recipe, by name or file                 (default: cpt_config_fast)
#   TOKENIZER     folder of the tokenizer                 (default: the recipe's)
#   OUTPUT        folder for the results                  (default: fast_cpt_output)
#   HOST          SSH host with the GPUs, as ssh takes it (default: this machine)
#   SSH_PORT, SSH_USER, SSH_KEY, SSH_KNOWN_HOSTS          (default: ~/.ssh/config and the agent)
#   CLUSTER_PYTHON  an interpreter there with requirements-cluster.txt (default: built there)
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
stop() { printf 'run_fast_cpt_training.sh: %s\n' "$*" >&2; exit 2; }

case "${1:-}" in -h|--help) usage; exit 0 ;; esac
for word in "$@"; do [ "$word" = skip ] || stop "'$word' is not 'skip'; see --help."; done
[ $# -le 2 ] || stop "at most two words; see --help."

"$repository/include/scripts/install.sh"
python=$repository/.env/airflow/bin/python
scripts=$repository/include/scripts
recipe=${RECIPE:-cpt_config_fast}
output=${OUTPUT:-fast_cpt_output}
# shellcheck source=include/scripts/tools.sh
. "$scripts/tools.sh"

if [ "${1:-}" = skip ]; then
  echo "== filter: skipped"
else
  echo "== filter"
  [ -n "${DOCUMENTS:-}" ] || stop "DOCUMENTS is not set: the folder of documents to filter."
  "$python" "$scripts/create_fast_cpt_corpus.py" --input_dir "$DOCUMENTS" --output_dir "$output/filtered" \
    --config "$recipe" ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi
if [ "${2:-}" = skip ]; then
  echo "== build: skipped"
else
  echo "== build"
  "$python" "$scripts/cpt_corpus_builder.py" --input_dir "$output/filtered" --output_dir "$output/corpus" \
    --config "$recipe" ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi
[ -f "$output/corpus/corpus_manifest.json" ] \
  || stop "no corpus in $output/corpus: leave out the second 'skip' once, or set OUTPUT."

echo "== transfer and train"
exec "$python" "$scripts/train_on_cluster.py" --config "$recipe" --corpus "$output/corpus" --output "$output" \
  --host "${HOST:-}" --port "${SSH_PORT:-}" --user "${SSH_USER:-}" --key_file "${SSH_KEY:-}" \
  --known_hosts "${SSH_KNOWN_HOSTS:-}" --python "${CLUSTER_PYTHON:-}"
