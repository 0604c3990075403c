#!/usr/bin/env bash
# All tests, the fast ones first, each in the environment that it tests. Called by make test.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
began=$SECONDS
failed=0
run() { "$@" || failed=1; }
airflow=(.env/airflow/bin/python -m pytest)
cluster=(.env/cluster/bin/python -m pytest)
# tests mostly wait for processes; those of one file share servers, so they stay together
two=(-n 2 --dist loadfile)
run "${airflow[@]}" tests "${two[@]}" -m "not slow and not faults" --ignore=tests/training --durations=5
# tensors this small gain nothing from a second thread
run env OMP_NUM_THREADS=1 "${cluster[@]}" tests/training "${two[@]}" --durations=5
run "${airflow[@]}" tests -m "slow and not faults" --ignore=tests/training --durations=10
echo "make test took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
exit $failed
