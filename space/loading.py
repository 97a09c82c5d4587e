"""Load an image classifier in its fastest precision, or explain why it can't be shown."""

import copy
import hashlib
import json
import os
import statistics
import timeit
import warnings
from contextlib import suppress
from pathlib import Path

import gradio as gr
import httpx2
import torch
from huggingface_hub import constants, errors, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoImageProcessor, AutoModelForImageClassification, logging

try:
    from spaces import GPU  # on ZeroGPU, provides a GPU for the duration of a call
except ImportError:
    GPU = None
try:
    import attention  # in the published Space, this file is next to app.py
except ModuleNotFoundError:
    from pipeline.explain import attention

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
RESULTS = {  # with the values that the page shows: formatting raises if they are malformed
    "evaluation_results.json": "{accuracy:f} {accuracy_interval[0]:f} {accuracy_interval[1]:f}"
    "{dataset[name]:s} {dataset[split]:s} {dataset[images]:d}",
    "attention_faithfulness.json": "{images:d} {methods[mean][insertion][auc]:f}",
}
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")  # capabilities of CPUs
TOLERANCE = 0.02  # largest allowed change in probability for a faster copy
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHOWN = Path(__file__).with_name("model.json")  # {"model", "revision"}, written by `make space`


class UserError(gr.Error):
    """An error that Gradio shows to the user as one sentence, without a traceback."""

    def __init__(self, message: str):
        super().__init__(message, print_exception=False)


def choose_model() -> tuple[str, str | None]:
    """Return the model in model.json, in MODEL_ID (`name@revision`), or of the last run."""
    name = os.environ.get("MODEL_ID", "").strip()
    if SHOWN.is_file() and ("SPACE_ID" in os.environ or not name):
        shown = json.loads(SHOWN.read_text("utf-8"))
        return shown["model"], shown["revision"]
    runs = sorted(Path("models").glob("*/training.json"), key=lambda path: path.stat().st_mtime)
    if not (name or runs):
        raise UserError("There is no model: train one, or set the variable MODEL_ID.")
    name = name or str(runs[-1].parent)
    name, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return name, revision or None


def download(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the folder of a complete model and its commit, which is None for a local folder."""
    folder, commit = Path(name).expanduser(), None
    if not folder.is_dir():
        model = f'model "{name}"' + (f' with the revision "{revision}"' if revision else "")
        hub = f"the Hub at {constants.ENDPOINT}"
        try:  # uses the cache if the Hub is down
            patterns = [*FILES, *RESULTS, "examples/*"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ValueError):
            raise UserError(f"There is no public {model} on {hub}, and no such folder.") from None
        except (OSError, httpx2.TransportError):
            raise UserError(f"There is no cached {model}, and {hub} does not respond.") from None
        commit = folder.name  # the cache names the folder after the commit
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(f'The model "{name}" is incomplete: it has no {", ".join(missing)}.')
    return folder, commit


def read_results(folder: Path) -> list[dict | None]:
    """Return RESULTS from the folder or `results/<run>`, or None if measured on other files."""
    hashes = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in FILES}
    results = dict.fromkeys(RESULTS)
    for path in (p / f for f in RESULTS for p in (Path("results") / folder.resolve().name, folder)):
        with suppress(OSError, ValueError, LookupError, TypeError):  # missing or malformed
            content = json.loads(path.read_text("utf-8"))
            RESULTS[path.name].format(**content)
            if (content if "sha256" in content else content["model"])["sha256"] == hashes:
                results[path.name] = content
    return list(results.values())


def load(name: str, folder: Path):
    """Load the model in float32 and its image processor; UserError if it can't be shown."""
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_hidden_states=True,
            output_loading_info=True, trust_remote_code=False,
        )  # fmt: skip
        options = {"backend": "pil", "trust_remote_code": False}
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        pixels = processor(images=Image.new("RGB", (48, 32)), return_tensors="pt")["pixel_values"]
        attention.compute_maps(model.eval(), pixels)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f'The model "{name}" cannot be loaded: {reason}') from None
    labels = model.config.id2label
    if info["missing_keys"] or sorted(labels) != list(range(len(set(labels.values())))):
        raise UserError(f'The model "{name}" is not a fine-tuned classifier with named classes.')
    return model.requires_grad_(False), processor


def choose_precision(model, batches: tuple[Tensor, ...]) -> tuple[nn.Module, str]:
    """Return the fastest copy of a model that agrees on pixels (1, 3, S, S), and its precision."""
    if (cores := os.environ.get("CPU_CORES", "")).isdigit():  # the container's limit on the Hub
        torch.set_num_threads(max(1, min(int(cores), torch.get_num_threads())))
    if "SPACES_ZERO_GPU" in os.environ:  # there is no GPU to measure on at startup
        return model, "float32"
    copies = {"float32": model}  # all heads stay in float32: rounding them changes logits most
    heads = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    # A CPU that emulates bfloat16 would take minutes per picture.
    if DEVICE.type == "cuda" or any(map(torch.cpu.get_capabilities().get, FAST_BFLOAT16)):
        copies["bfloat16"] = rounded = copy.deepcopy(model).bfloat16()
        for name in heads:
            rounded.get_submodule(name).float().register_forward_pre_hook(
                lambda _, x: (x[0].float(),)
            )
    if DEVICE.type == "cpu":  # one scale per output channel; activations are scaled dynamically
        with warnings.catch_warnings(action="ignore"):  # its successor, torchao, needs a compiler
            quantized = quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig})
        copies["int8"] = quantized
        for name in heads:
            setattr(quantized, name, model.get_submodule(name))
    for name in {*copies} - {"float32"} if model.config.model_type == "vit" else ():
        # The head reads only [CLS], so the last layer's MLP can skip the other tokens.
        copies[name].vit.layers[-1].mlp.register_forward_pre_hook(lambda _, x: (x[0][:, :1],))
    probs, seconds = ({name: [] for name in copies} for _ in range(2))
    for pixels in batches:
        for name, network in copies.items():
            inputs, start = pixels.to(DEVICE, network.dtype), timeit.default_timer()
            probs[name].append(network(inputs).logits[0].float().softmax(dim=0).cpu())  # (C,)
            seconds[name].append(timeit.default_timer() - start)

    def agrees(name: str) -> bool:
        pairs = zip(probs["float32"], probs[name], strict=True)
        return all((p - q).abs().max() <= TOLERANCE and p.argmax() == q.argmax() for p, q in pairs)

    taken = {name: statistics.median(seconds[name]) for name in copies if agrees(name)}
    name = min(taken, key=taken.get, default="float32")
    return copies[name], name
