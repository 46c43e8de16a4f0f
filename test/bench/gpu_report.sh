#!/usr/bin/env bash
# Measures the trainer on a machine with an NVIDIA GPU, in under 8 minutes and without network,
# and prints a table.
#
# Usage: bash test/bench/gpu_report.sh [--steps=N] [--batches='256 512'] [--minutes=N] [--size=PX]
#                                      [--arch=NAME] [--device=gpu|cpu]
# PYTHON names the interpreter (default: the first of .venv's, python3 and python that has torch).
#
# Rows "train": images per second of the network alone on one card, from generated images
# (main.py --synthetic), by --opt-level and batch size. Rows "one core": the data path, from JPEG
# files; compare it, times the number of cores, with the rows "train". Rows "training from files"
# and "evaluation": main.py and the baseline loop (see bench_train.py and bench_eval.py).
# --device=cpu is for trying the script without a card.
# A measurement that fails prints the reason, and the others are still made; the status is then 1.
set -euo pipefail

bench=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
main=$bench/../../main.py
steps=40
batches='256 512'
minutes=8
size=224
arch=mnasnet1_0
device=gpu
for argument; do
  case $argument in
    --steps=*) steps=${argument#*=} ;;
    --batches=*) batches=${argument#*=} ;;
    --minutes=*) minutes=${argument#*=} ;;
    --size=*) size=${argument#*=} ;;
    --arch=*) arch=${argument#*=} ;;
    --device=gpu | --device=cpu) device=${argument#*=} ;;
    *)
      printf 'gpu_report.sh: error: unknown argument %q; see the top of the file\n' "$argument" >&2
      exit 2
      ;;
  esac
done

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} "$bench/../../.venv/bin/python" python3 python; do
    if "$candidate" -c 'import torch, torchvision' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  echo 'gpu_report.sh: error: no Python with torch and torchvision: name one in PYTHON' >&2
  return 1
}

python=$(find_python)
card=cpu
if [[ $device == gpu ]]; then
  card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || card=''
  if [[ -z $card ]]; then
    printf 'gpu_report.sh: error: nvidia-smi finds no card (--device=cpu tries the script %s)\n' \
      'without one' >&2
    exit 1
  fi
fi

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
export TMPDIR=$scratch # what a killed benchmark leaves is removed with it
table=$scratch/table
log=$scratch/log
: >"$table"
status=0
SECONDS=0

add_row() { # NAME IMAGES_PER_SECOND
  printf '%-24s %-42s %12s\n' "$card" "$1" "$2" >>"$table"
}

# Runs a command for at most so many seconds, and not past --minutes; its output goes to $log.
attempt() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((minutes * 60 - 10 - SECONDS)) reason code=0
  shift 2
  if ((limit > left)); then limit=$left; fi
  if ((limit < 5)); then
    add_row "$name" 'no time left'
    status=1
    return 1
  fi
  printf '== %s (after %d s)\n' "$name" "$SECONDS"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null || code=$?
  if ((code == 0)); then return; fi
  if ((code == 124 || code == 137)); then
    reason="took longer than $limit s"
  else
    reason=$(grep -iE 'error|failed' "$log" | tail -n 1) || reason=$(tail -n 1 "$log")
  fi
  printf '%s FAILED: %s\n' "$name" "${reason:-status $code}"
  add_row "$name" FAILED
  status=1
  return 1
}

# Adds the rows of a benchmark's table: its names and medians.
add_rows_of_log() { # PREFIX
  local name median
  while IFS=$'\t' read -r name median; do
    add_row "$1$name" "$median"
  done < <(sed -nE 's/^(.*[^ ]) +([0-9.]+) +[0-9.]+ to [0-9.]+.*$/\1\t\2/p' "$log")
}

if [[ $device == gpu ]]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv || status=1
fi
(
  cd -- "$bench" &&
    "$python" -c 'import sys, common; print(common.describe_machine(sys.argv[1]))' "$device"
) || status=1

options=(--device "$device" -a "$arch")
for level in O0 O1 O2; do
  for batch in $batches; do
    name="train, $level, batch $batch"
    if attempt "$name" 60 "$python" "$main" --synthetic "$((steps * batch))" "${options[@]}" \
      -b "$batch" --opt-level "$level" --epochs 1 --lr 0.01 --train-crop-size "$size" \
      --val-crop-size "$size" --val-resize-size "$size" --output-dir "$scratch/run"; then
      add_row "$name" "$(sed -nE 's/^Result:.* images\/sec ([0-9.]+).*/\1/p' "$log")"
    fi
  done
done

if attempt 'data path' 60 "$python" "$bench/bench_data.py" --rounds 3 --images 50 --size "$size"
then
  add_rows_of_log 'one core, '
fi
options+=(-b "${batches##* }" --rounds 1 --size "$size")
if attempt 'evaluation' 130 "$python" "$bench/bench_eval.py" "${options[@]}" \
  --images "$((${batches##* } * 10))" --photos 60; then
  add_rows_of_log 'evaluation, '
  grep 'correct in the top 1' "$log"
fi
if attempt 'training from files' 150 "$python" "$bench/bench_train.py" "${options[@]}" \
  --steps 20 --images 60; then
  add_rows_of_log 'training from files, '
fi

printf '\n%-24s %-42s %12s\n' card measurement images/s
cat -- "$table"
printf '%d s in total\n' "$SECONDS"
exit "$status"
