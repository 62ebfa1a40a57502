#!/usr/bin/env bash
# Trains on the TPU host it is started on, from the checkout it lies in; the same command goes on after a stop:
#
#   scripts/tpu_vm.sh --config=configs/switch_base.py:relu --workdir=gs://bucket/base --config.data.vocab=gs://bucket/spiece.model
#
# The arguments are those of `python -m experiments.run`. On one host that is all; tpu_pod.sh starts this file
# on every host of a slice, where JAX finds the others by itself.
set -uo pipefail

exec 9<"${BASH_SOURCE[0]}" # a second start would disturb the job that runs here
flock -n 9 || { echo "tpu_vm.sh: a run is going on here already" >&2; exit 1; }
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [[ ! -e .venv/installed ]]; then # jax needs Python 3.11, the TPU images come with 3.10
  python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python=3.13 .venv &&
    python3 -m uv pip install -q --python=.venv '.[tpu,gcs]' && touch .venv/installed || exit
fi

for start in {1..20}; do
  .venv/bin/python -m experiments.run "$@"
  code=$?
  # 5: another process of the job was lost; 137: this one was killed. All else is an end, SIGTERM's 75 too.
  if ((code != 5 && code != 137)); then break; fi
  echo "tpu_vm.sh: start $start ended with code $code" >&2
  sleep "${RESTART_SECONDS:-30}" # until all have noticed
done
exit "$code"
