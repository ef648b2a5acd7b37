"""Pages: one file, with what is known of a model, and nothing of what somebody else wrote into its names."""

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_prune import PruningConfig, PruningHistory, prune, save_pretrained
from hf_prune.publishing.inspection import report_folder
from hf_prune.publishing.pages import page_of
from tests.reporting.test_history import history
from tests.tiny import FAMILIES, build

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """What is in a page; its tags are closed in the order in which they were opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


def saved(folder: Path, family: str = "llama", granularity: str = "unstructured", **options: object) -> Path:
    model, config = build(family), PruningConfig(sparsity=0.5, granularity=granularity)
    prune(model, config)
    save_pretrained(model, folder, config=config, **options)
    return folder


def page_about(folder: Path, name: str = "mine") -> Outline:
    return Outline(page_of(name, report_folder(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_has_a_row_for_each_tensor(family, tmp_path):
    folder = saved(tmp_path, family, history=history())
    report, page = report_folder(folder), page_about(folder)
    for row in report.rows():
        assert {cell for cell in row if cell} <= set(page.text)
    assert f"{report.sparsity:.2%}" in page.text
    assert page.tags.count("img") == 2
    assert "Rounds" in page.text


def test_the_rounds_are_those_of_the_history(tmp_path):
    folder = saved(tmp_path, history=history())
    page = page_about(folder)
    for row in PruningHistory.load(folder / "pruning_history.json"):
        assert {str(row.step), f"{row.reached:.4f}"} <= set(page.text)


def test_what_is_not_there_is_not_shown(tmp_path):
    build("llama").save_pretrained(tmp_path)
    page = page_about(tmp_path)
    assert page.tags.count("img") == 1
    assert not {"Rounds", "The run", "Config", "Structures"} & set(page.text)


def test_structures_have_a_table(tmp_path):
    page = page_about(saved(tmp_path, "gpt2", "head"))
    assert "Structures" in page.text
    assert "2 heads" in page.text


def test_a_page_needs_nothing_else(tmp_path):
    page = page_about(saved(tmp_path, history=history()))
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for source in sources:
        picture = base64.b64decode(source.partition(",")[2]).decode()
        assert "</svg>" in picture
        assert "<script" not in picture
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_names_are_text(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    save_file({evil: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    text = page_of(evil, report_folder(tmp_path))
    assert "<script" not in text
    assert html.escape(evil) in text
    pictures = [base64.b64decode(found).decode() for found in re.findall(r'base64,([^"]+)"', text)]
    assert pictures
    assert not any("<script" in picture for picture in pictures)
    assert page_about(tmp_path, evil).text.count(evil) == 3  # the title, the heading, the row of the tensor


def test_a_name_in_dollars_is_no_formula(tmp_path):
    save_file({r"$\frac{1}$": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    history(metric=r"$\frac{1}$").save(tmp_path / "pruning_history.json")
    assert page_about(tmp_path).tags.count("img") == 2


def test_no_matrix_is_an_error(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no matrices: there is nothing to show"):
        page_about(tmp_path)
