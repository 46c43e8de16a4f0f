#!/usr/bin/env bash
# Trains to full accuracy on one card. --help lists the arguments.
set -euo pipefail
# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mode=acc
cards=1
batch_size=512
lr=0.7
run_case "$@"
