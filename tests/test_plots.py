"""Figures: what is drawn is what was given, in one style that does not leak."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.font_manager import fontManager
from PIL import Image
from tiny import draw_photos

from ramslib import plots
from ramslib.data.datasets import read_table
from ramslib.data.transforms import ImageTransform
from ramslib.dppm import propose
from ramslib.evaluation import confusion_matrix, expected_calibration_error, predict
from ramslib.model import ProposalSettings, RAMSTrans
from ramslib.plots import drawing, images

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))


@pytest.fixture
def strength():
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def predictions():
    """Two views of twelve images of three classes."""
    draw = np.random.default_rng(2)
    rows = []
    for index in range(12):
        for scale in ("scale 1", "scale 2"):
            label, given = index % 3, int(draw.integers(3))
            rows.append((f"{index}.jpg", label, scale, given, draw.uniform(0.3, 1), given != label))
    names = ["path", "label", "output", "prediction", "confidence", "rank"]
    return pd.DataFrame(rows, columns=names).astype({"rank": int})


@pytest.fixture
def metrics():
    rows = []
    for step in range(1, 21):
        losses = {"loss_1": 2 / step, "loss_2": 1 / step}
        rows.append({"step": step, "epoch": 1 + step // 11, "split": "train", **losses})
    for epoch in (1, 2):
        for scale, top1 in (("scale 1", 40.0), ("mean softmax", 50.0)):
            row = {"epoch": epoch, "step": 10 * epoch, "split": "validation", "output": scale}
            rows.append(row | {"top1": top1 + epoch, "standard_error": 3.0})
    return pd.DataFrame(rows)


def rectangles(ax):
    """(top, left, bottom, right) and color of each colored rectangle."""
    found = []
    for patch in ax.patches:
        left, top = patch.get_xy()
        box = (
            top + 0.5,
            left + 0.5,
            top + patch.get_height() + 0.5,
            left + patch.get_width() + 0.5,
        )
        if to_hex(patch.get_edgecolor()) != "#000000":
            found.append((tuple(np.round(box, 4)), to_hex(patch.get_edgecolor())))
    return found


def test_style_does_not_leak_and_a_switched_on_display_stays_on(metrics):
    matplotlib.interactive(True)
    before = dict(matplotlib.rcParams)
    ax = plots.plot_learning(metrics)[0]
    assert not ax.spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before

    @drawing.styled
    def choose_backend():
        matplotlib.interactive(False)

    choose_backend()
    assert not matplotlib.is_interactive()


def test_vector_files_hold_real_text(tmp_path, metrics):
    with plt.rc_context(plots.STYLE):
        figure = plots.plot_learning(metrics)[0].figure
        figure.savefig(tmp_path / "loss.svg")
    assert "loss (nats)</text>" in (tmp_path / "loss.svg").read_text()


def test_each_scale_has_its_own_color_everywhere():
    names = [f"scale {n}" for n in range(1, 5)] + ["mean softmax", "mean logits"]
    assert len({drawing.output_color(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", [drawing.HEATMAP_CMAP, plots.CMAP])
def test_color_maps_get_steadily_lighter(name):
    colors = matplotlib.colormaps[name](np.linspace(0, 1, 32))[:, :3]
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    assert (np.diff(linear @ (0.2126, 0.7152, 0.0722)) > 0).all()


def test_images_of_either_kind_are_drawn_alike(photo):
    pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)
    for image in (photo, pixels):
        assert np.array_equal(drawing.to_pil(image), photo)
    assert drawing.to_pil(photo.convert("L")).mode == "RGB"


def test_class_names_of_any_script_are_drawn_or_warned_of_once(monkeypatch):
    drawing._warn_of_missing_glyphs.cache_clear()
    monkeypatch.setattr(drawing, "_drawable", lambda: frozenset("abc "))
    with pytest.warns(UserWarning, match="install") as caught:
        assert drawing.clean_class_name("001.a_\u9e1f") == "a \u9e1f"
        drawing.clean_class_name("\u732b")
        ax = plt.figure().subplots()
        ax.set_title("\u9e1f\u732b")
        ax.figure.canvas.draw()
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_class_names_that_are_no_unicode_are_drawn():
    name = drawing.clean_class_name(b"h\xe9ron_gris".decode(errors="surrogateescape"))
    assert name == "h?ron gris"
    file = b"\xe9.png".decode(errors="surrogateescape")
    plots.plot_image(Image.new("RGB", (9, 9)), title=file).figure.canvas.draw()


def test_fonts_of_the_style_are_installed_and_fall_back():
    families = drawing.STYLE["font.family"]
    assert families[0] == "DejaVu Sans"
    assert set(families) <= set(fontManager.get_font_names())


def test_heat_is_the_color_map_at_the_share_of_the_maximum(strength):
    black = Image.new("RGB", (8, 6))
    heat = np.asarray(drawing.draw_strength(black, strength, opacity=1))
    for y in range(6):
        for x in range(8):
            share = strength[y // 2, x // 2] / strength.max()
            expected = matplotlib.colormaps["inferno"](float(share), bytes=True)[:3]
            assert np.abs(heat[y, x].astype(int) - expected).max() <= 2
    assert np.array_equal(drawing.draw_strength(black, strength, opacity=0), black)


def test_nan_and_constant_strength_are_drawn(photo):
    for values in (torch.full((3, 4), torch.nan), torch.zeros(3, 4)):
        assert drawing.draw_strength(photo, values).size == photo.size


def test_mask_keeps_the_component_bright_and_outlines_it():
    gray = Image.new("RGB", (40, 30), (200, 200, 200))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    component = mask.clone()
    component[0, 3] = False
    painted = np.asarray(drawing.draw_mask(gray, mask, component, "#ff0000"))
    centers = painted[5::10, 5::10, 0]
    assert (centers[component] == 200).all()
    assert (centers[~mask] < centers[0, 3]).all() and centers[0, 3] < 200
    red = (painted == (255, 0, 0)).all(axis=2)
    assert red[10, 2:8].all() and red[12:18, 10].all() and red[2:8, 20].all()
    assert not red[25:, :].any() and not red[2:8, 8:13].any()


def test_boxes_are_painted_inside_their_edges():
    blank = Image.new("RGB", (100, 80), "white")
    painted = np.asarray(drawing.draw_box(blank, (10, 20, 60, 90), "#0072b2"))
    changed = (painted != 255).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (10, 60, 20, 90)
    assert not changed[20:50, 30:80].any()
    dashed = np.asarray(drawing.draw_box(blank, (10, 20, 60, 90), "#0072b2", dashed=True))
    blue = [(image == (0, 114, 178)).all(axis=2).sum() for image in (painted, dashed)]
    assert 0.3 * blue[0] < blue[1] < 0.7 * blue[0]
    assert np.array_equal(drawing.draw_box(blank, (3, 3, 4, 4), "red"), blank), "too small"


def test_photo_has_the_boxes_at_their_places(photo):
    boxes = {"scale 2": (10, 20, 30, 40), "scale 3": (12.5, 22, 20, 30)}
    ax = plots.plot_image(photo, boxes, truth=(1, 2, 50, 70), title="a bird")
    expected = [(box, drawing.output_color(name)) for name, box in boxes.items()]
    assert rectangles(ax) == [*expected, ((1, 2, 50, 70), drawing.ANNOTATION_COLOR)]
    assert ax.get_title(loc="left") == "a bird"
    assert rectangles(plots.plot_image(photo, truth=[np.nan] * 4)) == []


def test_strength_bar_is_in_multiples_of_the_mean(photo, strength):
    ax = plots.plot_strength(photo, strength, threshold=1.2)
    bar = ax.figure.axes[1]
    assert "mean strength" in bar.get_ylabel()
    assert bar.get_ylim() == pytest.approx((0, float((strength / strength.mean()).max())))
    heat = ax.images[-1].get_array()
    assert np.allclose(heat, strength / strength.mean())
    assert bar.lines[-1].get_ydata()[0] == 1.2


def test_mask_box_encloses_the_component(photo, strength):
    proposal = propose(strength[None], 1.1)
    ax = plots.plot_mask(photo, proposal, scale=3)
    component = proposal.component[0].nonzero()
    top, left = component.min(dim=0).values * 20
    bottom, right = (component.max(dim=0).values + 1) * 20
    assert rectangles(ax) == [((top, left, bottom, right), drawing.output_color("scale 3"))]


def test_likeliest_classes_and_the_true_one():
    views = {
        "scale 1": torch.tensor([0.5, 0.1, 0.3, 0.1]),
        "scale 2": torch.tensor([0.2, 0.1, 0.7, 0]),
    }
    classes = ["001.Black_bird", "robin", "tit", "wren"]
    table = images.top_classes(views, classes, label=3, count=2)
    assert table.index.tolist() == ["tit", "wren ✓"]
    assert table.to_numpy().flatten().tolist() == pytest.approx([0.3, 0.7, 0.1, 0])
    ax = plots.plot_probabilities(views, classes, label=0)
    assert [text.get_text() for text in ax.get_yticklabels()][:2] == ["tit", "Black bird ✓"]
    widths = sorted(round(bar.get_width(), 3) for bar in ax.patches if bar.get_width() > 0)
    assert widths == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.5, 0.7])


def two_regions(strength, threshold, recorded=None):
    """Two regions of each image: its upper and its lower half."""
    height, width = strength.shape[1:]
    halves = [[0, 0, height // 2, width], [height // 2, 0, height, width]]
    return torch.tensor(halves).expand(len(strength), 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scales", "proposal"), [(1, "attention"), (2, two_regions), (3, "random")]
)
def test_recursion_of_any_number_of_scales_and_regions(backbone_of, scales, proposal):
    settings = ProposalSettings((1.0,) * (scales - 1), proposal=proposal, scales=scales)
    model = RAMSTrans(backbone_of("vit"), 3, settings, per_scale_token=False).eval()
    pixels = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    with torch.inference_mode():
        outputs = list(model.forward_scales(pixels))
    truths = torch.full((2, 4), torch.nan)
    axes = plots.plot_recursion(outputs, pixels, model, ["a", "b", "c"], [0, None], truths)
    assert axes.shape == (2, 2 + 3 * (scales - 1))
    boxes = [(2 * output.boxes[len(output.boxes) // 2 :]) for output in outputs[1:]]
    drawn = [box for box, _ in rectangles(axes[1, 0])]
    assert np.allclose(np.ravel(drawn), np.ravel(torch.cat(boxes)) if boxes else [], atol=1e-3)
    for number, output in enumerate(outputs[1:], start=1):
        shown = axes[1, 3 * number].images[0].get_array()
        crop = model.denormalize(output.input[len(output.input) // 2])
        assert np.array_equal(shown, crop.permute(1, 2, 0))
    assert [ax.get_title(loc="left") for ax in axes[:, 0]] == ["a", "image"]
    assert all(ax.get_title(loc="left") for ax in axes.flat)
    assert plots.plot_recursion(outputs, pixels, model).shape == (2, 1 + 3 * (scales - 1))


def test_patch_grid_has_a_line_between_patches(photo):
    ax = plots.plot_patch_grid(photo, (3, 4))
    lines = [segment for group in ax.collections for segment in group.get_segments()]
    rows = {line[0, 1] for line in lines if line[0, 1] == line[1, 1]}
    columns = {line[0, 0] for line in lines if line[0, 0] == line[1, 0]}
    assert sorted(rows) == [19.5, 39.5] and sorted(columns) == [19.5, 39.5, 59.5]


def test_attention_is_drawn_with_queries_as_rows():
    matrix = torch.rand(5, 5).softmax(dim=-1)
    ax = plots.plot_attention(matrix)
    assert np.allclose(ax.images[0].get_array(), matrix) and ax.get_ylim() == (4.5, -0.5)


def test_build_up_has_one_map_per_block(photo):
    axes = list(plots.plot_strength_per_block(torch.rand(7, 3, 4), photo))
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles[:7] == [f"block {n}" for n in range(1, 8)]


def test_samples_show_every_class_in_turn(tmp_path):
    table = read_table("folder", draw_photos(tmp_path / "photos"), 0.2)
    axes = plots.plot_samples(table, rows=1, columns=3)
    assert sorted(ax.get_title(loc="left") for ax in axes.flat) == ["bird 0", "bird 1", "bird 2"]


def test_every_kind_of_problem_has_its_pictures(tmp_path):
    root = draw_photos(tmp_path / "photos")
    paths = [str(path) for path in sorted((root / "train").rglob("*.png"))]
    Path(paths[0]).write_text("no image")
    rows = [
        ("unreadable", "", "", paths[0], "not an image"),
        ("few to test", "", "", "", "crow: 1"),
    ]
    rows += [("odd", "", "", path, "blank") for path in paths[1:12]]
    rows += [
        ("duplicate", "splits", paths[g], paths[g + i], "train, a")
        for g in (3, 9, 15)
        for i in (0, 1)
    ]
    problems = pd.DataFrame(rows, columns=["kind", "across", "group", "path", "detail"])
    titles = [[ax.get_title(loc="left") for ax in row] for row in plots.plot_problems(problems)]
    kinds = [[title.split("\n")[0] for title in row] for row in titles]
    assert kinds[:3] == [["unreadable", "", "", ""], ["odd"] * 4, ["odd"] * 4]
    assert kinds[3:] == [["duplicate", "duplicate", "", ""]] * 2, "two groups at most"
    assert titles[0][0] == "unreadable\n0.png" and titles[1][0] == "odd\nblank"
    assert plots.plot_problems(problems[:0]).shape == (1, 4)
    plt.close("all")


def test_class_balance_counts_images():
    table = pd.DataFrame({"label": [0, 0, 1, 1, 1], "split": ["train", "test", *["train"] * 3]})
    ax = plots.plot_class_balance(table)
    assert [bar.get_height() for bar in ax.patches] == [1, 3, 1, 0]
    assert ax.get_ylabel() == "images"


def test_learning_curves_show_the_log(metrics):
    loss, accuracy = plots.plot_learning(metrics)
    assert loss.lines[0].get_ydata().tolist() == (2 / np.arange(1, 21)).tolist()
    assert loss.lines[3].get_ydata()[1] == pytest.approx((1 + 1 / 2) / 2), "running mean"
    lines = {line.get_label(): line for line in accuracy.lines}
    assert set(lines) == {"scale 1", "mean softmax"}
    assert lines["mean softmax"].get_ydata().tolist() == [51, 52]
    assert len({line.get_marker() for line in lines.values()}) == 2, "told apart without color"
    plots.plot_learning(pd.DataFrame())  # a run that has logged nothing yet


def test_ablation_draws_mean_and_interval():
    rows = [(n, view, 60 + n, 2.0, 3) for n in (1, 2) for view in ("scale 1", "mean softmax")]
    summary = pd.DataFrame(rows, columns=["scales", "output", "mean", "half_width", "runs"])
    ax = plots.plot_ablation(summary, "scales")
    ends = [sorted(x for x, _ in segment) for c in ax.collections for segment in c.get_segments()]
    assert sorted(ends) == [[59, 63], [59, 63], [60, 64], [60, 64]]
    assert "95 %" in ax.get_title(loc="left") and ax.get_xlabel() == "accuracy (%)"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "2"]
    difference = plots.plot_ablation(summary, "scales", label="difference")
    assert any(set(line.get_xdata()) == {0} for line in difference.lines), "the baseline"
    single = plots.plot_ablation(summary.assign(runs=1, half_width=np.nan), "scales")
    assert "no interval" in single.get_title(loc="left")


def test_differences_draw_their_own_interval_and_name_seeds_where_several():
    columns = ["method", "output", "seed", "difference", "low", "high"]
    rows = [
        ("TransFG", "scale 1", 0, 2.0, -1.0, 4.5),
        ("RAMS-Trans", "scale 2", 1, -3.0, -5.0, 0.0),
    ]
    ax = plots.plot_differences(pd.DataFrame(rows, columns=columns), "equal time")
    ends = [sorted(x for x, _ in segment) for c in ax.collections for segment in c.get_segments()]
    assert sorted(ends) == [[-5, 0], [-1, 4.5]]
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["TransFG, seed 0", "RAMS-Trans, seed 1"]
    assert ax.get_title(loc="left") == "equal time"
    single = plots.plot_differences(pd.DataFrame(rows[:1], columns=columns))
    assert [text.get_text() for text in single.get_yticklabels()] == ["TransFG"]


def test_threshold_curves_and_stored_accuracies():
    curve = pd.DataFrame({"threshold": [0.0, 1.0], "area": [1.0, 0.4], "iou": [0.2, 0.7]})
    accuracy = pd.DataFrame({"threshold": [1.0], "output": ["scale 2"], "top1": [80.0]})
    ax = plots.plot_threshold(curve, mark=1.0, accuracy=accuracy)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert lines["area of the box (share of the image)"].tolist() == [1, 0.4]
    assert lines["IoU with the annotated box"].tolist() == [0.2, 0.7]
    assert lines["accuracy, scale 2"].tolist() == [0.8]
    assert ax.get_xlabel() == "threshold (× mean strength)"


def test_heat_map_annotates_means():
    rows = [(s, t, 60 + s + t) for s in (1, 2) for t in (0.8, 1.2)] + [(2, 1.2, 73.2)]
    table = pd.DataFrame(rows, columns=["scales", "threshold", "top1"])
    ax = plots.plot_heat_map(table, "scales", "threshold", "top1")
    assert [text.get_text() for text in ax.texts] == ["61.8", "62.2", "62.8", "68.2"]


def test_confusion_shows_the_counts(predictions):
    counts = confusion_matrix(predictions, 3, "scale 2")
    ax = plots.plot_confusion(predictions, ["a", "b", "c"], "scale 2")
    drawn = [int(text.get_text() or 0) for text in ax.texts]
    assert drawn == counts.to_numpy().flatten().tolist()
    few = plots.plot_confusion(predictions, ["a", "b", "c"], "scale 2", limit=2)
    names = [text.get_text() for text in few.get_yticklabels()]
    assert names == ["abc"[label] for label in confusion_matrix(predictions, 3, "scale 2", 2)]


def test_reliability_shows_the_calibration_error(predictions):
    ax = plots.plot_reliability(predictions, "scale 1", bins=10)
    rows = predictions[predictions["output"] == "scale 1"]
    error = 100 * expected_calibration_error(rows["confidence"], rows["rank"] == 0)
    assert f"{error:.1f} points" in ax.get_title(loc="left")
    x, y = ax.collections[0].get_offsets().T
    tenth = (rows["confidence"] * 10).astype(int)
    assert sorted(x) == pytest.approx(sorted(rows["confidence"].groupby(tenth).mean()))
    assert sorted(y) == pytest.approx(sorted((rows["rank"] == 0).groupby(tenth).mean()))


@pytest.mark.slow
def test_story_shows_correct_images_of_different_classes(tmp_path, backbone_of, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    from draw_story import choose_images, draw_story

    table = read_table("folder", draw_photos(tmp_path / "photos"), 0.2)
    model = RAMSTrans(backbone_of("vit"), 3, per_scale_token=False).eval()
    torch.nn.init.normal_(model.classifier.weight)
    transform = ImageTransform((48, 64))
    predictions = predict(model, table[table["split"] == "test"], transform)
    chosen = choose_images(predictions, 2)
    rows = predictions[predictions["path"].isin(chosen)]
    assert (rows.loc[rows["output"].isin(["scale 2", "mean logits"]), "rank"] == 0).all()
    assert 1 <= len(chosen) <= 2 and rows.groupby("label")["path"].nunique().max() == 1
    loaded = SimpleNamespace(model=model, table=table, transform=transform, classes=list("abc"))
    assert draw_story(loaded, tmp_path / "story.png", 2) == chosen
    with Image.open(tmp_path / "story.png") as drawn:
        assert drawn.format == "PNG" and 1000 < drawn.width <= 1300
