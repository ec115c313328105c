#!/usr/bin/env bash
# torchvision 0.29.1, torchvision.transforms.v2 on tv_tensors.KeyPoints, beside BoundingBoxes.
#
# Expected: a key point stays on its pixel, or, read as a place between pixels, within its box;
# two flips are the same as a rotation by 180 degrees, as they are for images and boxes.
# Seen: flips count pixels (x becomes W - 1 - x); rotations and affine transforms count places between
# pixels (x becomes W - x), as boxes do. So they differ by one pixel, and whichever a user means, one
# of the two leaves the pixel. The documentation does not say which is meant. No warning.
# The one white pixel of a map of 14 x 14, at (9, 4); a key point there, and one at its center:
#   horizontal flip: pixel (4, 4), key point (4.0, 4.0), center (3.5, 4.5), box 4.0 to 5.0
#   rotation by 180: pixel (4, 9), key point (5.0, 10.0), center (4.5, 9.5), box 4.0 to 5.0
#   both flips: pixel (4, 9), key point (4.0, 9.0), center (3.5, 8.5), box 4.0 to 5.0
# Why it matters here: on maps of patches, one step is 14 or 16 pixels. "Is the head in the region"
# and "how much attention gets the patch of the eye" are asked of a neighbor after one of the
# transforms. Use a box of one pixel instead of a key point; boxes are right in all of them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image, KeyPoints

SIDE, X, Y = 14, 9, 4
canvas = {"canvas_size": (SIDE, SIDE)}
map_ = Image(torch.zeros(1, SIDE, SIDE))
map_[0, Y, X] = 1
points = KeyPoints([[X, Y], [X + 0.5, Y + 0.5]], dtype=torch.float32, **canvas)
boxes = BoundingBoxes([[X, Y, X + 1.0, Y + 1.0]], format="XYXY", **canvas)
flip, flop = v2.RandomHorizontalFlip(p=1), v2.RandomVerticalFlip(p=1)
transforms = {
    "horizontal flip": flip,
    "rotation by 180": v2.RandomRotation((180, 180)),
    "both flips": v2.Compose([flip, flop]),
}
found = {}
for name, transform in transforms.items():
    moved, (point, center), (box,) = transform(map_, points, boxes)
    _, y, x = (int(index) for index in moved.nonzero()[0])
    found[name] = [(x, y), tuple(point.tolist()), tuple(center.tolist())]
    print("{}: pixel {}, key point {}, center {},".format(name, *found[name]), end=" ")
    print(f"box {float(box[0]):.1f} to {float(box[2]):.1f}")
    assert torch.allclose(box, torch.tensor([x, y, x + 1.0, y + 1.0]), atol=1e-4)
assert found["horizontal flip"] == [(4, 4), (4, 4), (3.5, 4.5)]
assert found["rotation by 180"] == [(4, 9), (5, 10), (4.5, 9.5)]
assert found["both flips"] == [(4, 9), (4, 9), (3.5, 8.5)]
PYTHON
