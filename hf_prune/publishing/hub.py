"""The Hub: pruned models saved with all that tells how they became so, and pushed."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..calibration.batches import Batch
from ..calibration.contexts import keep_random_state
from ..calibration.costs import Cost, measure_costs
from ..callback import PruningTrainerCallback
from ..config import CONFIG_NAME, PruningConfig
from ..distributed.processes import rank_and_size
from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions
from ..plan import resolve
from ..recovery.lora import has_adapters
from ..reporting.history import HISTORY_NAME, PruningHistory
from ..reporting.plots import PLOT_NAME, can_plot
from ..reporting.reports import sparsity_report
from ..structures.loading import record_shapes_, recorded_compression, recorded_in
from ..structures.routing import SAVED_UNBARRED, bars_any
from ..weights.compression import compressed_state
from .cards import Facts, loaded_as, model_card
from .folders import files_of_weights
from .opening import Processing

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_OURS = (CONFIG_NAME, HISTORY_NAME, PLOT_NAME)
# Checkpoints, what is hidden, and the pickled arguments, in which a token may be.
_NOT_FOR_THE_HUB = ["checkpoint-*/**", "**/checkpoint-*/**", ".*", "**/.*", ".*/**", "training_args.bin"]


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processing_class: Processing | Sequence[Processing] | None = None,
    config: PruningConfig | None = None,
    history: PruningHistory | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    batch: Batch | None = None,
    compress: bool = False,
    max_shard_size: int | str = "50GB",
) -> None:
    """Saves a pruned model with its history, and a card that tells how it became what it is.

    All is written under a temporary name first: if that fails, the folder is as it was.

    Args:
        model: The model, unwrapped.
        folder: Where to; made if it is not there. Files of an earlier model in it are replaced.
        processing_class: Tokenizer or processor to save with it, or several.
        config: How it was pruned; goes into `pruning_config.json` and the card.
        history: Its rounds, as in `PruningTrainerCallback.history`; go into `pruning_history.json`, the card, and, if
            matplotlib is installed, `pruning.png`.
        metrics: Metrics of the model as it is, such as `test_accuracy`, and with `dense_` in front those of the dense
            one; go into the card.
        dataset: The data of these metrics: a name on the Hub.
        base_model: The dense model: a name on the Hub. If None, the one that the model was loaded from, if it was.
        batch: What the model is called with to measure how long that takes; nothing is measured if None.
        compress: Whether the files leave out zeros, where that makes them smaller. `from_pretrained` then reads them
            after `import hf_prune`, to the last bit but the sign of zeros.
        max_shard_size: As in `PreTrainedModel.save_pretrained`.

    Raises:
        ValueError: if the model holds shards: `push_to_hub(trainer)` gathers them.
        OSError: if it cannot be written.
    """
    _require_whole(model)
    facts = _facts(model, config, history, metrics, dataset, base_model, batch)
    _save(facts, Path(folder), str(folder), processing_class, model.state_dict(), max_shard_size, compress)


def push_to_hub(
    what: "Trainer | PreTrainedModel | str | os.PathLike[str]",
    repo_id: str | None = None,
    *,
    processing_class: Processing | Sequence[Processing] | None = None,
    config: PruningConfig | None = None,
    history: PruningHistory | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    batch: Batch | None = None,
    compress: bool = False,
    max_shard_size: int | str = "50GB",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Pruned with hf_prune",
) -> CommitInfo | None:
    """Saves a pruned model as `save_pretrained` does, and uploads it.

    Args:
        what: A trainer, after training, whose model is saved in its `output_dir`, with what its
            `PruningTrainerCallback` knows; a model; or a folder, which is uploaded as it is. With several processes
            all call this.
        repo_id: Name of the repository, `user/name` or a name of one's own; made if it is not there. If None, the
            `hub_model_id` of the trainer's arguments, or the name of the folder.
        processing_class: As in `save_pretrained`, and likewise below; what a trainer knows itself may be left out.
        config: As there.
        history: As there.
        metrics: As there.
        dataset: As there.
        base_model: As there.
        batch: As there; a trainer takes one of its evaluation batches.
        compress: As there.
        max_shard_size: As there.
        private: Whether a new repository is private; as the owner has set it if None.
        token: The token to write with; the one that was logged in with if None.
        commit_message: What is said of the upload.

    Returns:
        The commit; None on all processes but the first.

    Raises:
        HfHubHTTPError: if the Hub refuses it, or another error of the connection. What was saved stays where it is,
            and the log says where, and how to try again.
        ValueError: if there is no name for the repository, or none that the Hub allows, or nothing to push in the
            folder.
    """
    is_first = rank_and_size()[0] == 0
    if isinstance(what, (str, os.PathLike)):
        if not is_first:
            return None
        folder = Path(what)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a saved model: it has no config.json.")
        files_of_weights(folder)  # Raises if there are none.
        return _upload(folder, repo_id or folder.resolve().name, private, token, commit_message)
    if isinstance(what, nn.Module):
        if repo_id is None:
            raise ValueError("repo_id must be given to push a model: a name, or user/name.")
        validate_repo_id(repo_id)
        _require_whole(what)
        if not is_first:
            return None
        folder = Path(tempfile.mkdtemp(prefix="hf_prune-"))
        facts = _facts(what, config, history, metrics, dataset, base_model, batch)
        _save(facts, folder, repo_id, processing_class, what.state_dict(), max_shard_size, compress)
        commit = _upload(folder, repo_id, private, token, commit_message)
        shutil.rmtree(folder)
        return commit
    trainer, args = what, what.args
    folder = Path(str(args.output_dir))
    repo_id = repo_id or args.hub_model_id or folder.resolve().name
    validate_repo_id(repo_id)
    model = trainer.accelerator.unwrap_model(trainer.model)
    pruning = next((c for c in trainer.callback_handler.callbacks if isinstance(c, PruningTrainerCallback)), None)
    if pruning is not None:
        config, history = config or pruning.config, history or pruning.history
    if metrics is None and args.load_best_model_at_end and trainer.state.best_metric is not None:
        metrics = {f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}": trainer.state.best_metric}
    divided = has_shards(model) or has_partitions(model)
    if batch is None and trainer.eval_dataset is not None and not isinstance(trainer.eval_dataset, dict):
        batch = next(iter(trainer.get_eval_dataloader()), None)
    facts = _facts(model, config, history, metrics, dataset, base_model, None if divided else batch)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if divided else model.state_dict()
    if not is_first:
        return None
    private = args.hub_private_repo if private is None else private
    _save(facts, folder, repo_id, processing_class or trainer.processing_class, state, max_shard_size, compress)
    return _upload(folder, repo_id, private, token or args.hub_token, commit_message)


def _require_whole(model: PreTrainedModel) -> None:
    """Requires that a model is all here."""
    if has_shards(model) or has_partitions(model):
        raise ValueError(
            "several processes hold parts of the model: push_to_hub(trainer) gathers them, and so does "
            "trainer.save_model."
        )


def _facts(
    model: PreTrainedModel,
    config: PruningConfig | None,
    history: PruningHistory | None,
    metrics: Mapping[str, float] | None,
    dataset: str | None,
    base_model: str | None,
    batch: Batch | None,
) -> Facts:
    if has_adapters(model):
        raise ValueError(
            "the model carries adapters, beside which no base weights would be saved. Merge them first "
            "(merge_and_unload), or save the adapter with its own save_pretrained."
        )
    # Structures that are gone cannot be counted as zeros.
    counted = config if config is not None and not (history is not None and history.costs) else None
    return Facts(
        model,
        sparsity_report(model, counted),
        settings=None if config is None else resolve(config),
        history=history,
        metrics=metrics or {},
        dataset=dataset,
        # A model has this hash if it was loaded from the Hub.
        base_model=base_model or (str(model.name_or_path) if getattr(model.config, "_commit_hash", None) else None),
        costs=_costs(model, history, batch),
    )


def _costs(model: PreTrainedModel, history: PruningHistory | None, batch: Batch | None) -> dict[str, Cost]:
    """What a forward pass takes, beside that of the dense model: before it was shrunk, or with weights for zeros."""
    if history is not None and history.costs:
        return {"dense": history.costs["masked"], "pruned": history.costs["shrunk"]}
    if batch is None:
        return {}
    dense = copy.deepcopy(model)
    with torch.no_grad(), keep_random_state(model.device):
        for parameter in dense.parameters():
            parameter.copy_(parameter.where(parameter != 0, torch.randn_like(parameter) * parameter.std()))
    try:
        return measure_costs({"dense": dense, "pruned": model}, batch)
    except Exception:
        logger.warning("The card does not say how long a forward pass takes, since there was none.", exc_info=True)
        return {}


def _save(
    facts: Facts,
    folder: Path,
    name: str,
    processing_class: Processing | Sequence[Processing] | None,
    state: Mapping[str, torch.Tensor],
    max_shard_size: int | str,
    compress: bool,
) -> None:
    _record_parts_(facts.model)
    if bars_any(facts.model):
        logger.warning("%s", SAVED_UNBARRED)
    with _replacing(folder) as stage:
        tensors, shapes = compressed_state(state) if compress else ({}, {})
        facts.compressed = bool(shapes)
        if shapes:
            with recorded_compression(facts.model.config, shapes):
                facts.model.save_pretrained(
                    stage, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False
                )
        else:
            facts.model.save_pretrained(stage, state_dict=dict(state), max_shard_size=max_shard_size)
        several = isinstance(processing_class, Sequence)
        for each in cast(Sequence[Processing], processing_class if several else filter(None, [processing_class])):
            each.save_pretrained(stage)
        if facts.settings is not None:
            facts.settings.config.save_pretrained(stage)
        if facts.history is not None:
            facts.history.save(stage / HISTORY_NAME)
            if facts.history and can_plot():
                facts.history.plot(stage / PLOT_NAME)
        facts.bytes = sum(path.stat().st_size for pattern in _WEIGHTS[:2] for path in stage.glob(pattern))
        model_card(name, facts).save(stage / CARD_NAME)


def _record_parts_(model: PreTrainedModel) -> None:
    """Records in a whole that was put together from shrunk parts what their configs record, as loading reads it."""
    parts = [each for each in model.modules() if isinstance(each, PreTrainedModel) and each.config is not model.config]
    if any(recorded_in(part.config) for part in parts):
        with suppress(ValueError):  # No config builds its class; its parts are saved one by one.
            record_shapes_(model)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder of which everything goes into another one, once it is whole, in place of an earlier model."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        try:
            yield stage
        except SafetensorError as error:  # A full disk, in the words of the library that writes weights.
            raise OSError(f"the weights could not be written, and {folder} is as it was: {error}") from error
        new = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
        if in_the_way := [path for path in new if (folder / path).is_dir()]:
            raise OSError(f"{folder / in_the_way[0]} is a folder, where a file is to be written.")
        for path in new:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / path, folder / path)
        for old in (path for pattern in (*_WEIGHTS, *_OURS) for path in folder.glob(pattern)):
            if old.relative_to(folder) not in new:
                old.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _upload(folder: Path, repo_id: str, private: bool | None, token: str | None, message: str) -> CommitInfo:
    validate_repo_id(repo_id)
    api, done = HfApi(token=token), False
    again = "" if private is None else f", private={private}"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = folder / CARD_NAME
        if card.is_file():  # From here on it is known what the model is loaded by.
            renamed = loaded_as(repo_id, card.read_text(encoding="utf-8"))
            card.write_text(renamed, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=_NOT_FOR_THE_HUB,
            delete_patterns=[*_WEIGHTS, *_OURS],
        )  # fmt: skip
        done = True
    finally:
        if not done:
            logger.error(
                "%s was not pushed to %s. All that was saved is still there; try again with "
                "hf_prune.push_to_hub(%r, %r%s).", folder, repo_id, str(folder), repo_id, again,
            )  # fmt: skip
    return commit
