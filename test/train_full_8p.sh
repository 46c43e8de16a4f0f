#!/usr/bin/env bash
# Trains to full accuracy on eight cards. --help lists the arguments.
set -euo pipefail
# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mode=acc
cards=8
batch_size=4096
lr=1.4
run_case "$@"
