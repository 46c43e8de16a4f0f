# shellcheck shell=bash
# What the five launch scripts share: arguments, launch, reading of the log, result file.
# A script sets `kind` (acc, perf or eval), `cards` (1 or 8), `batch_size` and, for training,
# `epochs`, `lr` and `recipe` (main.py flags), and then calls `run_case "$@"`.

test_dir=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repo=${test_dir%/*}
me=${0##*/}
network=MnasNet_for_PyTorch
# shellcheck source=test/process.sh
. "$test_dir/process.sh"
kind='' cards=1 batch_size='' epochs='' lr='' recipe=()

die() { # STATUS MESSAGE
  printf '%s: error: %s\n' "$me" "$2" >&2
  exit "$1"
}

shown() { # VALUE: quoted for a message that has to stay on one line
  if [[ $1 == *[[:cntrl:]]* ]]; then printf '%q' "$1"; else printf "'%s'" "$1"; fi
}

usage() {
  cat <<END
usage: $me --data_path=DIR [argument ...] [-- main.py's arguments]

  --data_path=DIR     folder with train/ and val/, one folder a class in each (required)
  --device_id=N       card of a 1p script; names the folder test/output/N (default 0)
  --device=NAME       npu, gpu or cpu (default: the best one present)
  --device_list=0,1   cards of an 8p script, one process each (default: eight)
  --batch_size=N      images a step, over all cards (here $batch_size)
  --workers=N         loader processes, as main.py --workers
  --resume=FILE       checkpoint to go on from, or 'auto' for the newest one; $([[ $kind == eval ]] &&
    echo "here: the one to evaluate (default ./checkpoint.pth.tar)" || echo "the log is then continued")
  --python=PATH       interpreter (default: \$PYTHON, else .venv of this repository, else python3)
END
  [[ $kind == eval ]] || printf '%s\n' "  --epochs=N --lr=X   here $epochs and $lr"
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
      --epochs=* | --lr=*)
        [[ $kind != eval ]] || die 2 "$(shown "$1") has no meaning here: nothing is trained"
        case $1 in --epochs=*) epochs=${1#*=} ;; *) lr=${1#*=} ;; esac
        ;;
      -h | --help) usage && exit 0 ;;
      --) shift && refuse_own_flags "$@" && main_args+=("$@") && return ;;
      *) die 2 "unknown argument $(shown "$1"); arguments look like --data_path=DIR, and $me --help lists them" ;;
    esac
    shift
  done
}

# The result file and the log depend on these, so they must be known here.
refuse_own_flags() {
  local argument name
  for argument in "$@"; do
    case $argument in
      -b* | --batch-size*) name=batch_size ;;
      --device | --device=*) name=device ;;
      --device-list*) name=device_list ;;
      --npu | --npu=*) name=device_id ;;
      --resume*) name=resume ;;
      *) continue ;;
    esac
    die 2 "$(shown "$argument") after '--': give it as --$name=VALUE before the '--'"
  done
}

check_arguments() {
  [[ -n $data_path ]] || die 2 "no --data_path=DIR given: name the folder that holds train/ and val/"
  [[ $data_path == /* ]] || data_path=$PWD/$data_path
  [[ -d $data_path ]] || die 1 "--data_path: no folder $(shown "$data_path"); expected one that holds train/ and val/"
  [[ $device_id =~ ^(0|[1-9][0-9]{0,3})$ ]] || die 2 "--device_id=$(shown "$device_id"): expected a card's number, such as 0"
  [[ $batch_size =~ ^[1-9][0-9]{0,6}$ ]] || die 2 "--batch_size=$(shown "$batch_size"): expected a number of images, such as 256"
  [[ $device =~ ^(npu|gpu|cpu|)$ ]] || die 2 "--device=$(shown "$device"): expected npu, gpu or cpu"
  if [[ -z $device_list ]]; then
    if ((cards == 1)); then device_list=$device_id; else device_list=0,1,2,3,4,5,6,7; fi
  fi
  [[ $device_list =~ ^[0-9]{1,4}(,[0-9]{1,4})*$ ]] ||
    die 2 "--device_list=$(shown "$device_list"): expected card numbers with commas between, such as 0,1"
  local commas=${device_list//[0-9]/}
  rank_size=$((${#commas} + 1))
  ((cards > 1 || rank_size == 1)) ||
    die 2 "--device_list=$(shown "$device_list"): this script runs on one card; take ${me/_1p/_8p} for several"
  [[ $kind != eval || -n $resume ]] || resume=./checkpoint.pth.tar
  [[ -z $resume || $resume == auto || -f $resume ]] ||
    die 1 "--resume: no file $(shown "$resume"); name a checkpoint, such as one that train_full_1p.sh left"
  if [[ -z $python ]]; then
    python=$repo/.venv/bin/python
    [[ -x $python ]] || python=python3
  fi
  command -v -- "$python" >/dev/null ||
    die 1 "no interpreter $(shown "$python"); name one with --python=PATH, or run test/quickstart.sh, which makes one"
}

build_command() {
  trainer_command=("$python" "$repo/main.py" "$data_path"
    "--device-list=$device_list" "--batch-size=$batch_size")
  [[ -z $device ]] || trainer_command+=("--device=$device")
  [[ -z $workers ]] || trainer_command+=("--workers=$workers")
  [[ -z $resume ]] || trainer_command+=("--resume=$resume")
  ((cards == 1)) || trainer_command+=(--multiprocessing-distributed)
  if [[ $kind == eval ]]; then
    trainer_command+=(--evaluate)
  else
    trainer_command+=("--epochs=$epochs" "--lr=$lr" "${recipe[@]}")
  fi
  # Last, so that what the user passes wins; the test is for bash < 4.4, where an empty array is unset.
  ((${#main_args[@]} == 0)) || trainer_command+=("${main_args[@]}")
}

prepare_output() {
  output=$test_dir/output/$device_id
  log=$output/train_$device_id.log
  case_name=${network}_bs${batch_size}_${rank_size}p_${kind}
  mkdir -p -- "$output" 2>/dev/null || true
  [[ -d $output && -w $output ]] ||
    die 1 "can't write to $(shown "$output"), where the logs go; make it writable"
  if command -v flock >/dev/null; then
    # main.py inherits the descriptor, so the lock holds for as long as anything of the run is alive.
    exec 9<>"$output/.lock"
    flock -n 9 || die 1 "another run writes to $(shown "$output"); wait for it, or give another --device_id="
  fi
  # The figures of an earlier run must not be taken for those of one that fails.
  rm -f -- "$output/$case_name.log" "$output/train_${case_name}_loss.txt"
  if [[ $kind == eval || -z $resume ]] && [[ -s $log ]]; then mv -f -- "$log" "$log.old"; fi
  touch -- "$log"
  log_start=$(($(wc -c <"$log") + 1))
}

this_run() { tail -c "+$log_start" -- "$log"; }

# Runs the trainer with its output on the terminal and in the log, and leaves its exit status in `status`.
run_trainer() {
  local tee_process
  rm -f -- "$output/.pipe"
  mkfifo -- "$output/.pipe"
  # The log outlives Ctrl-C and a closed terminal: what main.py says while it saves belongs in it.
  (trap '' INT TERM USR1 HUP QUIT PIPE && exec tee -a -- "$log" <"$output/.pipe") &
  tee_process=$!
  exec 8>"$output/.pipe"
  rm -f -- "$output/.pipe"
  export PYTHONUNBUFFERED=1
  supervise "${trainer_command[@]}" >&8 2>&1 8>&-
  exec 8>&-
  gone "$tee_process" 5 || kill -s KILL "$tee_process" 2>/dev/null || true
}

report_failure() {
  local hint=''
  case $status in 130 | 138 | 143) [[ $kind == eval ]] || hint=' (stopped by a signal; --resume=auto goes on)' ;; esac
  printf '%s: error: main.py ended with status %d%s; the end of %s:\n' "$me" "$status" "$hint" "$(shown "$log")" >&2
  this_run | tail -n 20 >&2
  if this_run | grep '^main\.py: error: ' | grep -q -e '--device-list'; then
    printf '%s: error: the cards were %s; choose others with --device_list=0,1,...\n' "$me" "$device_list" >&2
  fi
}

report() { # SECONDS
  local accuracy fps loss step_time
  # These two of main.py's flags end it before there are figures.
  case " ${main_args[*]-} " in *' --run-prof '* | *' --check-data '*) return ;; esac
  read -r accuracy fps loss < <(this_run | awk '
    $1 == "Result:" { for (i = 2; i < NF; i += 2) value[$i] = $(i + 1) }
    END { print value["Acc@1"], value["images/sec"], value["loss"] }') || true
  [[ -n $loss ]] || die 1 "main.py ended well but wrote no whole 'Result:' line; see $(shown "$log")"
  step_time=$(LC_ALL=C awk -v batch="$batch_size" -v fps="$fps" \
    'BEGIN { if (fps + 0 > 0) printf "%.2f", batch * 1000 / fps; else print "nan" }')

  # A resumed run repeats the steps since its checkpoint: the later line of a step replaces the earlier one.
  awk '/Epoch:/ && match($0, /Epoch: *\[[^]]*\]\[[^]]*\]/) {
      step = substr($0, RSTART, RLENGTH)
      for (i = 1; i < NF; i++) if ($i == "Loss") break
      if (!(step in loss)) order[++count] = step
      loss[step] = $(i + 1)
    }
    END { for (i = 1; i <= count; i++) print loss[order[i]] }' "$log" >"$output/train_${case_name}_loss.txt"

  printf '%s = %s\n' Network "$network" RankSize "$rank_size" BatchSize "$batch_size" \
    DeviceType "$(uname -m)" CaseName "$case_name" ActualFPS "$fps" TrainingTime "$step_time" \
    TrainAccuracy "$accuracy" ActualLoss "$loss" E2ETrainingTime "$1" >"$output/$case_name.log"
  cat <<END
------------------ Final result ------------------
Final Performance images/sec : $fps
Final Train Accuracy : $accuracy
E2E Training Duration sec : $1
END
}

run_case() {
  data_path='' device_id=0 device='' device_list='' workers='' resume='' python=${PYTHON:-}
  main_args=()
  parse_arguments "$@"
  check_arguments
  build_command
  # shellcheck source=test/env_npu.sh
  [[ $device != npu ]] || . "$test_dir/env_npu.sh"
  prepare_output
  local start=$SECONDS
  run_trainer
  if ((status != 0)); then
    report_failure || true # where the terminal is gone
    exit "$status"
  fi
  report "$((SECONDS - start))"
}
