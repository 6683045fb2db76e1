"""The two vision recipes as a person meets them, on scikit-learn's digits."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.activations import ACT2FN

import hf_gem
from hf_gem.fit import match_eps
from hf_gem.training.data.vision import prepare_images
from hf_gem.training.errors import ConfigError, TrainingError
from hf_gem.training.image_models import ConvNetConfig, ConvNetForImageClassification
from recipes import vision_finetune, vision_train
from tests.helpers import VISION, launch, losses, run_here, run_python

# Rounding of float32 sums taken in another order, carried through the steps of a model this small.
REORDERED = 4000 * torch.finfo(torch.float32).eps
NO_ACTIVATIONS = ConvNetConfig(widths=(4,), hidden_act="linear")
DATA = SimpleNamespace(classes=["a", "b"], image_size=8, train=range(64))
SHORT = ("--steps=8", "--eval_every=4", "--save_every=4", "--warmup_steps=2", "--log_every=1", "--report_to=none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def demo(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run_here(vision_train, folder, cache, "--report_to=none", "--hidden_act=gelu")


@pytest.fixture(scope="module")
def short(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    run_here(vision_train, folder, cache, *SHORT)
    return folder


def test_the_demo_learns_the_digits(demo):
    folder, printed = demo
    accuracy = float(re.search(r"Validation accuracy ([\d.]+)%", printed)[1])
    assert accuracy > 95
    record = json.loads((folder / "record.json").read_text())
    assert record["result"]["validation_accuracy"] == pytest.approx(accuracy / 100, abs=1e-4)
    assert (record["result"]["unit"], record["data"]["num_classes"]) == ("images", 10)
    assert list(record["activation_inputs"]["layers"]) == ["layers.1", "layers.3", "layers.6", "layers.8"]
    card = (folder / "README.md").read_text()
    for fact in (f"{accuracy:.2f} % of 359 images", "pipeline_tag: image-classification", "1,438 images for training"):
        assert fact in card
    assert not any(mark in card for mark in ("{{", "{%", "None"))


def test_the_saved_model_and_its_processor(short):
    model = AutoModelForImageClassification.from_pretrained(short)
    processor = AutoImageProcessor.from_pretrained(short)
    assert hf_gem.audit(model, pixel_values=torch.zeros(1, 3, 8, 8)).num_gem == 4
    assert processor.crop_size["height"] == 8
    assert "trained from scratch" in (short / "README.md").read_text()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_launcher_gives_the_same_run(short, cache, tmp_path, num_processes):
    flags = (cache, *SHORT, f"--output_dir={tmp_path}", "--micro_batch_size=16")
    code, output = launch(num_processes, *flags, recipe=VISION)
    assert code == 0, output
    for key in ("loss", "validation_loss"):
        assert losses(tmp_path, key) == pytest.approx(losses(short, key), rel=REORDERED)
    assert losses(tmp_path, "validation_accuracy") == losses(short, "validation_accuracy")


def test_batch_normalisation_resumes_bit_for_bit(cache, tmp_path):
    flags = (cache, *SHORT, "--model=resnet8-cifar", "--optimizer=sgd", "--lr_schedule=step", "--learning_rate=0.05")
    run_here(vision_train, tmp_path / "whole", *flags, "--keep_checkpoints=9")
    inputs = json.loads((tmp_path / "whole" / "record.json").read_text())["activation_inputs"]
    firsts = [inputs["layers"][path] for path in ("act", *(f"blocks.{i}.act1" for i in range(3)))]
    assert firsts == pytest.approx([1] * 4, rel=2**-8)  # behind batch normalisation, which has seen no batch before
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004"
    run_here(vision_train, tmp_path / "rest", *flags, f"--resume={checkpoint}")
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")
    assert losses(tmp_path / "rest", "validation_loss") == losses(tmp_path / "whole", "validation_loss")
    rates = list(losses(tmp_path / "whole", "learning_rate").values())
    assert rates == pytest.approx([0.025, *[0.05] * 3, *[0.005] * 2, *[0.0005] * 2])


def test_two_processes_evaluate_with_the_same_statistics(cache, tmp_path):
    """Each process has moved its own running means; the saved model has to give the reported loss."""
    flags = (cache, *SHORT, "--model=resnet8-cifar", f"--output_dir={tmp_path}", "--micro_batch_size=16")
    code, output = launch(2, *flags, recipe=VISION)
    assert code == 0, output
    printed = run_here(vision_train, tmp_path, *flags)  # reads the last checkpoint, and has nothing to do
    reported = json.loads((tmp_path / "record.json").read_text())["result"]
    assert f"{reported['validation_accuracy']:.2%}" in printed
    config = vision_train.Config(**json.loads((tmp_path / "record.json").read_text())["config"])
    data = prepare_images(config, 0, torch.device("cpu"))
    batch = data.validation.batch(torch.arange(len(data.validation)).numpy())
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).item()
    assert loss == pytest.approx(reported["validation_loss"], rel=REORDERED)


@pytest.mark.slow
def test_a_model_with_an_unused_parameter_is_the_same_on_two_processes(cache, tmp_path):
    """The mask token of DINOv2; then one process goes on with what two have saved."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Config(**sizes, architectures=["Dinov2ForImageClassification"]).save_pretrained(tmp_path / "model")
    flags = (cache, *SHORT, f"--model={tmp_path / 'model'}", "--micro_batch_size=16", "--keep_checkpoints=9")
    run_here(vision_train, tmp_path / "one", *flags)
    code, output = launch(2, *flags, f"--output_dir={tmp_path / 'two'}", recipe=VISION)
    assert code == 0, output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=REORDERED)
    checkpoint = tmp_path / "two" / "checkpoints" / "step_00000004"
    run_here(vision_train, tmp_path / "rest", *flags, f"--resume={checkpoint}")
    assert losses(tmp_path / "rest") == pytest.approx(losses(tmp_path / "one"), rel=REORDERED)


@pytest.mark.parametrize(("act", "name"), [("egem", "EGEM"), ("gelu", "GELU")])
def test_timm_models_train_with_any_activation(cache, tmp_path, act, name):
    flags = ("--model=timm/test_resnet", "--steps=1", "--warmup_steps=0", "--global_batch_size=4")
    run_here(
        vision_train,
        tmp_path,
        cache,
        *SHORT,
        *flags,
        f"--hidden_act={act}",
        "--resident=no",
        "--image_size=32",
        "--crop_padding=0",
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    names = {type(module).__name__ for module in model.modules()}
    assert any(name in found for found in names)
    assert "ReLU" not in names


def test_transformers_models_train_by_folder(cache, tmp_path):
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "model")
    flags = (
        f"--model={tmp_path / 'model'}",
        "--steps=1",
        "--warmup_steps=0",
        "--resident=no",
        "--image_size=32",
        "--crop_padding=0",
    )
    run_here(vision_train, tmp_path / "run", cache, *SHORT, *flags)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == 10
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())


@pytest.mark.parametrize("model", ["convnet", "resnet8-cifar", "timm/test_resnet"])
def test_an_eps_that_matches(cache, tmp_path, model):
    """The model is the one that the name gives, and what it is given is what the name was chosen for."""
    sizes = ("--steps=2", "--warmup_steps=0", "--resident=no", "--image_size=32", "--crop_padding=0")
    widths = ["--widths=4,8"] if model == "convnet" else []
    flags = (cache, *SHORT, *sizes, *widths, "--eval_every=0", f"--model={model}")
    run_here(vision_train, tmp_path / "match", *flags, "--hidden_act=segem_n2", "--eps=match", "--match_c=0.3")
    record = json.loads((tmp_path / "match" / "record.json").read_text())
    name, match = record["config"]["hidden_act"], record["match"]
    assert (record["config"]["eps"], match["hidden_act"], match["c"]) == ("match", "segem_n2", 0.3)
    assert hf_gem.parse(name) == hf_gem.GemSpec("segem", 2, match_eps(match["rms"], 2, 0.3))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "match")
    names = {module.spec.name for module in loaded.modules() if isinstance(module, hf_gem.modules.GemActivation)}
    assert names == {name}
    run_here(vision_train, tmp_path / "plain", *flags, f"--hidden_act={name}")
    plain = json.loads((tmp_path / "plain" / "record.json").read_text())
    for key in ("init_hash", "order_hash", "samples_hash", "activation_inputs"):
        assert record[key] == plain[key]
    assert losses(tmp_path / "match") == losses(tmp_path / "plain")


def build(**fields):
    return vision_train.build_model(vision_train.Config(**fields), DATA)


def test_more_stages_than_the_images_can_be_halved():
    build(widths="4,4,4,4")
    with pytest.raises(ConfigError, match=r"has 5 stages.*Images of 8 x 8 pixels allow 4\. Give fewer"):
        build(widths="4,4,4,4,4")


@pytest.mark.parametrize("act", ["gelu", "tanh", "prelu", "linear", "relu", "relu2", "egem"])
@pytest.mark.parametrize("model", ["convnet", "resnet8-cifar"])
def test_our_models_take_any_activation(model, act):
    names = {type(module).__name__ for module in build(model=model, hidden_act=act).modules()}
    assert type(ACT2FN[act]).__name__ in names


def test_nothing_behind_the_additions():
    same, none = (build(model="resnet8-cifar", act_after_add=which) for which in ("same", "none"))
    assert [sum("EGEM" in type(module).__name__ for module in model.modules()) for model in (same, none)] == [7, 4]
    assert none.config.act_after_add == "none"


def test_the_name_of_a_residual_network_may_have_its_width():
    assert [build(model=f"resnet8{width}-cifar").config.width for width in ("", "x4")] == [16, 4]


def test_a_model_that_cannot_be_fine_tuned_names_the_way_out(tmp_path):
    model, config = ConvNetForImageClassification(NO_ACTIVATIONS), vision_finetune.Config(model="x")
    with pytest.raises(ConfigError, match=r"in --model 'x'.*has no activation modules.*--hidden_act none"):
        vision_finetune.convert(model, config, DATA, torch.device("cpu"))


@pytest.mark.parametrize("fields", [{"eps": "match"}, {"eps": "fit", "fit_per_layer": True}])
def test_the_size_of_a_micro_batch_does_not_change_what_is_fitted(fields):
    class Images:
        def __len__(self):
            return 300

        def batch(self, indices):
            draw = np.random.default_rng(indices.tolist())
            return {"pixel_values": torch.from_numpy(draw.normal(size=(len(indices), 3, 8, 8))).float()}

    torch.manual_seed(0)
    model = ConvNetForImageClassification(ConvNetConfig(widths=(4,), hidden_act="gelu"))
    data = SimpleNamespace(train=Images())
    reports = {
        vision_finetune.convert(
            copy.deepcopy(model),
            vision_finetune.Config(model="x", micro_batch_size=size, **fields),
            data,
            torch.device("cpu"),
        )
        for size in (64, 4, "auto")
    }
    assert len(reports) == 1


@pytest.mark.parametrize("by_folder", [False, True])
def test_the_code_of_a_card_loads_a_model_of_this_package(cache, tmp_path, by_folder):
    """Without a name of the family in it too, which nothing but the import of its class makes known."""
    model = tmp_path / "model" if by_folder else "convnet"
    ConvNetConfig(widths=(4,)).save_pretrained(tmp_path / "model")
    widths = [] if by_folder else ["--widths=4"]
    flags = ("--steps=1", "--warmup_steps=0", *widths, "--hidden_act=gelu", f"--model={model}")
    run_here(vision_train, tmp_path / "run", cache, *SHORT, *flags)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.DOTALL)
    assert "registers the model" in code
    code += "\nassert type(model.layers[1]).__name__ == 'GELUActivation', model; processor.size"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


DIVERGING = (
    *("--widths=4", "--steps=1", "--warmup_steps=0", "--optimizer=sgd", "--learning_rate=1e25", "--grad_clip=0"),
    "--report_to=none",
)


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def check_diverged(folder):
    record = json.loads((folder / "record.json").read_text(), parse_constant=refuse)
    assert (record["status"], record["result"]["validation_loss"]) == ("diverged", None)
    assert record["result"]["best_validation_loss"] == record["result"]["initial_validation_loss"] > 0
    for line in (folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert not (folder / "config.json").exists()
    assert not list((folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip", "rollback"])
def test_a_run_that_diverges_at_its_last_update_has_not_finished(cache, tmp_path, on_nonfinite):
    with pytest.raises(TrainingError, match="stopped being finite"):
        run_here(vision_train, tmp_path, cache, *DIVERGING, f"--on_nonfinite={on_nonfinite}")
    check_diverged(tmp_path)


def test_all_processes_agree_that_a_run_has_diverged(cache, tmp_path):
    flags = (cache, *DIVERGING, f"--output_dir={tmp_path}", "--micro_batch_size=32")
    code, output = launch(2, *flags, recipe=VISION)
    assert code == 1, output
    assert output.count("error: the loss or the gradient stopped being finite at or before step 1") == 2
    check_diverged(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        ("--eps=fit",),
        ("--eps=match", "--fit_per_layer=yes"),
        ("--eps=0.3", "--ema_decay=0.5", "--mixup=0.2", "--cutmix=1.0"),
    ],
)
def test_fine_tuning(demo, cache, tmp_path, extra):
    flags = (cache, "--report_to=none", f"--model={demo[0]}", "--head_lr_ratio=2", *extra)
    printed = run_here(vision_finetune, tmp_path, *flags)
    before, converted, after = map(float, re.search(r"before ([\d.]+)%.* ([\d.]+)%.* ([\d.]+)%", printed).groups())
    trained = json.loads((demo[0] / "record.json").read_text())["result"]["validation_accuracy"]
    assert before == pytest.approx(100 * trained, abs=0.005)
    assert after > 95
    assert converted != before or "fit" in extra[0]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["before_conversion"]["accuracy"] == trained
    assert "4 activations replaced" in record["conversion"]
    assert len(record["activation_inputs"]["layers"]) == 4
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert hf_gem.audit(model, pixel_values=torch.zeros(1, 3, 8, 8)).num_gem == 4
    card = (tmp_path / "README.md").read_text()
    for fact in (
        "fine-tuned",
        f"replaced | {before:.2f} %",
        f"accuracy right after | {converted:.2f} %",
        "4 activations replaced",
    ):
        assert fact in card
    rates = losses(tmp_path, "learning_rate")
    assert rates[20] == pytest.approx(1e-3)  # of the layers before the last


def test_the_last_layer_is_new_where_it_is_asked_for(demo, cache, tmp_path):
    flags = (cache, *SHORT, f"--model={demo[0]}", "--learning_rate=1e-9")
    printed = run_here(vision_finetune, tmp_path / "a", *flags, "--new_head=yes")
    assert float(re.search(r"before ([\d.]+)%", printed)[1]) < 60


def test_averaged_weights_are_what_is_saved(demo, cache, tmp_path):
    flags = (cache, *SHORT, f"--model={demo[0]}", "--ema_decay=0.9")
    run_here(vision_finetune, tmp_path / "a", *flags, "--keep_checkpoints=9")
    resume = f"--resume={tmp_path / 'a' / 'checkpoints' / 'step_00000004'}"
    run_here(vision_finetune, tmp_path / "b", *flags, resume)
    one, two = (AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "a", "validation_loss") == losses(tmp_path / "b", "validation_loss")


def test_leaving_the_activations_is_a_baseline(demo, cache, tmp_path):
    printed = run_here(vision_finetune, tmp_path, cache, *SHORT, f"--model={demo[0]}", "--hidden_act=none")
    assert re.search(r"Accuracy before [\d.]+%, fine-tuned [\d.]+%", printed)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert "GELU" in {type(module).__name__.removesuffix("Activation") for module in model.modules()}
    card = (tmp_path / "README.md").read_text()
    assert "import hf_gem." not in card.replace("import hf_gem.training", "")
    assert "accuracy before fine-tuning" in card
    assert ModelCard(card).data.tags == ["activation-function"]
    assert not any(words in card for words in ("`none`", ", none", "replaced", "right after"))


@pytest.mark.parametrize("presets", [vision_train, vision_finetune])
def test_presets_are_valid(presets):
    for name, preset in presets.PRESETS.items():
        presets.Config(**preset).validate()
        assert preset["steps"] >= preset["warmup_steps"], name


def test_the_cifar_presets_are_those_of_the_paper():
    config = vision_train.Config(**vision_train.PRESETS["cifar10"])
    assert (config.steps, config.global_batch_size, config.optimizer) == (64000, 128, "sgd")
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.1, 0.9, 1e-4)


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (vision_train, ["--model=resnet21-cifar"], "--model must be resnet<6n+2>-cifar"),
        (
            vision_train,
            ["--model=timm/resnet18", "--own_gain"],
            "--own_gain must be false for models other than convnet",
        ),
        (vision_train, ["--act_after_add=none"], "--act_after_add must be same for models other than resnet-cifar"),
        (vision_train, ["--widths=3,x"], "--widths must be numbers such as 32,64,128"),
        (vision_train, ["--widths=8,0"], "--widths must be numbers such as 32,64,128, all above 0, got '8,0'"),
        (vision_train, ["--model=my-cifar", "--own_gain"], "--own_gain must be false for models other than convnet"),
        (vision_train, [f"--output_dir={__file__}"], "--output_dir must be a folder or a new path"),
        (vision_finetune, ["--model=x", "--hidden_act=relu"], "--hidden_act must be a name of the family"),
        *[
            (vision_finetune, ["--model=x", f"--eps={eps}"], "--eps must be a finite number above 0, or fit or match")
            for eps in ("small", "inf", "nan", "-1")
        ],
        (vision_finetune, ["--model=x", "--hidden_act=gem", "--eps=0.01"], "gem has a fixed eps of 1"),
        (vision_finetune, ["--model=x", "--hidden_act=none", "--eps=0.1"], "--eps must be left out: --hidden_act none"),
        *[
            (vision_finetune, ["--model=x", flag, "--fit_per_layer"], "--fit_per_layer must be false without --eps fit")
            for flag in ("--eps=0.1", "--hidden_act=none")
        ],
        (vision_finetune, ["--model=x", "--match_c=0.2"], "--match_c must be left out without --eps match, got 0.2"),
        (vision_finetune, ["--model="], "--model must be timm/<name>"),
        *[
            (
                vision_finetune,
                ["--model=x", "--fit_batches=8", flag],
                "--fit_batches must be left out without --eps fit",
            )
            for flag in ("--eps=0.1", "--hidden_act=none")
        ],
        (
            vision_finetune,
            ["--model=x", "--hidden_act=none", "--momentum=0.8"],
            "--momentum must be left out with --optimizer adamw, got 0.8",
        ),
        (
            vision_train,
            ["--model=resnet20-cifar", "--widths=8,16"],
            "--widths must be left out for models other than convnet",
        ),
    ],
)
def test_wrong_values_name_the_flag(recipe, flags, message, capsys):
    with pytest.raises(SystemExit):
        recipe.main(flags)
    assert message in capsys.readouterr().err
