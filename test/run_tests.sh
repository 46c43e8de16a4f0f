#!/usr/bin/env bash
# The test suite on a bare machine: environment, then pytest.
# usage: run_tests.sh [--torch=1.5|1.8|2.x] [--python=PATH] [pytest's arguments ...]
set -euo pipefail
# shellcheck source=test/venv.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

torch=2.x python='' tests=("$test_dir/unit") arguments=(--rootdir "$test_dir" -c "$test_dir/pytest.ini")
for argument in "$@"; do
  case $argument in
    --torch=*) torch=${argument#*=} ;;
    --python=*) python=${argument#*=} ;;
    *)
      arguments+=("$argument")
      # A file or test named by the user replaces the whole suite.
      if [[ -e ${argument%%::*} ]]; then tests=(); fi
      ;;
  esac
done

set_generation "$torch"
make_environment pytest "$test_dir/requirements.txt"
printf '%s: torch %s, %s\n' "$me" "$torch" "$("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
exec "$python" -m pytest "${arguments[@]}" ${tests[@]+"${tests[@]}"}
