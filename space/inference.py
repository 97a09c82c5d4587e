"""Decode pictures safely, classify them, and cache the latest predictions with their maps."""

import hashlib
import io
import statistics
import struct
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import loading
from loading import UserError, attention

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # not EPS, which runs programs
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError, struct.error)
MAX_BYTES = 20 * 2**20
MIN_SIDE, MAX_PIXELS = 8, 50_000_000  # 200 MB when decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns
MAX_DECODED, ONE_LARGE = 2048, Lock()  # longer side; larger pictures are shrunk one at a time
MAX_SHOWN = 448  # longer side of the displayed picture
MAX_CACHED = 64  # predictions of about 1 MB each
MIN_AUROC = 0.8  # of OOD detection; below this, the page does not mention it


@dataclass
class Prediction:
    """The model's output for one picture."""

    picture: Image.Image  # RGB, the part that the model sees, at most MAX_SHOWN pixels per side
    pixels: Tensor  # float32 (1, 3, S, S), the model's input
    probs: dict[str, float]  # by label, most probable first
    features: Tensor  # float32 (D,), the mean token of the middle layer
    maps: attention.Maps  # for a batch of one
    relevance: dict[int, np.ndarray] = field(default_factory=dict)  # (h, w) by class, on demand


class Classifier:
    """A model with its labels, its commit (None for a folder) and its evaluation results."""

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        folder, self.revision = loading.download(name, revision)
        self.results, self.faithfulness = loading.read_results(folder)
        model, self.processor = loading.load(name, folder)
        self.labels = [label for _, label in sorted(model.config.id2label.items())]
        known = [path for path in EXAMPLES if path.stem in self.labels]
        self.examples = sorted(folder.glob("examples/*.jpg")) + known
        self.exact = model.to(loading.DEVICE)  # in float32; gradients need it
        images = [Image.open(path).convert("RGB") for path in EXAMPLES[::3]]  # each takes 0.5 s
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        self.model, self.precision = loading.choose_precision(self.exact, pixels.split(1))
        self.compute = loading.GPU(self.compute) if loading.GPU else self.compute
        self.lock = Lock()  # the model processes one picture at a time, on all cores
        self.cache: dict[bytes, Prediction] = {}  # by the SHA-256 of the file

    def predict_file(self, path: str | Path) -> Prediction:
        """Predict a picture file, or return the cached prediction for the same content."""
        try:
            data = Path(path).read_bytes()
        except OSError:
            raise UserError("The picture is no longer on the server. Upload it again.") from None
        key = hashlib.sha256(data).digest()
        if not (prediction := self.cache.get(key)):
            prediction = self.predict(open_picture(data))
            with self.lock:
                self.cache[key] = prediction
                if len(self.cache) > MAX_CACHED:
                    del self.cache[next(iter(self.cache))]  # the oldest
        return prediction

    def predict(self, image: Image.Image) -> Prediction:
        """Predict an upright RGB image in one forward pass, with all maps except relevance."""
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        if self.processor.do_center_crop:
            edge, (width, height) = self.processor.size.get("shortest_edge"), image.size
            share = self.processor.crop_size["height"] / (edge or self.processor.size["height"])
            if edge:
                image = ImageOps.fit(image, (min(image.size),) * 2, bleed=(1 - share) / 2)
            else:  # squashed to a square before the crop
                left, top = width * (1 - share) / 2, height * (1 - share) / 2
                image = image.crop(tuple(map(round, (left, top, width - left, height - top))))
        picture = ImageOps.contain(image, (min(MAX_SHOWN, max(image.size)),) * 2)
        with self.lock:
            maps, features = self.compute(pixels)
        pairs = zip(self.labels, maps.logits[0].softmax(dim=0).tolist(), strict=True)
        probs = dict(sorted(pairs, key=lambda pair: -pair[1]))
        return Prediction(picture, pixels, probs, features, maps)

    def compute(self, pixels: Tensor, number: int | None = None) -> tuple[attention.Maps, Tensor]:
        """Compute the maps and the features, with relevance if a class number is given."""
        model, outputs = (self.model if number is None else self.exact), []
        hook = model.register_forward_hook(lambda model, inputs, output: outputs.append(output))
        pixels = pixels.to(model.device, model.dtype)
        try:
            maps = attention.compute_maps(model, pixels, number, relevance=number is not None)
        finally:
            hook.remove()
        layers = outputs[0].hidden_states  # of (1, T, D)
        features = layers[round((len(layers) - 1) / 2)][0].mean(dim=0).detach().float().cpu()
        return attention.Maps(*(v if v is None else v.cpu() for v in vars(maps).values())), features

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
        with self.lock:
            if number not in prediction.relevance:
                maps, _ = self.compute(prediction.pixels, number)
                prediction.relevance[number] = maps.relevance[0].float().numpy()
        return prediction.relevance[number]

    def is_ood(self, prediction: Prediction) -> bool:
        """Return whether a picture is out of distribution; False if detection is unreliable."""
        with suppress(LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            ood, logits = self.results["ood"], prediction.maps.logits[0].float()
            scores = {"energy": logits.logsumexp(dim=0), "msp": logits.softmax(dim=0).max()}
            if ood["score"] == "mahalanobis":
                mean, precision = map(torch.tensor, ood["gaussian"])
                chosen = torch.linspace(0, len(prediction.features) - 1, len(mean)).round().long()
                distance = prediction.features[chosen] - mean
                scores["mahalanobis"] = -(distance @ precision @ distance)
            is_measured = statistics.fmean(ood["auroc"].values()) >= MIN_AUROC
            return is_measured and bool(scores[ood["score"]] < ood["threshold"])
        return False

    def best_method(self) -> str:
        """Return the most faithful method as measured: highest insertion minus deletion AUC."""
        areas = self.faithfulness["methods"] if self.faithfulness else {}
        gains = {m: areas[m]["insertion"]["auc"] - areas[m]["deletion"]["auc"] for m in areas}
        return max(attention.METHODS, key=lambda method: gains.get(method, -2))


def open_picture(data: bytes) -> Image.Image:
    """Decode a file to an upright RGB image, as in training; UserError if it is not accepted."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"The picture has more than {MAX_PIXELS // 10**6} megapixels.")
            if min(image.size) < MIN_SIDE:
                raise UserError(f"Each side of the picture must have at least {MIN_SIDE} pixels.")
            image.draft(None, (MAX_DECODED,) * 2)  # decodes fewer pixels of a JPEG
            with ONE_LARGE if max(image.size) > MAX_DECODED else nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                if image.mode in ("I", "F"):
                    raise UserError("32-bit gray has no fixed range: convert it to 8 or 16 bits.")
                if image.mode.startswith("I;16"):  # scaled, since Pillow would clip it
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image if image.mode == "RGB" else image.convert("RGB")
                image.thumbnail((MAX_DECODED,) * 2)
                return image.copy()
    except Image.UnidentifiedImageError:
        raise UserError(f"The file is not a picture in {', '.join(FORMATS)} format.") from None
    except DAMAGE as error:  # or a UserError
        broken = UserError("The picture is damaged or incomplete: upload another copy.")
        raise error if isinstance(error, UserError) else broken from None
