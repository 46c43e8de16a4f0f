#!/usr/bin/env bash
# Measures the speed of training on eight cards. --help lists the arguments.
set -euo pipefail
# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mode=perf
cards=8
batch_size=4096
lr=1.4
epochs=6
run_case "$@"
