"""The benchmarks run, and what they compare with computes the same; nothing is timed here."""

import copy

import pandas as pd
import pytest
import torch
from tiny import draw_photos, tiny_config

from benchmarks import curves, figures
from benchmarks.__main__ import main
from benchmarks.literal import LiteralRAMS
from benchmarks.step import build, in_own_process, training_step
from benchmarks.timing import is_met, ratios, row
from ramslib.training.trainer import train

TINY = "--backbones test_vit test_vit --repeats 1 --threads 1 --size 32 --batches 1 2".split()


def opinionated(scales):
    torch.manual_seed(0)
    model = build("test_vit", 64, scales)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("scales", [2, 3])
def test_the_literal_implementation_computes_the_same(scales):
    model = opinionated(scales)
    literal = LiteralRAMS(copy.deepcopy(model.backbone), copy.deepcopy(model.classifier), scales)
    pixels = torch.rand(3, 3, 64, 64)
    output = model(pixels)
    assert len(output.boxes[1].unique(dim=0)) > 1, "scale 2 sees a part of the image"
    for one, other in zip(literal(model.preprocess(pixels)[0]), output.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_all_ways_to_train_take_the_same_step():
    model, pixels = opinionated(2).eval(), torch.rand(3, 3, 64, 64)
    normalized = model.preprocess(pixels)[0]
    literal = LiteralRAMS(copy.deepcopy(model.backbone), copy.deepcopy(model.classifier), 2)
    for each, way, images in ((model, "workbench", pixels), (literal, "literal", normalized)):
        before = each.classifier.weight.clone()
        training_step(each, way, images, 2)()
        assert not torch.equal(each.classifier.weight, before)
    theirs = dict(literal.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, atol=1e-5, rtol=1e-3)


def test_a_step_in_a_process_of_its_own():
    told = in_own_process("literal", backbone="test_vit", size=64, steps=1, threads=1)
    assert told["seconds"] > 0 and 1 < told["MB"] < 2000


def test_a_process_that_fails_tells_why():
    with pytest.raises(RuntimeError, match="invalid choice: 'imagined'"):
        in_own_process("imagined")


def test_the_table(tmp_path, capsys, monkeypatch):
    for module in (figures, curves):  # the processes themselves: above
        monkeypatch.setattr(module, "in_own_process", lambda *_, **__: {"seconds": 1.0, "MB": 2.0})
    photos = draw_photos(tmp_path / "photos")
    run = train(tiny_config(photos, epochs=1), tmp_path / "run")
    table = main([*TINY, "--out", str(tmp_path), "--run", str(run)])
    kept = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert kept["figure"].tolist() == table["figure"].tolist()
    assert len(table) == 20 + 5 + 4 + 2 + 10 + 2 + 2
    assert len(pd.read_csv(tmp_path / "curves.csv")) == 14
    assert (tmp_path / "curves.svg").read_text().count("number of") == 4
    assert (table["ratio"].notna() & (table["lowest"] <= table["highest"])).all()
    lines = capsys.readouterr().out.splitlines()
    assert table["machine"].isin(lines).all() and "1 threads, torch" in table["machine"][0]


def test_ratios_are_those_of_pairs():
    calls = []
    first, second = ratios(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert len(first) == len(second) == 3
    assert calls == list("abbaabba")
    told = row("x", "<= 1.5", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (told["ratio"], told["lowest"], told["highest"], told["met"]) == (2, 1, 3, "no")
    told = [is_met(1.0, wanted) for wanted in ("<= 1", "< 1", ">= 1", "")]
    assert told == ["yes", "no", "yes", ""]
