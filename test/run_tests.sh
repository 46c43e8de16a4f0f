#!/usr/bin/env bash
# The test suite on a bare machine: virtual environment, then pytest.
# usage: run_tests.sh [--all] [--torch=1.5|1.8|2.x] [--python=PATH] [pytest's arguments ...]
# Leaves out what is marked slow, unless there is --all, -m, -k, or the path of a file or a test.
# Without -m, -k or a path it runs as many tests at a time as there are cores, at most 8.
set -euo pipefail
# shellcheck source=test/venv.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

torch=2.x python='' previous=''
tests=("$test_dir/unit") selection=(-m 'not slow')
workers=(-n auto --maxprocesses 8 --dist worksteal)
arguments=(--rootdir "$test_dir" -c "$test_dir/pytest.ini")
for argument in "$@"; do
  case $argument in
    --all) selection=() ;;
    --torch=*) torch=${argument#*=} ;;
    --python=*) python=${argument#*=} ;;
    *)
      arguments+=("$argument")
      if [[ $argument == -[mk]* ]]; then
        selection=() workers=()
      elif [[ ! $previous =~ ^-[kmpoWnc]$ && -e ${argument%%::*} ]]; then
        tests=() selection=() workers=()
      fi
      ;;
  esac
  previous=$argument
done

set_generation "$torch"
make_environment pytest "$test_dir/requirements.txt"
found=$("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')
printf '%s: torch %s, %s\n' "$me" "$torch" "$found"
"$python" -c 'import xdist' 2>/dev/null || workers=() # in a user's own environment
# ${x[@]+...}: bash < 4.4 takes an empty array for an unset one.
exec "$python" -m pytest ${workers[@]+"${workers[@]}"} "${arguments[@]}" \
  ${selection[@]+"${selection[@]}"} ${tests[@]+"${tests[@]}"}
