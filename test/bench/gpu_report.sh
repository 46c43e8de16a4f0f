#!/usr/bin/env bash
# Measures the trainer on a machine with an NVIDIA GPU, in under 8 minutes and without network, and prints a table.
#
# Usage: bash test/bench/gpu_report.sh [--steps=N] [--batches='256 512'] [--minutes=N] [--size=PX] [--arch=NAME]
#                                      [--device=gpu|cpu]
# PYTHON names the interpreter to use (default: the first of .venv's, python3 and python that has torch).
#
# Rows "train": images a second of the network alone on one card, from generated images (main.py --synthetic), by
# --opt-level and batch size. Rows "data": the data path of one core, from JPEG files; compare it, times the cores,
# with the rows "train". Rows "whole loop" and "evaluation": from JPEG files, main.py and the usual loop (see
# bench_train.py and bench_eval.py). --device=cpu is for trying the script where there is no card.
# A part that fails says why, and the others go on; the status is then 1.
set -euo pipefail

bench=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
main=$bench/../../main.py
steps=40 batches='256 512' minutes=8 size=224 arch=mnasnet1_0 device=gpu
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
name=cpu
if [[ $device == gpu ]]; then
  if ! name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || [[ -z $name ]]; then
    echo 'gpu_report.sh: error: nvidia-smi finds no card (--device=cpu tries the script without one)' >&2
    exit 1
  fi
fi

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
rows=$work/rows
: >"$rows"
status=0
SECONDS=0
export TMPDIR=$work # what a killed benchmark leaves behind goes with it

row() { # CARD WHAT IMAGES/S: a line of the table
  printf '%-24s %-36s %12s\n' "$1" "$2" "$3" >>"$rows"
}

# Runs a command for at most so many seconds, and never past the end of the report; its output goes to $work/log.
attempt() { # WHAT SECONDS COMMAND...
  local what=$1 limit=$2 left=$((minutes * 60 - 10 - SECONDS)) reason code=0
  shift 2
  if ((limit > left)); then limit=$left; fi
  if ((limit < 5)); then
    row "$name" "$what" 'no time left'
    status=1
    return 1
  fi
  printf '== %s (%d s so far)\n' "$what" "$SECONDS"
  timeout --kill-after=5 "$limit" "$@" >"$work/log" 2>&1 </dev/null || code=$?
  if ((code == 0)); then return; fi
  if ((code == 124 || code == 137)); then
    reason="took longer than $limit s"
  else
    reason=$(grep -iE 'error|failed' "$work/log" | tail -n 1) || reason=$(tail -n 1 "$work/log")
  fi
  printf '%s FAILED: %s\n' "$what" "${reason:-status $code}"
  row "$name" "$what" FAILED
  status=1
  return 1
}

# The lines of a benchmark's table, as rows: a name, its median, and the range from lowest to highest.
take_rows() { # PREFIX
  local label figure
  while IFS=$'\t' read -r label figure; do
    row "$name" "$1$label" "$figure"
  done < <(sed -nE 's/^(.*[^ ]) +([0-9.]+) +[0-9.]+ to [0-9.]+.*$/\1\t\2/p' "$work/log")
}

if [[ $device == gpu ]]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv || status=1
fi
(cd -- "$bench" && "$python" -c 'import sys, common; print(common.machine(sys.argv[1]))' "$device") || status=1

options=(--device "$device" -a "$arch")
for level in O0 O1 O2; do
  for batch in $batches; do
    what="train, $level, batch $batch"
    if attempt "$what" 60 "$python" "$main" --synthetic "$((steps * batch))" "${options[@]}" -b "$batch" \
      --opt-level "$level" --epochs 1 --lr 0.01 --train-crop-size "$size" --val-crop-size "$size" \
      --val-resize-size "$size" --output-dir "$work/run"; then
      row "$name" "$what" "$(sed -nE 's/^Result:.* images\/sec ([0-9.]+).*/\1/p' "$work/log")"
    fi
  done
done

if attempt 'data path' 60 "$python" "$bench/bench_data.py" --rounds 3 --images 50 --size "$size"; then
  # The decoders stand in both of its tables.
  take_rows 'one core: ' && awk '!seen[$0]++' "$rows" >"$rows.once" && mv -- "$rows.once" "$rows"
fi
last=${batches##* }
if attempt 'evaluation' 130 "$python" "$bench/bench_eval.py" "${options[@]}" -b "$last" --rounds 1 --size "$size" \
  --images "$((last * 10))" --photos 60; then
  take_rows 'evaluation, '
  grep 'right at the first guess' "$work/log"
fi
if attempt 'whole loop' 150 "$python" "$bench/bench_train.py" "${options[@]}" -b "$last" --rounds 1 --size "$size" \
  --steps 20 --images 60; then
  take_rows 'whole loop, '
fi

printf '\n%-24s %-36s %12s\n' card what images/s
cat -- "$rows"
printf '%d s in all\n' "$SECONDS"
exit "$status"
