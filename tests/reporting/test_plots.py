import builtins
import struct
import sys

import pytest

from hf_prune import PruningConfig, prune
from hf_prune.reporting.plots import as_svg, figure_of_modules
from tests.reporting.test_history import HISTORIES, KINDS, history
from tests.tiny import FAMILIES, build

# The plot of a run


@KINDS
def test_a_plot_is_an_image(tmp_path, kind):
    path = tmp_path / "history.png"
    HISTORIES[kind].plot(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1200, 750)


def test_a_plot_shows_what_the_history_holds(tmp_path):
    history().plot(tmp_path / "history.svg")
    HISTORIES["empty"].plot(str(tmp_path / "empty.svg"))
    full, empty = ((tmp_path / f"{name}.svg").read_text() for name in ("history", "empty"))
    for label in ("while training", "right after a cut", "best of a round", "dense"):
        assert f"<!-- {label} -->" in full
        assert f"<!-- {label} -->" not in empty
    for label in ("eval_loss", "sparsity", "step"):
        assert f"<!-- {label} -->" in full
        assert f"<!-- {label} -->" in empty


def test_a_plot_leaves_the_users_own_figures_alone(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure()
    history().plot(tmp_path / "history.svg")
    assert pyplot.get_fignums() == [figure.number]
    pyplot.close(figure)


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"^plots need matplotlib: pip install matplotlib\.$"):
        history().plot(tmp_path / "history.png")
    assert not (tmp_path / "history.png").exists()


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 100.0], "log"), ([1.0, 2.0], "linear"), ([0.0, 100.0], "linear"), ([-0.2, 0.5], "linear")],
)
def test_no_point_is_lost_on_a_logarithmic_axis(values, scale):
    figure = history(dense=None, evaluations=list(enumerate(values)), rounds=[]).figure()
    assert figure.axes[0].get_yscale() == scale


# The picture of a model


def cells(figure):
    """(row, column) → what is written there."""
    axes = figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    return {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): text.get_text()
        for text in axes.texts
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_a_cell_with_its_sparsity(family, tmp_path):
    model = build(family)
    report = prune(model, PruningConfig(sparsity=0.7))
    figure = report.figure()
    assert sorted(cells(figure).values()) == sorted(f"{row.sparsity:.2f}" for row in report.modules)
    report.plot(tmp_path / "modules.png")
    assert (tmp_path / "modules.png").read_bytes().startswith(b"\x89PNG")


def test_layers_are_columns():
    values = {"model.layers.0.mlp.up": 0.1, "model.layers.10.mlp.up": 0.2, "model.layers.2.mlp.up": 0.3, "head": 0.4}
    values["stages.0.blocks.7.conv"] = 0.5
    assert cells(figure_of_modules(values)) == {
        ("model.layers.*.mlp.up", "0"): "0.10",
        ("model.layers.*.mlp.up", "10"): "0.20",
        ("model.layers.*.mlp.up", "2"): "0.30",
        ("head", "0"): "0.40",
        ("stages.*.blocks.7.conv", "0"): "0.50",
    }


def test_many_layers_and_none():
    assert "</svg>" in as_svg(figure_of_modules({f"layers.{i}.mlp": i / 100 for i in range(100)}))
    assert "</svg>" in as_svg(figure_of_modules({}))


def test_names_that_no_image_can_hold():
    figure = figure_of_modules({"a\x00\x1b\ud800": 0.5, f"layers.{'9' * 5000}.mlp": 0.1})
    assert "a???" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "</svg>" in as_svg(figure)


def test_of_very_many_modules_the_first_are_shown_and_that_is_said():
    figure = figure_of_modules({f"expert{i}.up": 0.5 for i in range(4000)})
    assert figure.axes[0].get_title() == "sparsity by module (the first 100 of 4000 rows)"
    assert len(figure.axes[0].get_yticklabels()) == 100
