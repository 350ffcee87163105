#!/usr/bin/env bash
# On a machine with an accelerator and no network: the same numbers as the CPU's, the cost of a step, then one training run.
#
#   scripts/accelerator.sh measure OUT [MINUTES]                 # parity and cost, into OUT/accelerator.json
#   scripts/accelerator.sh train OUT CONFIG MINUTES [ARGUMENTS]  # trains, resumes, packs the run
#
# `train` resumes the run in OUT/NAME, or in the parts that an earlier one packed beside it, and hands the arguments to
# deq_jax.train. OUT/NAME.tgz.00, .01, ... are the workdir in parts of at most 16 MB; its epochs need not be over.
# PYTHON chooses the interpreter. Example:
#
#   scripts/accelerator.sh train out configs/cifar10_small_pgd_at.py 8 --set dataset.path=photos --set batch_size=256
set -euo pipefail

PYTHON=${PYTHON:-python3}
PART=${PART:-16000000} # bytes

cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

measure() {
  "$PYTHON" -m benchmarks.accelerator --out "$1" --minutes "${2:-5}"
}

train() {
  local out=$1 config=$2 minutes=$3 name code=0
  shift 3
  name=$(basename "$config" .py)
  mkdir -p "$out"
  if [ ! -d "$out/$name" ] && [ -e "$out/$name.tgz.00" ]; then
    cat "$out/$name".tgz.?? | tar -xz -C "$out"
  fi
  "$PYTHON" -m deq_jax.train --config "$config" --workdir "$out/$name" --minutes "$minutes" "$@" || code=$?
  if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then # 75: the minutes are over
    exit "$code"
  fi
  rm -f "$out/$name".tgz.??
  tar -cz -C "$out" "$name" | split -d -b "$PART" - "$out/$name.tgz."
}

case "${1:-} $#" in
  "measure 2" | "measure 3") "$@" ;;
  train\ [4-9] | train\ [1-9][0-9]) "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
