"""RAMS-Trans once more, loop by loop, from the paper's equations (docs/method.md) and nothing else.

Slow, plain numpy in float64; shares no code with ramslib. Tests compare the library with it.
Boxes are ``(top, left, bottom, right)``, bottom and right exclusive.
"""

import math

import numpy as np


def attention_probabilities(query, key, scale, bias=None):
    """Softmax of scaled inner products: (B, A, N, D), (B, A, N, D) -> (B, A, N, N)."""
    batch, heads, tokens, _ = query.shape
    result = np.zeros((batch, heads, tokens, tokens))
    bias = np.zeros((1, 1, 1, 1)) if bias is None else bias
    bias = np.broadcast_to(bias, result.shape)
    for b in range(batch):
        for a in range(heads):
            for i in range(tokens):
                logits = [
                    float(np.dot(query[b, a, i], key[b, a, j])) * scale + bias[b, a, i, j]
                    for j in range(tokens)
                ]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                result[b, a, i] = [weight / sum(weights) for weight in weights]
    return result


def rollout(blocks):
    """Equations 7 to 9 with full matrices: L x (A, N, N), first block first -> (N, N)."""
    product = np.eye(blocks[0].shape[-1])
    for probabilities in blocks:
        matrix = probabilities.mean(axis=0) + np.eye(len(product))
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
        product = matrix @ product
    return product


def strength(blocks, name, grid, class_index=0):
    """Attention strength of one image: L x (A, N, N) -> (h, w)."""
    if name == "rollout_mean":
        tokens = rollout(blocks).mean(axis=0)
    elif name == "rollout_class":
        tokens = rollout(blocks)[class_index]
    elif name == "last_class":
        tokens = blocks[-1].mean(axis=0)[class_index]
    elif name == "last_blocks_mean":  # not of the paper
        rows = [block.mean(axis=0)[class_index] for block in blocks[-3:]]
        tokens = sum(rows) / len(rows)
    return tokens[len(tokens) - grid[0] * grid[1] :].reshape(grid)


def token_contrast(tokens, weights):
    """Cosine to the weighted mean of unit tokens minus that to the border's: (h, w, D), (h, w)."""
    height, width, size = tokens.shape
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    attended, border = np.zeros(size), np.zeros(size)
    for row in range(height):
        for column in range(width):
            attended += weights[row, column] * unit[row, column]
            if row in (0, height - 1) or column in (0, width - 1):
                border += unit[row, column]
    values = unit @ attended / np.linalg.norm(attended) - unit @ border / np.linalg.norm(border)
    return values - values.min()


def patch_mask(values, threshold):
    """Patches above threshold times the mean; none where a value is not finite."""
    height, width = values.shape
    mask = np.zeros((height, width), dtype=bool)
    if not all(math.isfinite(value) for value in values.ravel()):
        return mask
    mean = sum(float(value) for value in values.ravel()) / (height * width)
    for row in range(height):
        for column in range(width):
            mask[row, column] = values[row, column] > threshold * mean
    return mask


def components(mask):
    """8-connected components, by first patch in reading order: list of sets of (row, column)."""
    height, width = mask.shape
    found, seen = [], set()
    for row in range(height):
        for column in range(width):
            if not mask[row, column] or (row, column) in seen:
                continue
            component, border = set(), [(row, column)]
            while border:
                r, c = border.pop()
                inside = 0 <= r < height and 0 <= c < width
                if not inside or not mask[r, c] or (r, c) in component:
                    continue
                component.add((r, c))
                border += [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]
            seen |= component
            found.append(component)
    return found


def largest_component(mask):
    """Mask of the component with most patches, the first one on a tie; empty stays empty."""
    result = np.zeros(mask.shape, dtype=bool)
    best = set()
    for component in components(mask):
        if len(component) > len(best):
            best = component
    for row, column in best:
        result[row, column] = True
    return result


def bounding_box(mask):
    """Smallest box around a mask, the whole grid around an empty one."""
    patches = [(row, column) for row, column in np.ndindex(*mask.shape) if mask[row, column]]
    if not patches:
        return (0, 0, *mask.shape)
    rows, columns = zip(*patches, strict=True)
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


def propose(values, threshold):
    """The DPPM for one image: (h, w) -> box in patches."""
    return bounding_box(largest_component(patch_mask(values, threshold)))


def resize(image, size, align_corners=False):
    """Bilinear resize of one image, pixel by pixel: (C, H, W) -> (C, *size)."""
    channels, height, width = image.shape
    result = np.zeros((channels, *size))
    for row in range(size[0]):
        y, fy = _position(row, height, size[0], align_corners)
        y2 = min(y + 1, height - 1)
        for column in range(size[1]):
            x, fx = _position(column, width, size[1], align_corners)
            x2 = min(x + 1, width - 1)
            upper = (1 - fx) * image[:, y, x] + fx * image[:, y, x2]
            lower = (1 - fx) * image[:, y2, x] + fx * image[:, y2, x2]
            result[:, row, column] = (1 - fy) * upper + fy * lower
    return result


def _position(index, old, new, align_corners):
    """Where an output pixel lies in the input: whole part and fraction, kept inside the image."""
    if align_corners:
        position = index * (old - 1) / max(new - 1, 1)
    else:
        position = (index + 0.5) * old / new - 0.5
    position = min(max(position, 0), old - 1)
    whole = int(math.floor(position))
    return whole, position - whole


def crop_and_resize(image, box, size, align_corners=False):
    """Cut whole pixels out of one image and resize them: (C, H, W) -> (C, *size)."""
    top, left, bottom, right = (int(side) for side in box)
    return resize(image[:, top:bottom, left:right], size, align_corners)


def chosen_patches(blocks, grid):
    """TransFG's part selection for one image: L - 1 x (A, N, N), first block first -> (A,)."""
    chosen = []
    for head in range(len(blocks[0])):
        product = np.eye(blocks[0].shape[-1])
        for probabilities in blocks:
            product = probabilities[head].astype(np.float64) @ product
        row = product[0][len(product) - grid[0] * grid[1] :]
        best = 0
        for patch, value in enumerate(row):
            best = patch if value > row[best] else best
        chosen.append(best)
    return chosen


def contrastive(features, labels, margin):
    """TransFG's loss over all ordered pairs of a batch: (B, D), (B,) -> float."""
    total = 0.0
    for one, label in zip(features, labels, strict=True):
        for two, other in zip(features, labels, strict=True):
            lengths = math.sqrt(sum(v * v for v in one)) * math.sqrt(sum(v * v for v in two))
            cosine = sum(a * b for a, b in zip(one, two, strict=True)) / lengths
            total += 1 - cosine if label == other else max(0.0, cosine - margin)
    return total / len(features) ** 2


def place(box, size, frame):
    """A box measured in a frame of ``size`` units, in the units that the frame is given in."""
    height, width = frame[2] - frame[0], frame[3] - frame[1]
    return (
        frame[0] + box[0] / size[0] * height,
        frame[1] + box[1] / size[1] * width,
        frame[0] + box[2] / size[0] * height,
        frame[1] + box[3] / size[1] * width,
    )


def cross_entropy(logits, labels):
    """Mean over images of minus the log softmax of the label: (B, K), (B,) -> float."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        top = max(float(value) for value in row)
        total = sum(math.exp(float(value) - top) for value in row)
        losses.append(math.log(total) - (float(row[label]) - top))
    return sum(losses) / len(losses)


def recursion(run, image, grid, scales, thresholds, high_res=None):
    """The whole method for one image.

    Args:
        run: function (input (C, H, W), scale) -> (logits, strength (h, w)).
        image: (C, H, W).
        grid: (h, w).
        scales: S.
        thresholds: S - 1 numbers.
        high_res: (C, Hs, Ws) the same image with more pixels, or None. Only boxes that fall on
            whole pixels can be cut here.

    Returns:
        Logits and boxes (pixels of ``image``), one per scale.
    """
    size = image.shape[1:]
    crop, box = image, (0, 0, *size)
    logits, boxes = [], []
    for scale in range(scales):
        scores, values = run(crop, scale)
        logits.append(scores)
        boxes.append(box)
        if scale == scales - 1:
            return logits, boxes
        inside = place(propose(values, thresholds[scale]), grid, (0, 0, *size))
        box = place(inside, size, box)
        if high_res is None:
            crop = crop_and_resize(crop, [round(side) for side in inside], size)
        else:
            cut = place(box, size, (0, 0, *high_res.shape[1:]))
            crop = crop_and_resize(high_res, [round(side) for side in cut], size)
