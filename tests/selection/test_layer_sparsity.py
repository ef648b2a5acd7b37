"""A sparsity divided among places by what each costs."""

import json
import re

import pytest

from hf_prune import PruningConfig, prune
from hf_prune.selection.layer_sparsity import RULES, equal_harm, least_harm
from tests.structures.models import build

LEVELS = [0.25, 0.5, 0.75]


def report_of(values, dense=1.0, **others):
    """A file's contents: place → values at the three levels, all places equally large."""
    rows = [{"name": name, "total": 8, "values": list(v), "is_kind": False} for name, v in values.items()]
    return {"metric": "loss", "greater_is_better": False, "dense": dense, "levels": LEVELS, "rows": rows,
            "granularity": "unstructured", "criterion": "magnitude", **others}  # fmt: skip


def written(tmp_path, report):
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(report))
    return path


def curve(*harms):
    return [(0.0, 0.0), *zip(LEVELS, harms, strict=True)]


def test_equal_harm_is_where_all_cost_as_much():
    cheap, dear = curve(0.1, 0.2, 0.3), curve(0.3, 0.6, 0.9)
    a, b = equal_harm([cheap, dear], [1.0, 1.0], 0.4)
    assert (a + b) / 2 == pytest.approx(0.4)
    assert a * 0.4 == pytest.approx(b * 1.2)  # Both curves are straight lines.
    # Sizes count: the same costs, but the dear place is three times as large.
    a, b = equal_harm([cheap, dear], [1.0, 3.0], 0.3)
    assert (a + 3 * b) / 4 == pytest.approx(0.3)
    assert a * 0.4 == pytest.approx(b * 1.2)


def test_no_place_goes_beyond_what_was_measured():
    a, b = equal_harm([curve(0.0, 0.0, 0.0), curve(1.0, 2.0, 3.0)], [1.0, 1.0], 0.5)
    assert (a, b) == pytest.approx((0.75, 0.25))


def test_places_that_cost_nothing_share_what_is_asked_for():
    assert equal_harm([curve(0, 0, 0), curve(0, 0, 0)], [1.0, 1.0], 0.3) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
def test_least_harm_is_what_trying_all_gives(sparsity):
    curves = [curve(0.1, 0.5, 2.0), curve(0.2, 0.3, 0.35), curve(0.0, 0.0, 0.1)]
    sizes = [1.0, 2.0, 1.5]

    def harm(i, share):
        """On the lower convex hull, as `least_harm` has it."""
        points = curves[i]
        values = []
        for a, low in points:
            for b, high in points:
                if a <= share <= b:
                    values.append(low if a == b else low + (high - low) * (share - a) / (b - a))
        return min(values)

    shares = least_harm(curves, sizes, sparsity)
    assert sum(s * size for s, size in zip(shares, sizes, strict=True)) == pytest.approx(sparsity * sum(sizes))
    best = min(
        harm(0, a / 100) + harm(1, b / 100) + harm(2, min(max(c, 0), 0.75))
        for a in range(76)
        for b in range(76)
        if -1e-9 <= (c := (sparsity * 4.5 - a / 100 - 2 * b / 100) / 1.5) <= 0.75 + 1e-9
    )
    assert sum(harm(i, share) for i, share in enumerate(shares)) <= best + 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_all_places_come_to_the_sparsity(rule):
    curves = [curve(0.1, 0.5, 2.0), curve(0.3, 0.2, 0.35), curve(0.0, 0.0, 0.1)]
    curves = [[(x, max(y for _, y in c[: i + 1])) for i, (x, _) in enumerate(c)] for c in curves]
    for sparsity in (0.0, 0.2, 0.5, 0.75):
        shares = RULES[rule](curves, [5.0, 1.0, 2.0], sparsity)
        assert sum(s * n for s, n in zip(shares, [5.0, 1.0, 2.0], strict=True)) / 8 == pytest.approx(
            sparsity, abs=1e-6
        )
        assert all(0 <= share <= 0.75 + 1e-9 for share in shares)


@pytest.mark.parametrize("rule", ["", ":equal", ":least"])
def test_a_config_reads_a_file(rule, tmp_path):
    path = written(tmp_path, report_of({"a.0": (1.1, 1.2, 1.3), "a.1": (1.3, 1.6, 1.9)}))
    config = PruningConfig(sparsity=0.4, layer_sparsity=f"@{path}{rule}")
    a, b = (config.own_sparsities[name] for name in (r"a\.0", r"a\.1"))
    assert (a + b) / 2 == pytest.approx(0.4)
    assert a > b
    # What was read is written down: the file may go.
    path.unlink()
    assert PruningConfig.from_dict(config.to_dict()) == config


def test_accuracies_fall_where_losses_rise(tmp_path):
    losses = report_of({"a": (1.1, 1.2, 1.3), "b": (1.3, 1.6, 1.9)})
    accuracies = report_of({"a": (0.9, 0.8, 0.7), "b": (0.7, 0.4, 0.1)}, greater_is_better=True)
    found = [PruningConfig(sparsity=0.4, layer_sparsity=f"@{written(tmp_path, r)}") for r in (losses, accuracies)]
    assert found[0].own_sparsities == pytest.approx(found[1].own_sparsities)


def test_what_gets_better_counts_as_free(tmp_path):
    path = written(tmp_path, report_of({"a": (0.9, 0.8, 1.0), "b": (1.3, 1.6, 1.9)}))
    assert PruningConfig(sparsity=0.5, layer_sparsity=f"@{path}").own_sparsities["a"] == pytest.approx(0.75)


def test_kinds_as_a_whole_are_no_places(tmp_path):
    report = report_of({"a": (1.1, 1.2, 1.3)})
    report["rows"].append({"name": "all a", "total": 8, "values": [1.1, 1.2, 1.3], "is_kind": True})
    assert list(PruningConfig(sparsity=0.4, layer_sparsity=f"@{written(tmp_path, report)}").own_sparsities) == ["a"]
    report["rows"] = report["rows"][1:]
    with pytest.raises(ValueError, match="measures kinds as a whole, and no single places"):
        PruningConfig(sparsity=0.4, layer_sparsity=f"@{written(tmp_path, report)}")


def test_a_model_is_pruned_by_it(tmp_path):
    model = build("llama")
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    values = {names[0]: (1.1, 1.2, 1.3), names[1]: (1.2, 1.4, 1.6), names[2]: (1.4, 1.8, 2.2)}
    report = report_of(values)
    for row in report["rows"]:
        row["total"] = 24
    config = PruningConfig(
        sparsity=0.4, granularity="neuron", multiple_of=1, layer_sparsity=f"@{written(tmp_path, report)}"
    )
    found = prune(model, config)
    asked = [round(24 * config.own_sparsities[re.escape(name)]) for name in names]
    assert [row.zeros for row in found.structures] == asked
    assert found.sparsity == pytest.approx(0.4, abs=1 / 48)


def test_a_file_needs_a_sparsity(tmp_path):
    path = written(tmp_path, report_of({"a": (1.1, 1.2, 1.3)}))
    with pytest.raises(ValueError, match="divides a sparsity among layers: give one"):
        PruningConfig(hold_zeros=True, layer_sparsity=f"@{path}")


def test_a_file_that_measures_too_little(tmp_path):
    path = written(tmp_path, report_of({"a": (1.1, 1.2, 1.3)}))
    with pytest.raises(ValueError, match=r"measures up to 0.75, and a sparsity of 0.8 needs more"):
        PruningConfig(sparsity=0.8, layer_sparsity=f"@{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "is not a sensitivity report"),
        ("[1]", "is not a sensitivity report"),
        (json.dumps({**report_of({"a": (1.1, 1.2, 1.3)}), "levels": [0.5, 0.25, 0.75]}), "levels .* must rise"),
        (json.dumps({**report_of({"a": (1.1, 1.2, 1.3)}), "levels": []}), "levels .* must rise"),
        (json.dumps(report_of({"a": (1.1, 1.2)})), r"has \[1.1, 1.2\] of 'a' for 3 levels"),
        (json.dumps({**report_of({}), "rows": [1]}), "has a row 1"),
        (json.dumps({**report_of({}), "rows": 5}), "rows of a sensitivity report must be a list"),
        (json.dumps(report_of({"a": (1.1, 1.2, 1.3)})).replace("1.2", "NaN"), "for 3 levels"),
        ("[" * 100_000, "is not a sensitivity report"),
        (json.dumps({**report_of({}), "rows": {"name": "a"}}), "rows of a sensitivity report must be a list"),
        (json.dumps({**report_of({}), "greater_is_better": "no"}), "greater_is_better true or false"),
        (json.dumps({**report_of({}), "dense": 10**400}), "levels .* must rise"),
        (json.dumps(report_of({"a": (1.1, 1.2, 1.3)})).replace('"total": 8', '"total": 0'), "has a row"),
        (json.dumps(report_of({"a": (1.1, 1.2, 1.3)})).replace('"total": 8', '"total": -8'), "has a row"),
    ],
)
def test_a_file_of_something_else(text, message, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PruningConfig(sparsity=0.4, layer_sparsity=f"@{tmp_path / 'file.json'}")


def test_two_rows_of_one_name(tmp_path):
    report = report_of({"a": (1.1, 1.2, 1.3)})
    report["rows"] *= 2
    with pytest.raises(ValueError, match="has several rows of one name"):
        PruningConfig(sparsity=0.4, layer_sparsity=f"@{written(tmp_path, report)}")


def test_a_place_that_was_not_measured_further_goes_no_further(tmp_path):
    path = written(tmp_path, report_of({"a": (1.1, None, None), "b": (1.3, 1.6, 1.9)}))
    own = PruningConfig(sparsity=0.45, layer_sparsity=f"@{path}").own_sparsities
    assert own["a"] == pytest.approx(0.25)
    assert own["b"] == pytest.approx(0.65)


def test_a_saved_config_names_no_file(tmp_path):
    """Else whoever made it chooses what is read."""
    path = written(tmp_path, report_of({"a": (1.1, 1.2, 1.3)}))
    config = PruningConfig(sparsity=0.4).to_dict()
    (tmp_path / "pruning_config.json").write_text(json.dumps({**config, "layer_sparsity": f"@{path}"}))
    with pytest.raises(ValueError, match="must hold the numbers of layer_sparsity, not a file's name"):
        PruningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("values", [{"sparsity": "0.5"}, {"sparsities": "abc"}, {"sparsities": ["a"]}])
def test_kinds_of_values_are_looked_at_first(values, tmp_path):
    path = written(tmp_path, report_of({"a": (1.1, 1.2, 1.3)}))
    with pytest.raises(ValueError, match=r"sparsit.* must be"):
        PruningConfig(**values, layer_sparsity=f"@{path}")


def test_a_text_that_is_too_deep():
    with pytest.raises(ValueError, match="layer_sparsity is not JSON"):
        PruningConfig(sparsity=0.4, layer_sparsity="[" * 100_000)


@pytest.mark.parametrize("name", ["", ":least", "."])
def test_a_folder_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="layer_sparsity: there is no file"):
        PruningConfig(sparsity=0.4, layer_sparsity=f"@{name}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        PruningConfig(sparsity=0.4, layer_sparsity=f"@{tmp_path / 'nothing.json'}")
