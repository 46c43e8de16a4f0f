#!/usr/bin/env bash
# From a bare machine to a trained network: environment, small data set, training, evaluation.
set -euo pipefail
# shellcheck source=test/venv.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

torch=2.x python='' device='' device_list='' device_id=0
data=$test_dir/data/quickstart
result=$test_dir/output/quickstart
train=(--recipe=small --batch_size=32)
evaluate=()
val_flags=(--val-resize-size 48 --val-crop-size 48)
train_flags=(--train-crop-size 48 --seed 1)

usage() {
  cat <<END
usage: $me [--torch=1.5|1.8|2.x] [--python=PATH] [argument ...] [-- main.py's arguments]

Trains on a small Fashion-MNIST set with train_full_1p.sh, then evaluates with train_eval_8p.sh.
  --device= --device_id= --workers= --batch_size= --epochs= --lr= --recipe= --resume=
                      as in train_full_1p.sh
  --device_list=0,1   cards of the evaluation (default: all, at most eight; on cpu two processes)
END
}

while (($#)); do
  case $1 in
    --torch=*) torch=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --device=*) device=${1#*=} train+=("$1") evaluate+=("$1") ;;
    --device_list=*) device_list=${1#*=} ;;
    --device_id=*) device_id=${1#*=} train+=("$1") ;;
    --workers=*) train+=("$1") evaluate+=("$1") ;;
    --batch_size=* | --epochs=* | --lr=* | --recipe=* | --resume=*) train+=("$1") ;;
    --) shift && break ;;
    -h | --help) usage && exit 0 ;;
    *) exit_with 2 "unknown argument $(quote "$1"); $me --help lists them" ;;
  esac
  shift
done
check_device_id
[[ " $* " != *' --output-dir'* ]] ||
  exit_with 2 "--output-dir is not applicable: the quick start saves in $(quote "$result")"

set_generation "$torch"
make_environment ''
"$python" "$test_dir/unpack_data.py" "$test_dir/data/fashion_mnist_2500.npz" "$data"

mkdir -p -- "$result"
cd -- "$result" # the checkpoints are saved here
supervise bash "$test_dir/train_full_1p.sh" --python="$python" --data_path="$data" "${train[@]}" \
  -- "${val_flags[@]}" "${train_flags[@]}" "$@"
((status == 0)) || exit "$status"

if [[ -z $device_list ]]; then
  # One process for each card of the backend that main.py has just selected.
  cards=$(PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" - ${device:+"--device=$device"} <<'END'
import sys

import main

backend = main.select_backend(main.parse_args(["--synthetic=1"] + sys.argv[1:]))[0]
print(2 if backend.name == "cpu" else min(main.device_count(backend)[0], 8))
END
  )
  device_list=$(seq -s , 0 $((cards - 1)))
fi
# Under the next number, so that the log and figures of the training are kept.
eval_id=$((device_id + 1))
supervise bash "$test_dir/train_eval_8p.sh" --python="$python" --data_path="$data" \
  --resume=model_best.pth.tar --device_list="$device_list" --device_id="$eval_id" \
  ${evaluate[@]+"${evaluate[@]}"} -- "${val_flags[@]}" "$@"
((status == 0)) || exit "$status"

cat <<END

environment            ${python%/bin/*}
images                 $data
checkpoints, table     $result
log of the training    $test_dir/output/$device_id
log of the evaluation  $test_dir/output/$eval_id
END
