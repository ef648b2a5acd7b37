"""Where a dataset comes from: a folder on this machine, or the Hub."""

import re
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError


def local_path(dataset: str, built_in: str) -> Path | None:
    """The path that `dataset` names, or None if it must be a dataset of the Hub.

    Args:
        dataset: A path, or a name on the Hub such as `uoft-cs/cifar10`.
        built_in: The names that need no data at all, for the message.

    Raises:
        ValueError: It is neither a path that exists nor of the form `owner/name`.
    """
    path = Path(dataset).expanduser()
    if dataset and path.exists():
        return path
    if path.suffix == ".txt" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset):
        raise ValueError(
            f"dataset must be {built_in}, an existing file or folder, or owner/name on the Hub; "
            f"got {dataset!r}, which does not exist here. Check the spelling and the current folder."
        )
    return None


def load(source: str) -> DatasetDict:
    """Loads a folder in any layout that `datasets` knows (Parquet, images …), or a dataset of the Hub.

    Raises:
        ValueError: It holds no data, or it is not on the Hub, or the Hub cannot be reached.
    """
    try:
        data = load_dataset(source)
    except (DatasetsError, OSError) as error:
        raise ValueError(
            f"dataset {source!r} could not be loaded: {error}. It must be a folder with data files, or a dataset of "
            "the Hub, which needs the network."
        ) from error
    assert isinstance(data, DatasetDict)  # no split and no streaming were asked for
    return data
