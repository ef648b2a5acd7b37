"""Images: scikit-learn's digits, IDX files, image folders, or a dataset with an image and a label column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from transformers import BaseImageProcessor

from common.idx import is_idx_folder, read_pair
from common.sources import load, local_path


def load_images(dataset: str) -> DatasetDict:
    """Loads the splits that `dataset` has, each with the columns `image` and `label`.

    Args:
        dataset: "digits", a folder with IDX files, an image folder with one folder a class, another folder that
            `datasets` can read, or a name on the Hub.

    Raises:
        ValueError: There is no such dataset, or it has no images or no classes.
    """
    if dataset == "digits":
        digits = load_digits()
        return DatasetDict(train=_from_arrays((digits.images * 255 / 16).astype(np.uint8), digits.target))
    path = local_path(dataset, built_in="'digits'")
    if path and is_idx_folder(path):
        return DatasetDict(train=_from_arrays(*read_pair(path, "train")), test=_from_arrays(*read_pair(path, "t10k")))
    data = load(str(path or dataset))
    features = next(iter(data.values())).features
    # CIFAR-10 calls them img and label, CIFAR-100 img, fine_label and coarse_label: the first of each kind counts.
    columns = {}
    for name, kind in (("image", Image), ("label", ClassLabel)):
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if not found:
            raise ValueError(
                f"{dataset} must have a column of type {kind.__name__}, but has {dict(features)}. "
                "An image folder needs one folder for each class: train/cat/1.png."
            )
        columns[found[0]] = name
    return data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})


def _from_arrays(images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Dataset:
    names = [str(label) for label in range(int(labels.max()) + 1)]
    features = Features(image=Image(), label=ClassLabel(names=names))
    return Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)


class ImageCollator:
    """Processes the images of a batch when it is drawn, so that no processed image is ever stored.

    A list of n rows `{"image": PIL image, "label": int}` becomes `pixel_values` `[n, 3, height, width]`, float32, and
    `labels` `[n]`.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["label"] for row in rows])}
