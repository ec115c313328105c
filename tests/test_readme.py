"""The README: its Python runs as it is written, and it stays short."""

import re
from pathlib import Path

import pytest
from tiny import draw_photos

import ramslib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_stays_short_and_its_links_exist():
    assert len(README.splitlines()) <= 140
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        missing = [
            link for link in links if "://" not in link and not (page.parent / link).exists()
        ]
        assert missing == [], page.name


@pytest.mark.slow
def test_its_python_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.+?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) <= 14
    monkeypatch.chdir(tmp_path)
    photos = draw_photos(tmp_path / "photos" / "birds", size=80)
    (tmp_path / "new_photos").mkdir()
    next(photos.rglob("*.png")).rename(tmp_path / "new_photos" / "heron.png")
    tiny = ramslib.Config.preset("tiny", batch_size=6, workers=0)
    preset = ramslib.Config.preset

    def quick(name, **changes):
        """The README's preset in a size for tests."""
        assert preset(name, **changes).epochs == 5
        return tiny.replace(**changes).replace(epochs=1)

    monkeypatch.setattr(ramslib.Config, "preset", quick)
    exec(compile(code.replace("heron.jpg", "heron.png"), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "scale 2" in shown and "iou" in shown and (tmp_path / "heron.png").exists()


def test_public_names_exist_and_importing_the_package_is_light():
    assert set(ramslib.__all__) <= set(dir(ramslib))
    for name in ramslib.__all__:
        assert callable(getattr(ramslib, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ramslib.nothing  # noqa: B018
