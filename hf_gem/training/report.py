"""The results of a finished run: its model, a picture of its loss and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError

from ..family.names import is_name
from ..files import markdown_block, markdown_code, markdown_text, save_pretrained
from ..integrations.hub import loading_notes, save_for_hub
from .curve import can_draw, draw_loss
from .errors import CheckpointError
from .push import push_run

_WRITTEN_BEFORE = ("record.json", "log.jsonl")  # by the loop
_TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def save_results(model: Any, processor: Any, record: dict[str, Any], **card: Any) -> None:
    """Saves the results of a finished run: weights, tokenizer or image processor, `loss_curve.png` and the card.

    They go to the output folder of the run. If the config says so, these files, and no others of the folder, are then
    pushed to the Hub.

    Args:
        model: A transformers model. If it has an activation of the family, `save_for_hub` saves it.
        processor: The tokenizer or image processor; None if the model has none.
        record: The record of the run.
        card: Further values for the card; see `write_card`.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written. The last checkpoint is complete.
        PushError: the push failed.
    """
    config = record["config"]
    folder = Path(config["output_dir"])
    work = folder / ".results"
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        work.mkdir()
        if card.get("ours", is_name(config["hidden_act"])):
            save_for_hub(model, work)
        else:
            model.save_pretrained(work)
        if processor is not None:
            save_pretrained(processor, work)
        if picture := can_draw():
            draw_loss(record, work / "loss_curve.png", card["loss_unit"])
        else:
            print("no loss_curve.png, since matplotlib is not installed; the losses are in record.json")
        write_card(record, work / "README.md", picture=picture, **card)
        files = _move(work, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the trained model to {folder}: {error}. Its last checkpoint is complete. Make room and "
            "start the same command again"
        ) from error
    if config["push_to_hub"]:
        private = not config["hub_public"]
        print(f"pushed: {push_run(config['push_to_hub'], folder, [*_WRITTEN_BEFORE, *files], private)}")


def _move(folder: Path, to: Path) -> list[str]:
    """Moves all files of a folder into another and deletes the first; returns their relative paths."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(to / name)
    shutil.rmtree(folder, ignore_errors=True)
    return names


def text_card(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Returns the values of a card that all language models share, and some more; for `save_results`."""
    return {
        "processor_class": "AutoTokenizer",
        "on_hub": record["data"].get("on_hub", False),
        "imported": "hf_gem",
        **values,
    }


def image_card(model: str, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a card that all image classifiers share; for `save_results`.

    Args:
        model: The name of the model in the recipe.
        record: The record of the run.
    """
    size = record["data"]["image_size"]
    return {
        "architecture": markdown_code(model),
        "pipeline_tag": "image-classification",
        "auto_class": "AutoModelForImageClassification",
        "processor_class": "AutoImageProcessor",
        "loss_unit": "nats per image",
        "on_hub": record["data"].get("on_hub", False),
        "limits": f"It knows {record['data']['num_classes']} classes, in images of {size} x {size} pixels like those "
        "of its data. It answers with one of these classes for any image.",
    }


def import_of(model: Any) -> str:
    """Returns the module to import before loading a model: the one that defines it if that is in hf_gem, or hf_gem."""
    home = type(model).__module__
    return home if home.startswith("hf_gem.") else "hf_gem"


def print_summary(record: dict[str, Any]) -> None:
    """Prints the last lines of a recipe: the losses, and where the files are."""
    result, folder = record["result"], Path(record["config"]["output_dir"])
    picture = folder / "loss_curve.png"
    if "validation_accuracy" in result:
        print(f"Validation accuracy {result['validation_accuracy']:.2%}")
    first, last = result["initial_validation_loss"], result["validation_loss"]
    if "validation_relative_l2" in result:
        print(f"Relative L2 error {result['validation_relative_l2']:.3g}")
        print(f"Validation loss {first:.3g} -> {last:.3g}")
    else:
        print(f"Validation loss {first:.4f} -> {last:.4f} ({first - last:.2f} nats lower)")
    if "test_loss" in result:
        print(f"Test loss {result['test_loss']:.4f}")
    print(f"Checkpoint: {folder}")
    if picture.exists():
        print(f"Plot:       {picture}")
    print(f"Model card: {folder / 'README.md'}")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # which is one of Python too


_SHOWN: dict[str, Any] = {"text": markdown_text, "code": markdown_code, "block": markdown_block, "literal": _literal}


def write_card(record: dict[str, Any], path: Path, picture: bool = True, **more: Any) -> None:
    """Writes a model card.

    Args:
        record: The record of a finished run.
        path: The card to write.
        picture: Whether `loss_curve.png` is beside it.
        more: Further values for the template. Among them are `auto_class`; `imported`, the module to import before
            loading; and `ours`, whether the model has activations of the family, if `hidden_act` does not say so.
    """
    config = record["config"]
    ours = more.pop("ours", is_name(config["hidden_act"]))
    own = more["imported"] != "hf_gem"
    location = config.get("push_to_hub") or config["output_dir"]
    card = ModelCard.from_template(
        _card_data(record, ours, more),
        template_path=str(_TEMPLATE),
        picture=picture,
        record=record,
        config=config,
        result=record["result"],
        session=record["sessions"][-1],
        amounts=record["data"][f"num_{record['result']['unit']}"],
        ours=ours,
        own=own,
        loading=loading_notes(more["auto_class"], location, own=own) if ours else "",
        location=location,
        **_SHOWN,
        **more,
    )
    card.save(path)


def _card_data(record: dict[str, Any], ours: bool, more: dict[str, Any]) -> ModelCardData:
    """Returns the metadata of a card, which the Hub reads."""
    config, result = record["config"], record["result"]
    metric = next(name for name in ("accuracy", "relative_l2", "perplexity") if f"validation_{name}" in result)
    dataset = config.get("dataset") or config["problem"]
    split = {"split": "validation_split"}.get(record["data"].get("held_out"), "train_split")
    measured = EvalResult(
        task_type=more["pipeline_tag"],
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=config.get(split),
        metric_type=metric,
        metric_value=result[f"validation_{metric}"],
    )
    act = config["hidden_act"]
    return ModelCardData(
        license=config.get("license"),
        library_name="transformers",
        pipeline_tag=more["pipeline_tag"],
        # none: the pretrained model kept its activations
        tags=["activation-function", *([act] if act != "none" else []), *(["hf_gem"] if ours else [])],
        datasets=[dataset] if more["on_hub"] else None,
        base_model=config["model"] if "before_conversion" in record and not Path(config["model"]).exists() else None,
        metrics=[metric],
        model_name=Path(config.get("push_to_hub") or config["output_dir"]).name,
        eval_results=[measured],
    )
