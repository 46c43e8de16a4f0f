"""O0, O1 and O2 through torch's own autocast and gradient scaler."""

import pytest
import torch

import main
from helpers import (TORCH, counts, cpu_runtime, losses, needs_bf16, parse, read_checkpoint,
                     run_main, the_error)

LEVELS = pytest.mark.parametrize("level", ["O1", "O2"])
CPU = cpu_runtime()


@needs_bf16
@LEVELS
def test_low_precision_trains_and_saves_fp32(images, run_here, tmp_path, level):
    result = run_here(images, "--epochs", 1, "--opt-level", level)
    fast = main.mnasnet.has_fast_depthwise(torch.bfloat16)
    note = "" if fast else "; slow with this processor and torch: O0 is faster"
    assert len(losses(result)) == 4 and f"{level} (bfloat16{note})" in result.stdout
    dtypes = {tensor.dtype for tensor in read_checkpoint(tmp_path)["state_dict"].values()}
    assert dtypes == {torch.float32, torch.int64}


@needs_bf16
@pytest.mark.parametrize("level, fast, text", [
    ("O1", False, "O1 (bfloat16; slow with"), ("O1", True, "O1 (bfloat16)"),
    ("O0", False, "O0 (fp32)")])
def test_the_log_says_that_low_precision_is_slow_here(monkeypatch, level, fast, text):
    monkeypatch.setattr(main.mnasnet, "has_fast_depthwise", lambda dtype: fast)
    assert text in str(main.Precision(parse("--opt-level", level), CPU))


@pytest.mark.skipif(TORCH >= (1, 10), reason="this torch has autocast for the CPU")
@LEVELS
def test_low_precision_is_refused_where_torch_lacks_it(images, run_here, level):
    assert "--opt-level O0" in the_error(run_here(images, "--opt-level", level))


def test_a_first_step_that_overflows_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(4, 64))
    flags = parse("--lr", "1")
    optimizer = main.build_optimizer(flags, CPU, main.Precision(flags, CPU), [weight])
    if not optimizer.param_groups[0].get("fused"):
        pytest.skip("this torch has no fused SGD for the CPU: the scaler leaves out the step")
    _, make_scaler = main.find_native_amp(CPU.backend, torch.float32)
    scaler = make_scaler(init_scale=2.0)
    memory = [torch.full_like(weight, float("nan")) for _ in range(20)]
    del memory  # what the allocator hands out next
    first_step = 1 - 1.9 * (0.5 + 1e-4)  # Nesterov's, with weight decay
    for gradient, expected in ((float("inf"), 1.0), (0.5, first_step)):
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.allclose(weight, torch.full_like(weight, expected))


@needs_bf16
def test_master_weights_keep_the_memory_of_their_gradients():
    """Ascend's fused SGD keeps reading the memory where the first gradients lay."""
    flags = parse("--opt-level", "O2")
    precision = main.Precision(flags, CPU)
    model = main.build_model(flags, CPU, 4, precision.conv_dtype)
    optimizer = torch.optim.SGD(precision.prepare(model), 0.1)
    clear, addresses = optimizer.zero_grad, []
    optimizer.zero_grad = lambda: clear(set_to_none=False)
    for _ in range(2):
        loss = model(torch.randn(2, 3, 32, 32).bfloat16()).float().square().mean()
        precision.backward(loss, optimizer)
        precision.step(optimizer)
        parameters = main.optimizer_parameters(optimizer)
        addresses.append([parameter.grad.data_ptr() for parameter in parameters])
    assert addresses[0] == addresses[1]


def test_a_low_precision_that_the_device_lacks_is_refused(images, run_here):
    error = the_error(run_here(images, "--opt-level", "O1", "--amp-dtype", "float16"))
    assert "--amp-dtype float16 is not available on this cpu" in error


class OldCard:
    """torch.cuda on a card that emulates bfloat16."""

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation


class CardOfOldTorch:
    @staticmethod
    def is_bf16_supported():
        return True


def test_bfloat16_that_is_emulated_is_refused():
    flags = parse("--amp-dtype", "bfloat16")
    runtime = main.Runtime(main.BACKENDS["gpu"], torch.device("cuda", 0), module=OldCard)
    with pytest.raises(main.UserError, match="--amp-dtype bfloat16 is not available on this gpu"):
        main.low_precision(flags, runtime)
    runtime = main.Runtime(main.BACKENDS["gpu"], torch.device("cuda", 0), module=CardOfOldTorch)
    assert main.low_precision(flags, runtime) == torch.bfloat16


def test_bfloat16_is_not_for_apex(images, run_here):
    arguments = ["--opt-level", "O1", "--amp-dtype", "bfloat16", "--amp-backend", "apex"]
    assert "--amp-backend native" in the_error(run_here(images, *arguments))


@pytest.mark.slow
@LEVELS
def test_bfloat16_on_npu(npu, images, tmp_path, level):
    arguments = [images, "--device", "npu", "--opt-level", level, "--amp-dtype", "bfloat16",
                 "--epochs", 1]
    result = run_main(*arguments, cwd=tmp_path, **npu)
    assert len(losses(result)) == 4 and f"{level} (bfloat16)" in result.stdout
    assert read_checkpoint(tmp_path)["amp"] == {}  # no loss scale
    evaluated = run_main(images, "--device", "npu", "-e", "--resume", "checkpoint.pth.tar",
                         cwd=tmp_path, **npu)
    assert counts(evaluated) == counts(result)
    assert "--amp-dtype=bfloat16" in evaluated.stdout
