"""Named settings to start from: sizes of this workbench, two methods, and the paper's protocols.

A preset is the settings that differ from the defaults of `Config`. ``paper`` and ``released`` are
the two methods that the literature mixes up (see the README for every difference), free of dropout,
as they are compared with recorded numbers. A ``paper-...`` recipe is ``paper`` with all that was
done on one data set, to the step; its number is of the paper, or of tables that cite it. None of
them was run here: each takes hours on two GPUs.

    make run DATA=cub ROOT=path/to/CUB_200_2011 PRESET=paper-cub ARGS='processes=2'
"""

_TINY = {  # random weights, seconds: does every step run?
    "backbone": "test_vit",
    "pretrained": "none",
    "image_size": 64,
    "highres_size": 128,
    "frozen_blocks": 0,
    "epochs": 2,
}

_RELEASED = {
    "backbone": "vit_base_patch32_224",
    "image_size": 448,
    "highres_size": None,
    "crop_fraction": 448 / 600,
    "strength": "rollout_mean",
    "threshold": 1.2,
    "class_token": "per_scale",
    "loss": "first",
    "pos_embed_resize": "zoom",
    "final_norm": False,
    "legacy_boxes": True,
    "align_corners": True,
    "normalization": "imagenet",
    "sampling": "random",
    "head_lr_scale": 1.0,
    "optimizer": "momentum",  # plain SGD with momentum; timm's sgd is Nesterov's
    "learning_rate": 0.03,
    "weight_decay": 0.0,
    "warmup_steps": 500,
    "frozen_blocks": 0,
    "epochs": 27,  # about 10,000 steps of 16 on CUB's 5,994 training images
}

_PAPER = _RELEASED | {
    "backbone": "vit_base_patch16_224",
    "loss": "sum",
    "pos_embed_resize": "timm",
    "final_norm": True,
    "legacy_boxes": False,
    "align_corners": False,
}

_PROTOCOL = _PAPER | {
    "backbone": "vit_base_patch16_224.orig_in21k",  # Google's weights; or pretrained=ViT-B_16.npz
    "steps": 10_000,  # whatever the data set: 27 epochs of CUB, a quarter of one of iNaturalist
    "dropout": 0.1,
    "seed": 2,
    "validation_fraction": 0.0,  # all training images train; the last weights are those that count
    "workers": 4,  # JPEGs of 600 pixels and a GPU to feed
}

_RECIPES = {
    # Paper: 91.3 % (ViT-B/16 90.6). One standard error of 5,794 test images is 0.4 points.
    "paper-cub": {"data": "cub"},
    # No number is on record here.
    "paper-cars": {"data": "cars"},
    # Second-hand tables: 92.4 % (ViT-B/16 91.7).
    "paper-dogs": {"data": "dogs", "image_size": 224, "crop_fraction": 224 / 448},
    # No number is on record here.
    "paper-nabirds": {"data": "nabirds"},
    # No number is on record here; its policy of augmentation is AutoAugment's of ImageNet.
    "paper-inaturalist": {
        "data": "inaturalist",
        "image_size": 304,
        "crop_fraction": 304 / 400,
        "augment": "autoaugment",
    },
}

PRESETS: dict[str, dict] = {
    "small": {},  # the defaults: minutes on two CPU cores
    "tiny": _TINY,
    "released": _RELEASED,
    "paper": _PAPER,
    **{
        name: _PROTOCOL | {"root": f"data/{recipe['data']}"} | recipe
        for name, recipe in _RECIPES.items()
    },
}
