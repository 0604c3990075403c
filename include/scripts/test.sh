#!/usr/bin/env bash
# All tests, the fast ones first; each part in the environment that it is about. Called by make test.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
began=$SECONDS
failed=0
run() { "$@" || failed=1; }
airflow=(.env/airflow/bin/python -m pytest)
cluster=(.env/cluster/bin/python -m pytest)
run "${airflow[@]}" tests -m "not slow and not faults" --ignore=tests/training --durations=5
run "${cluster[@]}" tests/training --durations=5
run "${airflow[@]}" tests -m "slow and not faults" --ignore=tests/training --durations=10
echo "make test took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
exit $failed
