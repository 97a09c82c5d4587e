"""Load an image classifier from the Hub or a folder, and predict one picture at a time."""

import copy
import hashlib
import io
import json
import os
import timeit
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import constants, errors, snapshot_download, try_to_load_from_cache
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, logging

try:
    import attention  # the published Space has this file beside app.py
except ModuleNotFoundError:
    from pipeline.explain import attention

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
RESULTS = "evaluation_results.json"
EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # not EPS, which runs programs
MAX_BYTES = 20 * 2**20
MIN_SIDE, MAX_PIXELS = 8, 50_000_000  # 150 MB once decoded
MAX_SHOWN = 448  # longer side of the picture that maps are laid over
MAX_CACHED = 64  # predictions, of about 1 MB each
TOLERANCE = 0.02  # largest change of a probability that bfloat16 may cause


class UserError(Exception):
    """One sentence that says why there is no prediction."""


@dataclass
class Prediction:
    """What the model computed for one picture."""

    picture: Image.Image  # RGB, at most MAX_SHOWN pixels a side
    model_input: Image.Image  # RGB (S, S), the picture as the model received it
    probs: dict[str, float]  # by label, the most probable first
    energy: float  # logsumexp of the logits, the OOD score of Liu et al. 2020, arXiv:2010.03759
    maps: attention.Maps  # of a batch of one
    relevance: dict[int, np.ndarray] = field(default_factory=dict)  # (h, w) by class, on demand


class Classifier:
    """A model with its labels, its commit (None for a folder) and its evaluation results."""

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        folder, self.revision = download(name, revision)
        self.results = read_results(folder)
        self.model, self.processor = load(name, folder)
        self.labels = [name for _, name in sorted(self.model.config.id2label.items())]
        self.cache: dict[bytes, Prediction] = {}  # by the SHA-256 of the file
        self.model = choose_precision(self.model, [self.pixels(Image.open(p)) for p in EXAMPLES])

    def predict_file(self, path: str | Path) -> Prediction:
        """Predict a picture file, or return the prediction of the same content from the cache."""
        try:
            if os.path.getsize(path) > MAX_BYTES:
                raise UserError(f"The picture has more than {MAX_BYTES // 2**20} MB.")
            data = Path(path).read_bytes()
        except OSError:
            raise UserError("The picture is no longer on the server. Upload it again.") from None
        key = hashlib.sha256(data).digest()
        if key not in self.cache:
            if len(self.cache) == MAX_CACHED:
                del self.cache[next(iter(self.cache))]  # the oldest
            self.cache[key] = self.predict(open_picture(data))
        return self.cache[key]

    def predict(self, image: Image.Image) -> Prediction:
        """Predict an upright RGB image in one forward pass, with all maps but relevance."""
        size = self.processor.size["width"], self.processor.size["height"]
        model_input = image.resize(size, self.processor.resample)
        maps = attention.compute_maps(self.model, self.pixels(model_input), relevance=False)
        logits = maps.logits[0].float()  # (C,)
        picture = ImageOps.contain(image, (min(MAX_SHOWN, max(image.size)),) * 2)
        pairs = zip(self.labels, logits.softmax(dim=0).tolist(), strict=True)
        probs = dict(sorted(pairs, key=lambda pair: -pair[1]))
        return Prediction(picture, model_input, probs, logits.logsumexp(dim=0).item(), maps)

    def select_map(
        self, prediction: Prediction, method: str, layer: int = -1, head: int = 0, label: str = ""
    ) -> np.ndarray:
        """Return a map, float32 (h, w); relevance is for a label, by default the predicted one."""
        if type(layer) is not int or type(head) is not int:
            raise UserError("The layer and the head must be whole numbers.")
        if method != "relevance":
            try:
                return prediction.maps.select(method, layer, head)[0].float().numpy()
            except ValueError as error:
                raise UserError(str(error)) from None
        if label and label not in self.labels:
            raise UserError(f'There is no class "{label}"; choose from {", ".join(self.labels)}.')
        number = self.labels.index(label or next(iter(prediction.probs)))
        if number not in prediction.relevance:
            pixels = self.pixels(prediction.model_input)
            maps = attention.compute_maps(self.model, pixels, classes=number)
            prediction.relevance[number] = maps.relevance[0].float().numpy()
        return prediction.relevance[number]

    def is_in_distribution(self, prediction: Prediction) -> bool:
        """Return whether a picture looks like the training data; True if it was not measured."""
        ood = (self.results or {}).get("ood")
        return ood is None or prediction.energy >= ood["threshold"]

    def pixels(self, image: Image.Image) -> Tensor:
        """Return what the model takes of an RGB image, (1, 3, S, S) in its precision."""
        return self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.dtype)


def open_picture(data: bytes) -> Image.Image:
    """Decode a file to an upright RGB image, as training does; UserError if it is not accepted."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if min(image.size) < MIN_SIDE:
                raise UserError(f"Each side of the picture must have at least {MIN_SIDE} pixels.")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise UserError("32-bit gray has no fixed range: convert it to 8 or 16 bits.")
            if image.mode.startswith("I;16"):  # scaled, where Pillow would clip it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise UserError(f"The file is not a picture in {', '.join(FORMATS)} format.") from None
    except Image.DecompressionBombError:
        raise UserError(f"The picture has more than {MAX_PIXELS // 10**6} megapixels.") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError):
        raise UserError("The picture is damaged or incomplete.") from None


def download(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the folder of a complete model and its commit, which is None for a local folder."""
    folder, commit = Path(name).expanduser(), None
    if not folder.is_dir():
        model = f'model "{name}"' + (f' with the revision "{revision}"' if revision else "")
        hub, options = f"the Hub at {constants.ENDPOINT}", {"allow_patterns": [*FILES, RESULTS]}
        try:  # the Hub is not asked for a commit that is cached; if it is down, the cache is used
            paths = [try_to_load_from_cache(name, file, revision=revision) for file in FILES]
            options["local_files_only"] = len(revision or "") == 40 and all(map(bool, paths))
            folder = Path(snapshot_download(name, revision=revision, **options))
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ValueError):
            raise UserError(f"There is no public {model} on {hub}, and no such folder.") from None
        except (OSError, httpx2.TransportError):
            raise UserError(f"There is no cached {model}, and {hub} does not answer.") from None
        commit = folder.name  # the cache names the folder of a commit after it
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(f'The model "{name}" is incomplete: it has no {", ".join(missing)}.')
    return folder, commit


def read_results(folder: Path) -> dict | None:
    """Return the evaluation results of these very files, from beside them or `results/<run>`."""
    hashes = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in FILES}
    for path in (folder / RESULTS, Path("results") / folder.resolve().name / RESULTS):
        with suppress(OSError, ValueError, KeyError, TypeError):  # no results, or broken ones
            results = json.loads(path.read_text("utf-8"))
            if results["model"]["sha256"] == hashes:
                return results
    return None


def load(name: str, folder: Path):
    """Load the model in float32 and its image processor; UserError if it is no classifier."""
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor(images=Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        attention.compute_maps(model.eval(), pixels)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'The model "{name}" cannot be loaded: {reason}') from None
    labels, size = model.config.id2label, processor.size
    if info["missing_keys"] or sorted(labels) != list(range(len(set(labels.values())))):
        raise UserError(f'The model "{name}" is not a fine-tuned classifier with named classes.')
    if not (size.get("width") and size.get("height")):
        raise UserError(f'The image processor of "{name}" does not give a width and a height.')
    return model.requires_grad_(False), processor


def choose_precision(model, batches: list[Tensor]):
    """Return the model, or a bfloat16 copy that is faster here and agrees on the pixels given."""
    # Where bfloat16 is emulated, a small product tells it in 0.1 s; a model would take minutes.
    single, half = (torch.ones(256, 256, dtype=dtype) for dtype in (model.dtype, torch.bfloat16))
    if _seconds(lambda: half @ half) > _seconds(lambda: single @ single):
        return model
    rounded = copy.deepcopy(model).bfloat16()
    # The head stays in float32, since rounding changes logits most.
    rounded.classifier.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    probs = torch.cat([model(b).logits for b in batches]).softmax(dim=1)
    rounded_probs = torch.cat([rounded(b.bfloat16()).logits for b in batches]).softmax(dim=1)
    same = torch.equal(probs.argmax(dim=1), rounded_probs.argmax(dim=1))
    close = (probs - rounded_probs).abs().max() <= TOLERANCE
    faster = _seconds(lambda: rounded(batches[0].bfloat16())) < _seconds(lambda: model(batches[0]))
    return rounded if same and close and faster else model


def _seconds(function) -> float:
    return min(timeit.repeat(function, number=1))


def limit_threads() -> None:
    """Use as many threads as the Hub gives cores to this container, not as the machine has."""
    if os.environ.get("CPU_CORES", "").isdigit():
        torch.set_num_threads(max(1, min(int(os.environ["CPU_CORES"]), torch.get_num_threads())))
