# shellcheck shell=bash
# What the five launch scripts share: arguments, launch, log parsing, result file.
# A launch script sets `mode` (acc, perf or eval), `cards` (1 or 8), `batch_size` and, for training,
# `lr` (that of the recipe modelzoo at this batch size) and perhaps `epochs`, and then calls
# `run_case "$@"`.
# quickstart.sh and venv.sh use the errors and `supervise`.

test_dir=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repo=${test_dir%/*}
me=${0##*/}
network=MnasNet_for_PyTorch
mode='' cards=1 batch_size='' epochs='' lr='' recipe=modelzoo

# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------

exit_with() { # STATUS MESSAGE
  printf '%s: error: %s\n' "$me" "$2" >&2
  exit "$1"
}

quote() { # VALUE: in quotes, for a message that has to stay on one line
  if [[ $1 == *[[:cntrl:]]* ]]; then printf '%q' "$1"; else printf "'%s'" "$1"; fi
}

check_argument() { # NAME PATTERN EXPECTED: ends with an error unless the variable NAME matches
  [[ ${!1} =~ $2 ]] || exit_with 2 "--$1=$(quote "${!1}"): expected $3"
}

check_device_id() { check_argument device_id '^(0|[1-9][0-9]{0,3})$' "a card number, such as 0"; }

# --------------------------------------------------------------------------------------------------
# Running a command: signals reach it, its exit status is kept, and none of its processes is left
# --------------------------------------------------------------------------------------------------

forward_signal() { # SIGNAL
  signal=$1
  if [[ -n $child ]]; then kill -s "$signal" "$child" 2>/dev/null || true; fi
}

wait_gone() { # PROCESS SECONDS: whether it (or, as -GROUP, a whole process group) ends in that time
  local tries=$(($2 * 10))
  while kill -s 0 -- "$1" 2>/dev/null; do
    ((tries-- > 0)) || return 1
    sleep 0.1
  done
}

# Runs COMMAND and leaves its exit status in `status`. SIGINT, SIGTERM and SIGUSR1 are forwarded (a
# closed terminal as SIGTERM), and the command is waited for however long it takes to save.
supervise() { # COMMAND ...
  local wait_status
  signal='' child='' status=0
  trap 'forward_signal INT' INT
  trap 'forward_signal USR1' USR1
  trap 'forward_signal TERM' TERM HUP QUIT

  # Job control gives the command its own process group and the default SIGINT: Ctrl-C reaches it
  # once, through forward_signal. It is off for `wait`, which would else return when the command is
  # suspended.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  if [[ -n $signal ]]; then forward_signal "$signal"; fi

  # A signal makes `wait` return early, with a status that is not the command's: wait once more.
  while :; do
    signal='' wait_status=0
    wait "$child" 2>/dev/null || wait_status=$? # quiet: bash prints a line about a killed command
    ((wait_status == 127 && status > 128)) || status=$wait_status # 127: reaped before
    if [[ -z $signal ]] || ((wait_status < 128)); then break; fi
  done
  trap - INT USR1 TERM HUP QUIT

  # Processes that outlived the command would keep the cards and the pipe of the log.
  if ! wait_gone "-$child" 1; then
    kill -s TERM -- "-$child" 2>/dev/null || true
    wait_gone "-$child" 5 || kill -s KILL -- "-$child" 2>/dev/null || true
  fi
}

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------

usage() {
  local resume_help="the log is then continued"
  [[ $mode != eval ]] || resume_help="here: the one to evaluate (default ./checkpoint.pth.tar)"
  cat <<END
usage: $me --data_path=DIR [argument ...] [-- main.py's arguments]

  --data_path=DIR     folder with train/ and val/, one folder per class in each (required)
  --device_id=N       card of a 1p script; names the folder test/output/N (default 0)
  --device=NAME       npu, gpu or cpu (default: the best available)
  --device_list=0,1   cards of an 8p script, one process each (default: eight)
  --batch_size=N      total batch size of all cards (default $batch_size)
  --workers=N         loader processes, as main.py --workers
  --resume=FILE       checkpoint to resume from, or 'auto' for the newest; $resume_help
  --python=PATH       interpreter (default: \$PYTHON, else .venv of this repository, else python3)
END
  [[ $mode == eval ]] || cat <<END
  --recipe=NAME       main.py's defaults for the flags of a training (default modelzoo)
  --epochs=N --lr=X   default: the recipe's${epochs:+, here $epochs epochs}; lr $lr for modelzoo
END
}

parse_arguments() {
  while (($#)); do
    case $1 in
      --data_path=*) data_path=${1#*=} ;;
      --device_id=*) device_id=${1#*=} ;;
      --device=*) device=${1#*=} ;;
      --device_list=*) device_list=${1#*=} ;;
      --batch_size=*) batch_size=${1#*=} ;;
      --workers=*) workers=${1#*=} ;;
      --resume=*) resume=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --epochs=* | --lr=* | --recipe=*)
        [[ $mode != eval ]] || exit_with 2 "$(quote "$1") is not applicable: nothing is trained"
        case $1 in
          --epochs=*) epochs=${1#*=} ;;
          --lr=*) own_lr=${1#*=} ;;
          *) recipe=${1#*=} ;;
        esac
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        refuse_own_flags "$@"
        main_args=("$@")
        return
        ;;
      *)
        exit_with 2 "unknown argument $(quote "$1"); arguments look like --data_path=DIR, and \
$me --help lists them"
        ;;
    esac
    shift
  done
}

# The result file and the log depend on these, so the script must know them.
refuse_own_flags() {
  local argument name
  for argument in "$@"; do
    case $argument in
      -b* | --batch-size*) name=batch_size ;;
      --device | --device=*) name=device ;;
      --device-list*) name=device_list ;;
      --npu | --npu=*) name=device_id ;;
      --recipe | --recipe=*) name=recipe ;;
      --resume*) name=resume ;;
      *) continue ;;
    esac
    exit_with 2 "$(quote "$argument") after '--': give it as --$name=VALUE before the '--'"
  done
}

check_arguments() {
  local commas
  [[ -n $data_path ]] ||
    exit_with 2 "no --data_path=DIR given: name the folder that holds train/ and val/"
  [[ $data_path == /* ]] || data_path=$PWD/$data_path
  [[ -d $data_path ]] ||
    exit_with 1 "--data_path: no folder $(quote "$data_path"); expected one with train/ and val/"
  check_device_id
  check_argument batch_size '^[1-9][0-9]{0,6}$' "a number of images, such as 256"
  check_argument device '^(npu|gpu|cpu|)$' "npu, gpu or cpu"
  if [[ -z $device_list ]]; then
    if ((cards == 1)); then device_list=$device_id; else device_list=0,1,2,3,4,5,6,7; fi
  fi
  check_argument device_list '^[0-9]{1,4}(,[0-9]{1,4})*$' "card numbers and commas, such as 0,1"
  commas=${device_list//[0-9]/}
  rank_size=$((${#commas} + 1))
  ((cards > 1 || rank_size == 1)) ||
    exit_with 2 "--device_list=$(quote "$device_list"): this script runs on one card; \
use ${me/_1p/_8p} for several"
  [[ $mode != eval || -n $resume ]] || resume=./checkpoint.pth.tar
  [[ -z $resume || $resume == auto || -f $resume ]] ||
    exit_with 1 "--resume: no file $(quote "$resume"); name a checkpoint, such as one that \
train_full_1p.sh saved"
  if [[ -z $python ]]; then
    python=$repo/.venv/bin/python
    [[ -x $python ]] || python=python3
  fi
  command -v -- "$python" >/dev/null ||
    exit_with 1 "no interpreter $(quote "$python"); name one with --python=PATH, or run \
test/quickstart.sh, which makes an environment"
}

# --------------------------------------------------------------------------------------------------
# Launch
# --------------------------------------------------------------------------------------------------

build_command() {
  trainer_command=("$python" "$repo/main.py" "$data_path"
    "--device-list=$device_list" "--batch-size=$batch_size")
  [[ -z $device ]] || trainer_command+=("--device=$device")
  [[ -z $workers ]] || trainer_command+=("--workers=$workers")
  [[ -z $resume ]] || trainer_command+=("--resume=$resume")
  ((cards == 1)) || trainer_command+=(--multiprocessing-distributed)
  if [[ $mode == eval ]]; then
    trainer_command+=(--evaluate)
  else
    [[ -n $own_lr || $recipe != modelzoo ]] || own_lr=$lr
    trainer_command+=("--recipe=$recipe")
    [[ -z $epochs ]] || trainer_command+=("--epochs=$epochs")
    [[ -z $own_lr ]] || trainer_command+=("--lr=$own_lr")
  fi
  # Last, so that the user's own flags win. In bash < 4.4 an empty array counts as unset.
  trainer_command+=(${main_args[@]+"${main_args[@]}"})
}

prepare_output() {
  output=$test_dir/output/$device_id
  log=$output/train_$device_id.log
  case_name=${network}_bs${batch_size}_${rank_size}p_${mode}
  result_file=$output/$case_name.log
  loss_file=$output/train_${case_name}_loss.txt
  mkdir -p -- "$output" 2>/dev/null || true
  [[ -d $output && -w $output ]] ||
    exit_with 1 "can't write to $(quote "$output"), the folder of the logs; make it writable"
  if command -v flock >/dev/null; then
    # main.py inherits the descriptor, so the lock holds until the last process of the run ends.
    exec 9<>"$output/.lock"
    flock -n 9 ||
      exit_with 1 "another run writes to $(quote "$output"); wait for it, or choose another \
--device_id="
  fi
  # The figures of an earlier run must not be taken for those of one that fails.
  rm -f -- "$result_file" "$loss_file"
  if [[ $mode == eval || -z $resume ]] && [[ -s $log ]]; then mv -f -- "$log" "$log.old"; fi
  touch -- "$log"
  log_start=$(($(wc -c <"$log") + 1))
}

# Runs the trainer with its output on the terminal and in the log. Its exit status goes to `status`.
run_trainer() {
  local pipe=$output/.pipe tee_process
  rm -f -- "$pipe"
  mkfifo -- "$pipe"
  # tee ignores Ctrl-C and a closed terminal: what main.py prints while it saves belongs in the log.
  (trap '' INT TERM USR1 HUP QUIT PIPE && exec tee -a -- "$log" <"$pipe") &
  tee_process=$!
  exec 8>"$pipe"
  rm -f -- "$pipe"
  export PYTHONUNBUFFERED=1
  supervise "${trainer_command[@]}" >&8 2>&1 8>&-
  exec 8>&-
  wait_gone "$tee_process" 5 || kill -s KILL "$tee_process" 2>/dev/null || true
}

# --------------------------------------------------------------------------------------------------
# Log and results
# --------------------------------------------------------------------------------------------------

log_of_run() { tail -c "+$log_start" -- "$log"; }

report_failure() {
  local hint=''
  case $status in
    130 | 138 | 143) [[ $mode == eval ]] || hint=' (stopped by a signal; --resume=auto resumes)' ;;
  esac
  printf '%s: error: main.py ended with status %d%s; the end of %s:\n' \
    "$me" "$status" "$hint" "$(quote "$log")" >&2
  log_of_run | tail -n 20 >&2
  if log_of_run | grep '^main\.py: error: ' | grep -q -e '--device-list'; then
    printf '%s: error: the cards were %s; choose others with --device_list=0,1,...\n' \
      "$me" "$device_list" >&2
  fi
}

# A resumed run repeats the steps since its checkpoint: the last line of a step counts.
step_losses() {
  awk '/^=> .* process\(es\) with batch size / { fresh = 1 }
    /^=> resumed from / { fresh = 0 }
    /Epoch:/ && match($0, /Epoch: *\[[^]]*\]\[[^]]*\]/) {
      if (fresh) { split("", loss); count = fresh = 0 }
      step = substr($0, RSTART, RLENGTH)
      for (i = 1; i < NF; i++) if ($i == "Loss") break
      if (!(step in loss)) order[++count] = step
      loss[step] = $(i + 1)
    }
    END { for (i = 1; i <= count; i++) print loss[order[i]] }' "$log"
}

report() { # SECONDS
  local accuracy fps loss step_time
  # A profile ends without figures.
  [[ " ${main_args[*]-} " != *' --run-prof '* ]] || return 0
  read -r accuracy fps loss < <(log_of_run | awk '
    $1 == "Result:" { for (i = 2; i < NF; i += 2) value[$i] = $(i + 1) }
    END { print value["Acc@1"], value["images/sec"], value["loss"] }') || true
  [[ -n $loss ]] ||
    exit_with 1 "main.py succeeded but wrote no complete 'Result:' line; see $(quote "$log")"
  step_time=$(LC_ALL=C awk -v batch="$batch_size" -v fps="$fps" \
    'BEGIN { if (fps + 0 > 0) printf "%.2f", batch * 1000 / fps; else print "nan" }')

  step_losses >"$loss_file"
  printf '%s = %s\n' Network "$network" RankSize "$rank_size" BatchSize "$batch_size" \
    DeviceType "$(uname -m)" CaseName "$case_name" ActualFPS "$fps" TrainingTime "$step_time" \
    TrainAccuracy "$accuracy" ActualLoss "$loss" E2ETrainingTime "$1" >"$result_file"
  cat <<END
------------------ Final result ------------------
Final Performance images/sec : $fps
Final Train Accuracy : $accuracy
E2E Training Duration sec : $1
END
}

run_case() {
  local start
  data_path='' device_id=0 device='' device_list='' workers='' resume='' python=${PYTHON:-}
  own_lr=''
  main_args=()
  parse_arguments "$@"
  check_arguments
  build_command
  # shellcheck source=test/env_npu.sh
  [[ $device != npu ]] || . "$test_dir/env_npu.sh"
  prepare_output
  start=$SECONDS
  run_trainer
  if ((status != 0)); then
    report_failure || true # the terminal may be closed
    exit "$status"
  fi
  report "$((SECONDS - start))"
}
