#!/usr/bin/env bash
# Measures the speed of training on one card. --help lists the arguments.
set -euo pipefail
# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mode=perf
cards=1
batch_size=512
lr=0.7
epochs=6
run_case "$@"
