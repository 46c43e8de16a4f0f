# shellcheck shell=bash
# Makes and reuses the virtual environments of quickstart.sh, run_tests.sh and .ci/run.

# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

set_generation() { # 1.5, 1.8 or 2.x; the versions are in the order in which they are looked for
  generation=$1
  case $generation in
    1.5) versions='3.7 3.8' venv=$repo/.venv-1.5 ;;
    1.8) versions='3.8 3.9 3.7' venv=$repo/.venv-1.8 ;;
    2.x) versions='3.11 3.12 3.10 3.13 3.9 3.14' venv=$repo/.venv ;;
    *) die 2 "--torch=$(shown "$generation"): expected 1.5, 1.8 or 2.x" ;;
  esac
  requirements=$repo/${generation}_requirements.txt
}

fits() { # INTERPRETER: whether the generation has packages for it, and it can make environments (a shim can't)
  local version
  version=$("$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) &&
    [[ " $versions " == *" $version "* ]]
}

find_python() { # sets `python`; false if there is none
  local version candidate candidates=(python3)
  for version in $versions; do
    candidates+=("python$version" "${HOME:-/nowhere}/.pyenv/versions/$version".*/bin/python)
  done
  for candidate in "${candidates[@]}"; do
    if fits "$candidate"; then
      python=$(command -v -- "$candidate")
      return
    fi
  done
  return 1
}

identity() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3], sys.base_prefix)'; }

# Ascend's hosts bring their own torch. Prints its version where the interpreter has one.
ascend_torch() {
  "$1" - <<'END'
import importlib.util as util, os
torch = util.find_spec("torch")
if torch and (util.find_spec("torch_npu") or os.path.isdir(os.path.join(os.path.dirname(torch.origin), "npu"))):
    try:
        from importlib.metadata import version
    except ImportError:  # Python 3.7
        import pkg_resources
        version = lambda name: pkg_resources.get_distribution(name).version
    print(version("torch"))
END
}

create() {
  local torch options=()
  rm -rf -- "$venv"
  mkdir -- "$venv"
  echo unfinished >"$venv/.state"
  torch=$(ascend_torch "$python")
  [[ -z $torch ]] || options=(--system-site-packages)
  "$python" -m venv ${options[@]+"${options[@]}"} "$venv" >&2 || die 1 "$(shown "$python") can't make an environment in $(shown "$venv")"
  # Ascend's torch stays: pip has to fit torchvision to it, and would else replace it by the newest.
  echo "${torch:+torch==$torch}" >"$venv/.constraints"
  identity "$python" >"$venv/.state"
}

install() { # FILE: what it lists, once
  local stamp state made
  stamp=$venv/.installed-${1##*/}
  state=$(cksum <"$1")
  if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then return; fi
  printf '%s: installing %s into %s (minutes)\n' "$me" "${1##*/}" "$(shown "$venv")" >&2
  made=$(<"$venv/.state")
  echo unfinished >"$venv/.state"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --requirement "$1" --constraint "$venv/.constraints" >&2 ||
    die 1 "pip could not install $(shown "$1"); its messages are above, and the next run starts afresh"
  printf '%s\n' "$state" >"$stamp"
  printf '%s\n' "$made" >"$venv/.state"
}

usable() { # the environment is whole, its interpreter is still there, and it is of the one asked for, if any
  local state
  state=$(cat -- "$venv/.state" 2>/dev/null) && [[ $state != unfinished ]] &&
    [[ $(identity "$venv/bin/python" 2>/dev/null) == "$state" ]] &&
    [[ -z $python || $(identity "$python") == "$state" ]]
}

# An environment of the user's is taken as it is, and never changed.
use_as_it_is() { # MODULE ...
  local found module
  for module in "$@"; do
    "$python" -c "import $module" 2>/dev/null ||
      die 1 "$(shown "$python") is in an environment of yours, which lacks $module; install it there, or give --python= an interpreter outside"
  done
  found=$("$python" -c 'import torch; print(torch.__version__)')
  [[ $found == "${generation%x}"* ]] ||
    die 1 "$(shown "$python") has torch $found, expected $generation; give another --python= or --torch="
}

# Sets `python` to an interpreter with what the generation's requirements and further FILEs list.
make_environment() { # MODULES FILE ...: the modules that an environment of the user's has to hold
  local modules=$1 file
  shift
  if [[ -n $python ]]; then
    command -v -- "$python" >/dev/null || die 1 "--python: no interpreter $(shown "$python")"
    if "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
      # shellcheck disable=SC2086 # a list of names
      use_as_it_is torch torchvision numpy PIL $modules
      return
    fi
    fits "$python" || die 1 "--python=$(shown "$python") doesn't fit: torch $generation needs Python ${versions// / or } with venv"
  fi
  if command -v flock >/dev/null; then
    exec 7>"$venv.lock"
    flock 7
  fi
  if ! usable; then
    [[ ! -e $venv || -f $venv/.state ]] ||
      die 1 "$(shown "$venv") is there and was not made here; move it away, or use it with --python=$(shown "$venv/bin/python")"
    [[ -n $python ]] || find_python ||
      die 1 "found no Python for torch $generation; install ${versions// / or }, or name one with --python=PATH"
    printf '%s: making %s with %s\n' "$me" "$(shown "$venv")" "$(shown "$python")" >&2
    create
  fi
  for file in "$requirements" "$@"; do install "$file"; done
  exec 7>&-
  python=$venv/bin/python
}
