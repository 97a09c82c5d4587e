"""Find exact and near-duplicates among images, by thumbnails.

Candidates for near-duplicates (Barz & Denzler 2020, arXiv:1902.00423) are nearest neighbors by
low-resolution colors, and by features where a model gives them. A pair counts if the images
correlate once they are aligned, both as they are and band-passed: a smooth background correlates
with any other, contours don't.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

SIDE = 32  # pixels, of a thumbnail
COARSE = 8  # pixels, of the colors that candidates are found by
NEIGHBORS = 5  # candidates for each image
REACH = 4  # pixels of a thumbnail that a duplicate may be shifted by
CORRELATION = 0.9  # of near-duplicates, at least
BLOCK = 2048  # images or pairs at once


def near_duplicates(
    thumbnails: Tensor, features: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of images that are shifted, resized or recompressed copies.

    Args:
        thumbnails: uint8 (N, 3, SIDE, SIDE).
        features: float (N, D), compared by cosine.

    Returns:
        Pairs of rows int64 (P, 2), and their correlations (P,), the highest first.
    """
    colors = [F.avg_pool2d(part.float(), SIDE // COARSE).flatten(1) for part in _blocks(thumbnails)]
    gray = torch.cat([part.float().mean(dim=1) for part in _blocks(thumbnails)])  # (N, S, S)
    colors = torch.cat(colors)
    candidates = [_neighbors(colors - colors.mean(dim=1, keepdim=True))]
    if features is not None:
        candidates.append(_neighbors(features.float()))
    pairs = torch.unique(torch.cat(candidates).sort(dim=1).values, dim=0)  # (P, 2)
    band = torch.cat([_blur(part, 3) - _blur(part, 9) for part in _blocks(gray)])
    images = torch.stack([gray, band], dim=1)  # (N, 2, S, S)
    correlations = torch.cat([_correlate(images, part) for part in _blocks(pairs)])
    order = correlations.argsort(descending=True)[: int((correlations >= CORRELATION).sum())]
    return pairs[order].numpy(), correlations[order].numpy()


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return pairs of rows int64 (P, 2) that connect all images of the same hash (N,)."""
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def group(pairs: np.ndarray, count: int) -> np.ndarray:
    """Number the groups of images that pairs (P, 2) connect: int (count,)."""
    graph = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _neighbors(vectors: Tensor) -> Tensor:
    """Pairs of each row of vectors (N, D) with its NEIGHBORS by cosine, (N * NEIGHBORS, 2)."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    vectors = F.normalize(vectors, dim=1).to(device)
    count = min(NEIGHBORS + 1, len(vectors))  # the image itself among them
    found = torch.cat([(part @ vectors.T).topk(count).indices for part in _blocks(vectors)]).cpu()
    pairs = torch.stack([torch.arange(len(found))[:, None].expand_as(found), found], dim=2)
    pairs = pairs.flatten(0, 1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _correlate(images: Tensor, pairs: Tensor) -> Tensor:
    """The lower correlation of the two channels (N, 2, S, S) of pairs (P, 2), aligned: (P,)."""
    first, second = pairs.T
    spectrum = [torch.fft.rfft2(images[rows, 1]) for rows in (first, second)]
    match = torch.fft.irfft2(spectrum[0].conj() * spectrum[1])  # (P, S, S), by shift
    match = match.roll((REACH + 1, REACH + 1), dims=(1, 2))[:, : 2 * REACH + 3, : 2 * REACH + 3]
    side, best = 2 * REACH + 1, match[:, 1:-1, 1:-1].flatten(1).argmax(dim=1)  # (P,)
    peak = torch.arange(len(pairs)), best // side + 1, best % side + 1
    inner, shifted = torch.arange(REACH, SIDE - REACH), []
    for axis in (1, 2):  # to a fraction of a pixel, by a parabola through the peak
        low, high = (
            match[peak[0], peak[1] + step * (axis == 1), peak[2] + step * (axis == 2)]
            for step in (-1, 1)
        )
        fraction = (high - low) / (4 * match[peak] - 2 * low - 2 * high).clamp(min=1e-6)
        shift = peak[axis] - REACH - 1 + fraction.clamp(-0.5, 0.5)
        shifted.append((2 * (inner + shift[:, None]) + 1) / SIDE - 1)  # (P, I), from -1 to 1
    rows, columns = shifted[0][:, :, None], shifted[1][:, None, :]
    grid = torch.stack(torch.broadcast_tensors(columns, rows), dim=3)  # (P, I, I, 2)
    aligned = F.grid_sample(images[second], grid, padding_mode="border", align_corners=False)
    inside = images[first][:, :, REACH:-REACH, REACH:-REACH]
    a, b = (x.flatten(2) - x.flatten(2).mean(dim=2, keepdim=True) for x in (inside, aligned))
    return F.cosine_similarity(a, b, dim=2).amin(dim=1)


def _blur(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False)


def _blocks(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(BLOCK)
