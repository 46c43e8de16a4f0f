#!/usr/bin/env bash
# From a bare machine to a trained and evaluated network: environment, small real data set, training, evaluation.
set -euo pipefail
# shellcheck source=test/venv.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

torch=2.x python='' device='' device_list='' device_id=0
data=$test_dir/data/quickstart
result=$test_dir/output/quickstart
train=(--epochs=20 --batch_size=32 --lr=0.03) evaluate=()
small=(--val-resize-size 48 --val-crop-size 48)
recipe=(--train-crop-size 48 --train-crop-scale 0.6 --warmup 1 --dropout 0 --seed 1)

while (($#)); do
  case $1 in
    --torch=*) torch=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --device=*) device=${1#*=} train+=("$1") evaluate+=("$1") ;;
    --device_list=*) device_list=${1#*=} ;;
    --device_id=*) device_id=${1#*=} train+=("$1") ;;
    --workers=*) train+=("$1") evaluate+=("$1") ;;
    --batch_size=* | --epochs=* | --lr=* | --resume=*) train+=("$1") ;;
    --) shift && break ;;
    -h | --help)
      cat <<END
usage: $me [--torch=1.5|1.8|2.x] [--python=PATH] [argument ...] [-- main.py's arguments]

Trains on a small Fashion-MNIST set through train_full_1p.sh, then evaluates through train_eval_8p.sh.
  --device= --device_id= --workers= --batch_size= --epochs= --lr= --resume=   as in train_full_1p.sh
  --device_list=0,1   cards of the evaluation (default: up to eight that are there; two processes on cpu)
END
      exit 0
      ;;
    *) die 2 "unknown argument $(shown "$1"); $me --help lists them" ;;
  esac
  shift
done
[[ $device_id =~ ^(0|[1-9][0-9]{0,3})$ ]] || die 2 "--device_id=$(shown "$device_id"): expected a card's number, such as 0"

set_generation "$torch"
make_environment ''
"$python" "$test_dir/unpack_data.py" "$test_dir/data/fashion_mnist_2500.npz" "$data"

mkdir -p -- "$result"
cd -- "$result" # the checkpoints land here
supervise bash "$test_dir/train_full_1p.sh" --python="$python" --data_path="$data" "${train[@]}" \
  -- "${small[@]}" "${recipe[@]}" "$@"
((status == 0)) || exit "$status"

if [[ -z $device_list ]]; then
  # As many processes as there are cards of the kind that main.py has just taken.
  cards=$("$python" - "$device" <<'END'
import sys
if sys.argv[1] != "cpu":
    import torch
    try:
        import torch_npu
    except ImportError:
        pass
    for name, module in ("npu", getattr(torch, "npu", None)), ("gpu", torch.cuda):
        if sys.argv[1] in ("", name) and module is not None and module.is_available():
            sys.exit(print(min(module.device_count(), 8)))
print(2)
END
  )
  device_list=$(seq -s , 0 $((cards - 1)))
fi
# Under the next number, so that the training's log and figures stay where they are.
eval_id=$((device_id + 1))
supervise bash "$test_dir/train_eval_8p.sh" --python="$python" --data_path="$data" --resume=model_best.pth.tar \
  --device_list="$device_list" --device_id="$eval_id" ${evaluate[@]+"${evaluate[@]}"} -- "${small[@]}" "$@"
((status == 0)) || exit "$status"

cat <<END

environment          ${python%/bin/*}
images               $data
checkpoints, table   $result
log of the training  $test_dir/output/$device_id
log of the evaluation  $test_dir/output/$eval_id
END
