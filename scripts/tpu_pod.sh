#!/usr/bin/env bash
# Trains on a TPU slice: queues for it, then starts tpu_vm.sh on each of its hosts. Run it where gcloud is logged
# in and has its key in the agent (`ssh-add ~/.ssh/google_compute_engine`); run it again after a loss of the slice.
#
#   PROJECT=me ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     REPOSITORY=https://host/switchmoe.git scripts/tpu_pod.sh --config=configs/switch_base.py:relu \
#     --workdir=gs://bucket/base --config.data.vocab=gs://bucket/spiece.model --config.mesh.layout=data_expert
#
# With NFS=10.0.0.2:/runs a file system is mounted on /runs of every host, for a --workdir=/runs/base.
#
# It ends showing the log, and the run goes on without it. SIGTERM to one host saves and stops all of them:
#   gcloud compute tpus tpu-vm ssh NAME --project=.. --zone=.. --worker=0 --command="pkill -f 'experiments[.]run'"
set -euo pipefail
: "${PROJECT:?the Google Cloud project}"
: "${ZONE:?a zone that has the accelerator, us-west4-a for one}"
: "${TYPE:?the slice, v5litepod-16 for one (4 hosts of 4 chips)}"
: "${RUNTIME:?the image: v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e), tpu-ubuntu2204-base (v4)}"
: "${REPOSITORY:?the address to clone this code from}"
NAME=${NAME:-switchmoe}
mount=
[[ -z ${NFS:-} ]] || mount="mountpoint -q /runs || { sudo apt-get install -qy nfs-common; sudo mkdir -p /runs
    sudo mount -t nfs $NFS /runs; sudo chmod a+rwx /runs; }"

tpu() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
state() { tpu queued-resources describe "$NAME" --format='value(state.state)'; }

case $(state 2>/dev/null || true) in
  FAILED | SUSPENDED) tpu queued-resources delete "$NAME" --force --quiet ;; # what a lost slice leaves behind
esac
state >/dev/null 2>&1 || tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
  --runtime-version="$RUNTIME"
until now=$(state) && [[ $now == ACTIVE ]]; do
  case $now in FAILED | SUSPENDED) echo "tpu_pod.sh: $NAME is $now" >&2; exit 1 ;; esac
  sleep "${POLL_SECONDS:-30}"
done

arguments=
(($# == 0)) || printf -v arguments '%q ' "$@"
tpu tpu-vm ssh "$NAME" --worker=all --command="set -e
  $mount
  test -d switchmoe || git clone -q $REPOSITORY switchmoe
  nohup switchmoe/scripts/tpu_vm.sh $arguments >>switchmoe.log 2>&1 </dev/null &"
tpu tpu-vm ssh "$NAME" --worker=0 --command='tail -n +1 -F switchmoe.log'
