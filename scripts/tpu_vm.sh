#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host (v4-8) or all hosts of a pod slice (v4-32, ...), command by command:
#
#   scripts/tpu_vm.sh create                       # the TPU VM
#   scripts/tpu_vm.sh install                      # the last commit and its environment, on every host
#   scripts/tpu_vm.sh train configs/digits_trades.py --set batch_size=96
#   scripts/tpu_vm.sh fetch                        # the workdir, from host 0 into runs/
#   scripts/tpu_vm.sh delete
#
# `train` again resumes. The hosts of a slice find each other; host 0 alone writes the workdir. The batch must
# divide by the number of devices of the slice. Needs gcloud, logged in. Another slice, for example:
#
#   ACCELERATOR=v4-32 scripts/tpu_vm.sh create
set -euo pipefail

NAME=${NAME:-deq}
PROJECT=${PROJECT:-$(gcloud config get-value project)}
ZONE=${ZONE:-us-central2-b}
ACCELERATOR=${ACCELERATOR:-v4-8}
VERSION=${VERSION:-tpu-ubuntu2204-base}
PYTHON=${PYTHON:-python3.11} # on the TPU VM
WORKDIR=${WORKDIR:-runs/tpu} # on the TPU VM, in the repository

cd "$(dirname "$0")/.."
where=(--project="$PROJECT" --zone="$ZONE")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

create() {
  gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" --accelerator-type="$ACCELERATOR" --version="$VERSION"
}

install() {
  local folder archive
  folder=$(mktemp -d)
  archive=$folder/deq_jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:deq_jax.tar.gz" "${where[@]}" --worker=all
  rm -r "$folder"
  on_all_hosts "sudo apt-get update -q && sudo apt-get install -qy $PYTHON $PYTHON-venv &&
    mkdir -p deq_jax && tar -xzf deq_jax.tar.gz -C deq_jax && cd deq_jax &&
    $PYTHON -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
}

train() {
  local config=$1 arguments
  shift
  printf -v arguments ' %q' --config "$config" --workdir "$WORKDIR" "$@"
  on_all_hosts "cd deq_jax && .venv/bin/python -m deq_jax.train$arguments"
}

fetch() {
  local target
  target=$(dirname "$WORKDIR")
  mkdir -p "$target"
  gcloud compute tpus tpu-vm scp --recurse "$NAME:deq_jax/$WORKDIR" "$target" "${where[@]}" --worker=0
}

delete() {
  gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
}

case "${1:-}" in
  create | install | train | fetch | delete) "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
