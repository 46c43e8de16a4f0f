# shellcheck shell=bash
# Makes and reuses the virtual environments of quickstart.sh, run_tests.sh and .ci/run.

# shellcheck source=test/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

set_generation() { # 1.5, 1.8 or 2.x; sets what depends on it, the Python versions by preference
  generation=$1
  case $generation in
    1.5) versions='3.7 3.8' venv=$repo/.venv-1.5 ;;
    1.8) versions='3.8 3.9 3.7' venv=$repo/.venv-1.8 ;;
    2.x) versions='3.11 3.12 3.10 3.13 3.9 3.14' venv=$repo/.venv ;;
    *) exit_with 2 "--torch=$(quote "$generation"): expected 1.5, 1.8 or 2.x" ;;
  esac
  requirements=$repo/${generation}_requirements.txt
}

# Whether the generation has packages for the interpreter, and it can make environments (no shim).
fits_generation() { # INTERPRETER
  local code='import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' version
  version=$("$1" -c "$code" 2>/dev/null) && [[ " $versions " == *" $version "* ]]
}

find_python() { # sets `python`; false if no interpreter fits
  local version candidate in_order candidates=(python3)
  read -ra in_order <<<"$versions"
  for version in "${in_order[@]}"; do
    candidates+=("python$version" "${HOME:-/nowhere}/.pyenv/versions/$version".*/bin/python)
  done
  for candidate in "${candidates[@]}"; do
    if fits_generation "$candidate"; then
      python=$(command -v -- "$candidate")
      return
    fi
  done
  return 1
}

base_python() { # INTERPRETER: its version and installation
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3], sys.base_prefix)'
}

# Ascend hosts bring their own torch. Prints its version if the interpreter has one.
ascend_torch() { # INTERPRETER
  "$1" - <<'END'
import importlib.util
import os

torch = importlib.util.find_spec("torch")
if torch and (importlib.util.find_spec("torch_npu")
              or os.path.isdir(os.path.join(os.path.dirname(torch.origin), "npu"))):
    try:
        from importlib.metadata import version
    except ImportError:  # Python 3.7
        import pkg_resources
        print(pkg_resources.get_distribution("torch").version)
    else:
        print(version("torch"))
END
}

# An environment is described in its file .state: "unfinished" while it is being made or changed.
create_environment() {
  local torch options=()
  rm -rf -- "$venv"
  mkdir -- "$venv"
  echo unfinished >"$venv/.state"
  torch=$(ascend_torch "$python")
  [[ -z $torch ]] || options=(--system-site-packages)
  "$python" -m venv ${options[@]+"${options[@]}"} "$venv" >&2 ||
    exit_with 1 "$(quote "$python") can't make an environment in $(quote "$venv")"
  # Keeps Ascend's torch: pip has to fit torchvision to it and would otherwise install the newest.
  echo "${torch:+torch==$torch}" >"$venv/.constraints"
  base_python "$python" >"$venv/.state"
}

install_requirements() { # FILE: installs what it lists, unless that has been done
  local stamp=$venv/.installed-${1##*/} checksum state
  checksum=$(cksum <"$1")
  if [[ -f $stamp && $(<"$stamp") == "$checksum" ]]; then return; fi
  printf '%s: installing %s into %s (minutes)\n' "$me" "${1##*/}" "$(quote "$venv")" >&2
  state=$(<"$venv/.state")
  echo unfinished >"$venv/.state"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --requirement "$1" --constraint "$venv/.constraints" >&2 ||
    exit_with 1 "pip could not install $(quote "$1"); its messages are above, and the next run \
starts from scratch"
  printf '%s\n' "$checksum" >"$stamp"
  printf '%s\n' "$state" >"$venv/.state"
}

# Whether the environment is complete, and its interpreter still exists and is the one asked for.
is_usable() {
  local state
  state=$(cat -- "$venv/.state" 2>/dev/null) && [[ $state != unfinished ]] &&
    [[ $(base_python "$venv/bin/python" 2>/dev/null) == "$state" ]] &&
    [[ -z $python || $(base_python "$python") == "$state" ]]
}

# A user's own environment is never changed, so it has to hold the modules and the right torch.
check_user_environment() { # MODULE ...
  local found module
  for module in "$@"; do
    "$python" -c "import $module" 2>/dev/null ||
      exit_with 1 "$(quote "$python") is in an environment of yours, which lacks $module; \
install it, or give --python= an interpreter that is in no environment"
  done
  found=$("$python" -c 'import torch; print(torch.__version__)')
  [[ $found == "${generation%x}"* ]] ||
    exit_with 1 "$(quote "$python") has torch $found, expected $generation; give another --python= \
or --torch="
}

# Sets `python` to an interpreter with what the generation's requirements and further FILEs list.
make_environment() { # MODULE FILE ...: a module that a user's own environment must hold, or ''
  local module=$1 file choice=${versions// / or }
  shift
  if [[ -n $python ]]; then
    command -v -- "$python" >/dev/null || exit_with 1 "--python: no interpreter $(quote "$python")"
    if "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
      check_user_environment torch torchvision numpy PIL ${module:+"$module"}
      return
    fi
    fits_generation "$python" ||
      exit_with 1 "--python=$(quote "$python") doesn't fit: torch $generation needs Python $choice \
with venv"
  fi
  if command -v flock >/dev/null; then
    exec 7>"$venv.lock"
    flock 7
  fi
  if ! is_usable; then
    [[ ! -e $venv || -f $venv/.state ]] ||
      exit_with 1 "$(quote "$venv") exists and was not made by these scripts; move it away, or use \
it with --python=$(quote "$venv/bin/python")"
    [[ -n $python ]] || find_python ||
      exit_with 1 "found no Python for torch $generation; install $choice, or name one with \
--python=PATH"
    printf '%s: making %s with %s\n' "$me" "$(quote "$venv")" "$(quote "$python")" >&2
    create_environment
  fi
  for file in "$requirements" "$@"; do install_requirements "$file"; done
  exec 7>&-
  python=$venv/bin/python
}
