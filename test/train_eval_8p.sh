#!/usr/bin/env bash
# Evaluates a checkpoint with eight processes. --help lists the arguments.
set -euo pipefail
# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mode="eval"
cards=8
batch_size=256
run_case "$@"
