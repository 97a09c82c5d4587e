"""The model behind the page: pulled once, then asked one picture at a time. No gradio in it.

Whether a picture is like those of training is told by its energy, the logsumexp of its logits
(Liu et al. 2020, arXiv:2010.03759), against the threshold published with the results.
"""

import copy
import hashlib
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

try:
    import attention  # a Space has the file beside this one
except ModuleNotFoundError:  # a checkout has it in the pipeline
    sys.path.append(str(Path(__file__).parents[1]))
    from pipeline import attention

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
RESULTS = "evaluation_results.json"
EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))

# What a picture may be. Pillow would also read formats that run other programs, as EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # decoded, these take 150 MB
MIN_SIDE = 8
SHOWN = 448  # the longer side of the picture that is drawn on

AGREES = 0.02  # how far bfloat16 may move a probability


class Refusal(Exception):
    """One sentence that says to whoever asked why there is no answer."""


@dataclass
class Answer:
    """What the model made of one picture: small, for one is kept for each open page.

    `picture` RGB, at most SHOWN pixels a side; `seen` RGB (S, S), as the model was shown it;
    `probabilities` float32 (C,); `energy` of the logits; `maps` of a batch of one; `relevances`
    (h, w) by class, as they are asked for.
    """

    picture: Image.Image
    seen: Image.Image
    probabilities: np.ndarray
    energy: float
    maps: attention.Maps
    relevances: dict[int, np.ndarray] = field(default_factory=dict)


class Classifier:
    """A model from a folder or the Hub, its labels, and what is known about it.

    `revision` is its commit, None for a folder; `results` those of evaluation_results.json, None
    where there are none of these very weights. Refusal where the model can't be had.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        folder, self.revision = pull(name, revision)
        self.results = read_results(folder, local=self.revision is None)
        self.model, self.processor = load(name, folder)
        self.model = quicker(self.model, [self.pixels(Image.open(p)) for p in EXAMPLES[:3]])
        labels = self.model.config.id2label
        self.labels = [labels[i] for i in range(len(labels))]
        warm = self.answer(Image.new("RGB", (32, 32)))  # refuses a model without maps
        self.layers, self.heads = warm.maps.heads.shape[1:3]

    @property
    def precision(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def answer(self, image: Image.Image) -> Answer:
        """One forward pass over an upright RGB image: probabilities, and all maps but relevance."""
        size = self.processor.size
        seen = image.resize((size["width"], size["height"]), self.processor.resample)
        maps = self._explain(seen, relevance=False)
        logits = maps.logits[0].float()  # (C,)
        picture = image.copy()
        picture.thumbnail((SHOWN, SHOWN))
        return Answer(
            picture, seen, logits.softmax(dim=0).numpy(), logits.logsumexp(dim=0).item(), maps
        )

    def map(
        self, answer: Answer, method: str, layer: int = -1, head: int = 0, label: str | None = None
    ) -> np.ndarray:
        """One map float32 (h, w) of an answer; `label` is whose relevance, None the likeliest's.

        Refusal for a method, layer, head or label that is not there.
        """
        if method == "relevance":
            return self._relevance(answer, self._number(answer, label))
        try:
            return answer.maps.select(method, layer, head)[0].float().numpy()
        except ValueError as error:
            raise Refusal(str(error)) from None

    def familiar(self, answer: Answer) -> bool:
        """Whether a picture is like those of training; where nothing was measured, it is."""
        found = (self.results or {}).get("familiarity")
        return found is None or answer.energy >= found["threshold"]

    def pixels(self, image: Image.Image) -> Tensor:
        """What the model takes, float32 (1, 3, S, S)."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def _relevance(self, answer: Answer, number: int) -> np.ndarray:
        if number not in answer.relevances:
            maps = self._explain(answer.seen, relevance=True, classes=number)
            answer.relevances[number] = maps.relevance[0].float().numpy()
        return answer.relevances[number]

    def _number(self, answer: Answer, label: str | None) -> int:
        if not label:
            return int(answer.probabilities.argmax())
        if label not in self.labels:
            raise Refusal(f'There is no class "{label}"; there are {", ".join(self.labels)}.')
        return self.labels.index(label)

    def _explain(self, seen: Image.Image, **options) -> attention.Maps:
        try:
            return attention.explain(self.model, self.pixels(seen).to(self.model.dtype), **options)
        except ValueError as error:
            raise Refusal(str(error)) from None


def open_picture(path: str | Path) -> Image.Image:
    """A file as an upright RGB image, an animation's first frame; Refusal for one that is none.

    As the training data were opened (transparency is dropped), but for grey of 16 bits, which
    Pillow would cut off at white and which is scaled here.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise Refusal(
                f"The picture has {size / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are taken."
            )
        with Image.open(path, formats=FORMATS) as image:
            _check_size(*image.size)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Image.UnidentifiedImageError:
        names = ", ".join(FORMATS[:-1])
        raise Refusal(f"The file is no picture that can be read: {names} and AVIF can.") from None
    except Image.DecompressionBombError:
        raise Refusal(f"The picture has more than {MAX_PIXELS // 10**6} million pixels.") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError):
        raise Refusal("The picture is damaged, or cut off: it can't be read whole.") from None


def pull(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, and its commit where it is one of the Hub's.

    A commit that is kept here is not asked for again; with no way to the Hub the copy kept last
    does. Refusal where there is none, or no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        commit = None
    else:
        folder = _kept(name, revision) or _download(name, revision)
        commit = folder.name  # the cache keeps each commit in a folder of that name
    missing = _missing(folder)
    if missing:
        raise Refusal(f'The model "{name}" is not whole: it has no {", ".join(missing)}.')
    return folder, commit


def _missing(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _kept(name: str, revision: str | None) -> Path | None:
    """The folder of a whole commit in the cache."""
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        return None
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if _missing(folder) else folder


def _download(name: str, revision: str | None) -> Path:
    where = f"the Hub at {constants.ENDPOINT}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*FILES, RESULTS]))
    except (RevisionNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        if isinstance(error, RevisionNotFoundError):
            what = f'The model "{name}" has no revision "{revision}" on {where}.'
        else:
            what = f'There is no model "{name}" on {where}, or it is private and needs a token.'
        raise Refusal(what) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.TransportError, OSError):
        raise Refusal(
            f'The model "{name}" can\'t be fetched from {where}, and no copy of it is kept '
            "here. Try again later."
        ) from None


def read_results(folder: Path, local: bool) -> dict | None:
    """What evaluation measured of these very files, if it did.

    Where a model lies in a folder here, its results are in `results` or `results/<name>`.
    """
    places = [folder, Path("results"), Path("results") / folder.name] if local else [folder]
    for place in places:
        if (place / RESULTS).is_file():
            results = json.loads((place / RESULTS).read_text())
            if all(_sha256(folder / f) == d for f, d in results["model"]["sha256"].items()):
                return results
    return None


def load(name: str, folder: Path):
    """The model in float32, and its image processor. Refusal for what is no classifier."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f'The model "{name}" can\'t be loaded: {reason}') from None
    if info["missing_keys"]:
        raise Refusal(f'The model "{name}" is no fine-tuned classifier of images.')
    return model.eval().requires_grad_(False), processor


def quicker(model, batches: list[Tensor]):
    """The model, or its copy in bfloat16 where that is quicker here and gives the same answers.

    `batches` are pixels float32 (1, 3, S, S) to try it on.
    """
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")):
        return model
    half = copy.deepcopy(model).bfloat16()
    # The head stays exact: its logits are what is rounded most.
    half.classifier.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    whole, whole_s = _timed(model, batches)
    rounded, rounded_s = _timed(half, batches)
    same = (whole.argmax(dim=1) == rounded.argmax(dim=1)).all()
    close = (whole - rounded).abs().max() <= AGREES
    return half if rounded_s < whole_s and same and close else model


def use_cores() -> None:
    """One thread a core that this container may use, not one a core that the machine has."""
    limits = [torch.get_num_threads()]
    if os.environ.get("CPU_CORES", "").isdigit():  # set by the Hub
        limits.append(int(os.environ["CPU_CORES"]))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and not quota.read_text().startswith("max"):
        used, period = map(int, quota.read_text().split())
        limits.append(round(used / period))
    torch.set_num_threads(max(1, min(limits)))


def where(values: np.ndarray) -> str:
    """In words, the part of a picture where a map (h, w) is strongest."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    down = ("upper", "middle", "lower")[3 * row // values.shape[0]]
    across = ("left", "centre", "right")[3 * column // values.shape[1]]
    return "centre" if (down, across) == ("middle", "centre") else f"{down} {across}"


def _timed(model, batches: list[Tensor], rounds: int = 3) -> tuple[Tensor, float]:
    """Probabilities (B, C) of the batches, and the median seconds of one after a first."""
    found, seconds = [], []
    batches = [batch.to(model.dtype) for batch in batches]
    for batch in batches * rounds:
        started = time.perf_counter()
        maps = attention.explain(model, batch, relevance=False)
        seconds.append(time.perf_counter() - started)
        found.append(maps.logits.float().softmax(dim=1))
    return torch.cat(found[-len(batches) :]), statistics.median(seconds[1:])


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Refusal(
            f"The picture has {width * height / 1e6:.0f} million pixels; at most "
            f"{MAX_PIXELS // 10**6} million are taken."
        )
    if min(width, height) < MIN_SIDE:
        raise Refusal(f"The picture is {width} x {height} pixels: it needs {MIN_SIDE} a side.")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
