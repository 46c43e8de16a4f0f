# shellcheck shell=bash
# Ascend's environment, to be sourced. The launch scripts do so for --device=npu only.
# Variables that are set already keep their values; etp_running_flag=true says that a test platform
# has set all of them.

if [[ ${etp_running_flag:-} != true ]]; then
  _npu_found=''
  for _npu_file in \
    "${ASCEND_TOOLKIT_HOME:-/nowhere}/set_env.sh" \
    "${ASCEND_TOOLKIT_HOME:-/nowhere}/../set_env.sh" \
    /usr/local/Ascend/ascend-toolkit/set_env.sh \
    /usr/local/Ascend/cann/set_env.sh \
    /usr/local/Ascend/nnae/set_env.sh \
    "${HOME:-/nowhere}/Ascend/ascend-toolkit/set_env.sh" \
    "${HOME:-/nowhere}/Ascend/cann/set_env.sh" \
    "${HOME:-/nowhere}/Ascend/nnae/set_env.sh"; do
    if [[ -r $_npu_file ]]; then
      # CANN's files read unset variables and end on failing tests: that must not end our shell.
      _npu_options=$-
      set +eu
      # shellcheck disable=SC1090 # which file it is depends on the host
      . "$_npu_file"
      if [[ $_npu_options == *e* ]]; then set -e; fi
      if [[ $_npu_options == *u* ]]; then set -u; fi
      _npu_found=$_npu_file
      break
    fi
  done
  [[ -n $_npu_found ]] ||
    printf 'env_npu.sh: found no set_env.sh of CANN (%s); continuing without it\n' \
      'ASCEND_TOOLKIT_HOME, /usr/local/Ascend, ~/Ascend' >&2
  unset _npu_file _npu_found _npu_options

  # Device log: not on stdout, errors only, no events.
  export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT:-0}"
  export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
  export ASCEND_GLOBAL_EVENT_ENABLE="${ASCEND_GLOBAL_EVENT_ENABLE:-0}"
  # Copies and combined tensors use fast kernels.
  export PTCOPY_ENABLE="${PTCOPY_ENABLE:-1}"
  export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"
  # Collectives without a list of allowed hosts; ranks wait (seconds) for the slowest to compile.
  export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}"
  export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-600}"
fi
