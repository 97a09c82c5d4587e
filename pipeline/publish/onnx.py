"""Export a model to ONNX for transformers.js, and check that each copy predicts as the model does.

The files are named as transformers.js expects (its `dtype` is fp32, fp16 or q8). int8 is dynamic
quantization of the linear layers' weights, with one scale per output channel.
"""

import logging
import shutil
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pipeline import runs
from pipeline.data.decoding import DecodedImages, content_hash
from pipeline.data.loading import load_split
from pipeline.data.transforms import input_size, preprocess
from pipeline.errors import UserError
from pipeline.evaluation.metrics import wilson_interval
from pipeline.recipe import DataArguments
from pipeline.training.model import load_model

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
VARIANTS = {  # file: (dtype in transformers.js, precision)
    "model.onnx": ("fp32", "float32"),
    "model_fp16.onnx": ("fp16", "float16"),
    "model_quantized.onnx": ("q8", "int8"),
}
REPORT = "onnx/onnx.json"
MAX_LOGIT_DIFFERENCE = 1e-4  # for the float32 copy
MIN_SAME_CLASS = 0.99  # share of images, for all copies; no more accuracy than the rest can be lost


def export(name: str, data: DataArguments, max_images: int | None = None) -> dict:
    """Export a model to `results/<run>/onnx`, in float32, float16 and int8.

    Copies whose predictions differ from the model's are skipped with a warning.

    Args:
        name: A local folder, or `id@revision` on the Hub.
        data: The dataset; the copies are checked on its test split.
        max_images: Check on only this many test images, which is faster.

    Returns:
        The content of `onnx.json`: for each file its size, its agreement with the model in
        PyTorch, its accuracy, and the milliseconds per image on this machine.

    Raises:
        UserError: A package is missing, the model can't be exported, or the float32 copy differs.
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise UserError(
            f"make export needs the package {missing[0]}: run "
            "`.venv/bin/pip install -r requirements-export.txt`."
        )
    model, processor = load_model(name)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    split = load_split(data, "test", processor, names=labels)
    evaluated = content_hash(split)
    split = split.shuffle(seed=0)  # folders are sorted by class
    if max_images:
        split = split.select(range(min(max_images, len(split))))
    folder = runs.results_folder(name)
    with tempfile.TemporaryDirectory() as made:
        _write_variants(model, input_size(processor), Path(made))
        images, expected = DecodedImages(split), []
        with torch.inference_mode():  # on the CPU, as ONNX Runtime: a GPU may round to TF32
            for rows in tqdm(torch.arange(len(images)).split(50), "Predicting"):
                pixels = preprocess(images.batch(rows)["pixel_values"], processor)
                expected.append(model(pixels).logits)
        expected, truth = torch.cat(expected).numpy(), np.asarray(split["label"][:])
        variants = {}
        for file, (dtype, precision) in VARIANTS.items():
            report = _check(Path(made) / file, processor, images, truth, expected)
            if reason := _disagreement(precision, report):
                if precision == "float32":
                    raise UserError(f"The ONNX copy of {name} {reason}: it can't be published.")
                print(f"Skipped the {precision} copy, which {reason}.")
                continue
            variants[file] = {"dtype": dtype, "precision": precision} | report
            (folder / "onnx").mkdir(parents=True, exist_ok=True)
            shutil.move(Path(made) / file, folder / "onnx" / file)
    hashes = runs.model_hashes(name)
    report = {
        "weights": hashes["model.safetensors"],
        "data": evaluated,
        "images": len(split),
        "variants": variants,
        "hardware": runs.processor(),
        "versions": {package: runs.version(package) for package in PACKAGES},
    }
    runs.write_json(folder / REPORT, report)
    made_files = {f"onnx/{file}": None for file in variants} | {REPORT: None}
    runs.record_files(folder, made_files, hashes["model.safetensors"], replace="onnx")
    return report


def _write_variants(model: PreTrainedModel, size: int, folder: Path) -> None:
    # These packages are optional and take a second or more to import.
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from transformers.exporters import OnnxConfig, OnnxExporter

    full = folder / "model.onnx"
    sample = {"pixel_values": torch.zeros(2, 3, size, size)}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about operators that no image classifier has
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True))
            for part in (exported.program.graph, *exported.program.functions.values()):
                for node in part.all_nodes():
                    node.metadata_props.clear()  # stack traces, with this machine's paths
            onnx_ir.save(exported.program, full)  # with the weights in the same file
            half = convert_float_to_float16(onnx.load(full), keep_io_types=True)
            onnx.save(half, folder / "model_fp16.onnx")
            # Unsigned weights: without VNNI, products with signed ones saturate.
            options = {"per_channel": True, "weight_type": QuantType.QUInt8}
            options["op_types_to_quantize"] = ["MatMul", "Gemm"]
            quantize_dynamic(full, folder / "model_quantized.onnx", **options)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{type(model).__name__} can't be exported to ONNX: {reason[0]}") from None
    finally:
        logging.disable(level)


def _check(
    file: Path, processor, images: DecodedImages, truth: np.ndarray, expected: np.ndarray
) -> dict:
    """Measure one file; `truth` is (N,), and `expected` are PyTorch's logits (N, C)."""
    from onnxruntime import InferenceSession

    session, logits, times = InferenceSession(file, providers=["CPUExecutionProvider"]), [], []
    # One image at a time, as in a browser: int8 scales activations by the whole batch.
    for row in tqdm(range(len(images)), f"Checking {file.name}"):
        pixels = preprocess(images.batch([row])["pixel_values"], processor).numpy()
        start = time.perf_counter()
        logits += session.run(["logits"], {"pixel_values": pixels})
        times.append(time.perf_counter() - start)
    logits = np.concatenate(logits)
    correct = int((logits.argmax(axis=1) == truth).sum())
    return {
        "sha256": runs.sha256(file),
        "bytes": file.stat().st_size,
        "max_logit_difference": float(np.abs(logits - expected).max()),
        "same_class": float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        "accuracy": correct / len(images),
        "accuracy_interval": wilson_interval(correct, len(images)),
        "ms_per_image": round(1000 * float(np.median(times)), 1),
    }


def _disagreement(precision: str, report: dict) -> str | None:
    """Return how a copy differs too much from the model."""
    if precision == "float32" and not report["max_logit_difference"] <= MAX_LOGIT_DIFFERENCE:
        return f"differs from PyTorch by {report['max_logit_difference']:.1e} in its logits"
    if not report["same_class"] >= MIN_SAME_CLASS:
        return f"predicts the same class for only {report['same_class']:.1%} of the images"
    return None
