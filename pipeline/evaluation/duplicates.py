"""Find near-duplicate images by their thumbnails.

Candidates are nearest neighbors by low-resolution colors, and by a model's features if there is
one (Barz & Denzler 2020, arXiv:1902.00423). A pair counts as near-duplicate if the aligned images
correlate both as they are and after band-pass filtering, since smooth backgrounds correlate with
one another but contours don't.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pipeline import runs

SIDE = 32  # pixels, side of a thumbnail
COARSE = 8  # pixels, side of the color images used to find candidates
NEIGHBORS = 5  # candidates for each image
REACH = 4  # maximum shift of a duplicate, in thumbnail pixels
CORRELATION = 0.9  # minimum for near-duplicates
BLOCK = 2048  # images or pairs per batch


def near_duplicates(
    thumbnails: Tensor, features: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of images that are shifted, resized or recompressed copies.

    Args:
        thumbnails: uint8 (N, 3, SIDE, SIDE).
        features: float (N, D), compared by cosine similarity.

    Returns:
        Pairs of rows, int64 (P, 2), and their correlations (P,), highest first.
    """
    if len(thumbnails) < 2:
        return np.empty((0, 2), np.int64), np.empty(0)
    colors, images = [], []
    for part in thumbnails.split(BLOCK):
        coarse = F.avg_pool2d(part.float(), SIDE // COARSE).flatten(1)
        colors.append(coarse - coarse.mean(dim=1, keepdim=True))
        gray = part.float().mean(dim=1, keepdim=True)  # (B, 1, S, S)
        images.append(torch.cat([gray, _blur(gray, 3) - _blur(gray, 9)], dim=1))
    vectors = [torch.cat(colors)] + ([] if features is None else [features.float()])
    pairs = torch.cat([_neighbors(x) for x in vectors]).sort(dim=1).values.unique(dim=0)
    images = torch.cat(images)  # (N, 2, S, S)
    correlations = torch.cat([_correlate(images, part) for part in pairs.split(BLOCK)])
    order = correlations.argsort(descending=True)[: int((correlations >= CORRELATION).sum())]
    return pairs[order].numpy(), correlations[order].numpy()


def group(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return the group number of each image, int (count,), where pairs (P, 2) connect images."""
    graph = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _neighbors(vectors: Tensor) -> Tensor:
    """Pair each row of vectors (N, D) with its nearest ones by cosine: (N * NEIGHBORS, 2)."""
    device = runs.device()
    vectors = F.normalize(vectors, dim=1).to(device)
    count = min(NEIGHBORS + 1, len(vectors))  # including the image itself
    found = [(part @ vectors.T).topk(count).indices.cpu() for part in vectors.split(BLOCK)]
    first = torch.arange(len(vectors)).repeat_interleave(count)
    pairs = torch.stack([first, torch.cat(found).flatten()], dim=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _correlate(images: Tensor, pairs: Tensor) -> Tensor:
    """Align pairs (P, 2) of images (N, 2, S, S); return the lower correlation of both channels."""
    first, second = pairs.T
    spectrum = torch.fft.rfft2(images[first, 1]).conj() * torch.fft.rfft2(images[second, 1])
    match = torch.fft.irfft2(spectrum).roll((REACH + 2, REACH + 2), dims=(1, 2))  # by shift
    side, window = 2 * REACH + 1, slice(2, 2 * REACH + 3)
    best = match[:, window, window].flatten(1).argmax(dim=1)  # (P,)
    peak = torch.arange(len(pairs)), best // side + 2, best % side + 2
    sampled = []
    for axis in (1, 2):  # subpixel precision, by a Newton step from the peak
        slope = torch.gradient(match, dim=axis)[0]
        curve = torch.gradient(slope, dim=axis)[0][peak].clamp(max=-1e-6)
        shift = peak[axis] - REACH - 2 - (slope[peak] / curve).clamp(-0.5, 0.5)
        inner = torch.arange(REACH, SIDE - REACH) + shift[:, None]  # (P, I)
        sampled.append((2 * inner + 1) / SIDE - 1)  # from -1 to 1
    rows, columns = torch.broadcast_tensors(sampled[0][:, :, None], sampled[1][:, None, :])
    grid = torch.stack([columns, rows], dim=3)  # (P, I, I, 2)
    aligned = F.grid_sample(images[second], grid, padding_mode="border", align_corners=False)
    inside = images[first][:, :, REACH:-REACH, REACH:-REACH]
    a, b = (x.flatten(2) - x.flatten(2).mean(dim=2, keepdim=True) for x in (inside, aligned))
    return F.cosine_similarity(a, b, dim=2).amin(dim=1)


def _blur(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False)
