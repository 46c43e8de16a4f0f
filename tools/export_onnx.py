"""Writes the model of a checkpoint as ONNX or TorchScript, if that gives the model's logits.

    python tools/export_onnx.py CHECKPOINT OUT.onnx [--torchscript] [-a ARCH] [--size PIXELS]

The file maps "images", normalized float32 [batch, 3, S, S], to "logits" [batch, classes]. Metadata
(extra files of TorchScript) are JSON: arch, classes or null, resize_size, crop_size (S), mean, std
and interpolation. It ends with status 0; with 1 after an error, 2 for an invalid command line.
"""

import importlib.util
import io
import json
import os
import sys
import types
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch

import main as trainer
import mnasnet


def load_model(path, arch, size):
    """Returns the model and its metadata; raises UserError where the file does not hold them."""
    checkpoint = trainer.read_checkpoint(path)
    with trainer.loading(path):
        flags = trainer.saved_flags(checkpoint)
        names = [arch, checkpoint.get("arch"), flags["arch"]]
        arch = [name for name in names if name in mnasnet.ARCHITECTURES][0]  # timm has other names
        classes = checkpoint.get("classes")
        count = len(trainer.find_state(checkpoint, path)["classifier.1.weight"])
        # Not by build_model: its convolutions for the CPU of torch 1.8 can't be exported.
        model = getattr(mnasnet, arch)(num_classes=count, bn_eps=flags["bn_eps"])
        trainer.load_weights(model, checkpoint, path, classes)
        crop = size or flags["val_crop_size"]
        resize = round(crop * flags["val_resize_size"] / flags["val_crop_size"])
    return model.eval(), {
        "arch": arch, "classes": classes, "resize_size": resize, "crop_size": crop,
        "interpolation": "bilinear", "mean": trainer.MEAN, "std": trainer.STD}


def to_torchscript(model, images, metadata):
    """Returns the content of a TorchScript file, and a function that runs it."""
    extra_files = {} if trainer.TORCH >= (1, 8) else torch._C.ExtraFilesMap()
    for name, value in metadata.items():
        extra_files[name] = json.dumps(value)
    content = torch.jit.trace(model, images, check_trace=False).save_to_buffer(extra_files)
    return content, torch.jit.load(io.BytesIO(content))


def protobuf_field(number, content):
    """Returns a field of a protobuf message: its tag and length as varints, then the content."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
    return varint(number << 3 | 2) + varint(len(content)) + content


def to_onnx(model, images, metadata):
    """Returns the content of an ONNX file, and a function that runs it (None: not available)."""
    # torch 2.x imports onnx to look for functions of custom operators. This model has none.
    empty = types.SimpleNamespace(graph=types.SimpleNamespace(node=[]))
    sys.modules["onnx"] = types.SimpleNamespace(load_model_from_string=lambda content: empty)
    options = {"dynamo": False} if trainer.TORCH >= (2, 9) else {}  # True needs more packages
    file = io.BytesIO()
    torch.onnx.export(model, images, file, input_names=["images"], output_names=["logits"],
                      dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
                      opset_version=11, **options)
    del sys.modules["onnx"]
    for name, value in metadata.items():
        # Appending a field to a protobuf message adds it: 14 is ModelProto's metadata_props.
        pair = protobuf_field(1, name.encode()) + protobuf_field(2, json.dumps(value).encode())
        file.write(protobuf_field(14, pair))
    content = file.getvalue()
    if importlib.util.find_spec("onnxruntime"):
        session = importlib.import_module("onnxruntime").InferenceSession(
            content, providers=["CPUExecutionProvider"])
        return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    print("onnxruntime is not installed: the logits are not compared")
    if importlib.util.find_spec("onnx"):
        importlib.import_module("onnx").checker.check_model(content)
    return content, None


def main():
    parser = trainer.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="file of main.py, or a state dict")
    add("out", help="file to write")
    add("--torchscript", action="store_true", help="write TorchScript")
    add("-a", "--arch", choices=mnasnet.ARCHITECTURES, help="(default: that of the checkpoint)")
    add("--size", type=trainer.number(int, 32, 4096), help="crop (default: the checkpoint's)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(deprecated|legacy)")  # torch 2.x says so of both formats
    torch.set_grad_enabled(False)
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding lacks
    try:
        model, metadata = load_model(arguments.checkpoint, arguments.arch, arguments.size)
        batches = [torch.randn(batch, 3, *[metadata["crop_size"]] * 2) for batch in (1, 7)]
        convert = to_torchscript if arguments.torchscript else to_onnx
        content, run = convert(mnasnet.fold_batchnorm(model), batches[0], metadata)
        if run:
            logits, expected = [torch.cat([f(images) for images in batches]) for f in (run, model)]
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            print(f"largest difference: {difference:.1e} of the largest logit")
            if not difference <= 1e-4:  # also NaN
                raise trainer.UserError(f"{arguments.out} is not written: expected 1e-4 at most")
        trainer.write_file(content, arguments.out)
    except trainer.UserError as error:
        trainer.print_error(error, program="export_onnx.py")
        return 1
    print(f"=> {arguments.out}: {json.dumps(dict(metadata, classes=model.num_classes))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
