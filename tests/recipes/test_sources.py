from pathlib import Path

import pytest

from common.sources import load, local_path


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("owner/name", built_in="'digits'") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_path("owner/name", built_in="'digits'") == Path("owner/name")


@pytest.mark.parametrize("dataset", ["digit", "/no/such/folder", "./owner/name", "~/none", "owner/story.txt", ""])
def test_what_is_neither(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"must be 'digits', an existing file or folder.*got '{dataset}'"):
        local_path(dataset, built_in="'digits'")


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be loaded.*must be a folder with data files"):
        load(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'owner/name' could not be loaded.*needs the network"):
        load("owner/name")
