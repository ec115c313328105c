"""Writers of small datasets in every layout that has a reader."""

import json

import numpy as np
from PIL import Image
from scipy.io import savemat


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def write_cub(root, classes=("001.Crow", "002.Wren"), train=4, test=2, images=True):
    """A dataset in the CUB layout: ids from 1, boxes (1, 2, 3, 4) as x, y, width, height."""
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    number = 0
    for class_id, name in enumerate(classes, 1):
        for index in range(train + test):
            number += 1
            file = f"{name}/{name[4:]}_{index:04d}.jpg"
            lists["images"].append(f"{number} {file}")
            lists["image_class_labels"].append(f"{number} {class_id}")
            lists["train_test_split"].append(f"{number} {int(index < train)}")
            lists["bounding_boxes"].append(f"{number} 1.0 2.0 3.0 4.0")
            if images:
                write_image(root / "images" / file)
    lists["classes"] = [f"{class_id} {name}" for class_id, name in enumerate(classes, 1)]
    for name, lines in lists.items():
        write(root / f"{name}.txt", "\n".join(lines) + "\n")
    return root


def write_nabirds(root):
    write_cub(root, ["0817", "0085", "1010"], 2, 1)
    write(root / "classes.txt", "0 Birds\n3 Ducks\n85 Teal\n817 Titmouse\n1010 Grebe (Adult)\n")
    write(root / "hierarchy.txt", "3 0\n85 3\n817 0\n1010 3\n")
    labels = root / "image_class_labels.txt"
    ids = {"1": "817", "2": "85", "3": "1010"}
    pairs = [line.split() for line in labels.read_text().splitlines()]
    labels.write_text("".join(f"{image} {ids[class_id]}\n" for image, class_id in pairs))
    write(root / "sizes.txt", "".join(f"{image} 3 100\n" for image, _ in pairs))
    return root


def cars_records(count, with_class=True):
    fields = [(f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")]
    fields += [("class", object)] * with_class + [("fname", object)]
    rows = [
        (1, 2, 300 + row, 40, *((row % 2 + 1,) if with_class else ()), f"{row + 1:05d}.jpg")
        for row in range(count)
    ]
    return np.array(rows, dtype=fields)


def write_cars(root, labeled=True):
    (root / "devkit").mkdir(parents=True)
    names = np.array(["Acura RL Sedan 2012", "Audi TT"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": cars_records(4)})
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": cars_records(3, False)})
    if labeled:
        labels = {"annotations": cars_records(3)}
        savemat(root / "cars_test_annos_withlabels.mat", labels)
    for split, count in (("train", 4), ("test", 3)):
        for row in range(count):
            write(root / f"cars_{split}/{row + 1:05d}.jpg")
    return root


def write_dogs(root):
    for split, rows in (("train", (1, 2, 3)), ("test", (4,))):
        names = [f"n0208{c}-{c}_dog/n0208{c}_{row}" for c in "ab" for row in rows]
        listed = np.array([f"{name}.jpg" for name in names], dtype=object)
        values = {"file_list": listed, "annotation_list": np.array(names, dtype=object)}
        savemat(root / f"{split}_list.mat", values | {"labels": np.repeat([1, 2], len(rows))})
        for name in names:
            write(root / f"Images/{name}.jpg")
            small, large = ((5, 6, 9, 9), (11, 21, 40, 51))
            objects = "".join(
                f"<object><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
                f"<ymax>{y2}</ymax></bndbox></object>"
                for x1, y1, x2, y2 in (small, large)
            )
            size = "<size><width>50</width><height>45</height><depth>3</depth></size>"
            write(root / f"Annotation/{name}", f"<annotation>{size}{objects}</annotation>")
    return root


def inaturalist(rows, first_image):
    """COCO-style content whose annotations come in another order than its images."""
    images = [
        {"id": first_image + row, "file_name": f"train_val_images/{row}/{first_image}.jpg"}
        for row in range(len(rows))
    ]
    annotations = [
        {"id": row, "image_id": first_image + row, "category_id": category}
        for row, category in enumerate(rows)
    ]
    categories = [{"id": 7, "name": "Fern"}, {"id": 3, "name": "Moss"}, {"id": 40, "name": "Fox"}]
    return {"images": images, "annotations": annotations[::-1], "categories": categories}


def write_inaturalist(root, train=(40, 3, 7, 3), val=(7, 40)):
    for name, rows, first in (("train2017", train, 100), ("val2017", val, 500)):
        content = inaturalist(rows, first)
        write(root / f"{name}.json", json.dumps(content))
        for image in content["images"]:
            write(root / image["file_name"])
    return root


def write_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    write(data / "variants.txt", "707-320\nDC-9-30\nCessna 172\n")
    boxes = []
    for number, split in enumerate(("train", "val", "test")):
        names = ("Cessna 172", "707-320", "DC-9-30")
        lines = [f"{number}{row:06d} {name}" for row, name in enumerate(names)]
        write(data / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
        for line in lines:
            write(data / f"images/{line.split()[0]}.jpg")
            boxes.append(f"{line.split()[0]} 3 144 998 431")
    write(data / "images_box.txt", "\n".join(boxes))
    return root


def write_folder(root, **classes):
    for name, count in classes.items():
        for index in range(count):
            write_image(root / name / f"photo{index}.png")
    return root
