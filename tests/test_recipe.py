import dataclasses
import json
import subprocess
import sys

import pytest

from effnetlib import EffnetlibError, Recipe
from effnetlib.presets import PAPER_PRESETS, SESSION_MINUTES
from effnetlib.recipe import setting
from effnetlib.reports import paper
from effnetlib.suites.parameters import settings_table, train_recipe

DIGITS = Recipe.preset("digits-64-lars")


def test_the_eleven_presets_are_those_of_table_2():
    assert list(paper.table2()["preset"]) == list(PAPER_PRESETS)


@pytest.mark.parametrize(
    ("name", "peak_lr", "warmup", "steps"),
    [("b2-4096-rmsprop", 0.256, 5, 109_474), ("b5-16384-rmsprop", 1.024, 5, 27_368), ("b2-16384-lars", 15.104, 50, 27_368),
     ("b2-32768-lars", 15.104, 50, 13_684), ("b5-65536-lars", 20.736, 43, 6_842)],
)  # fmt: skip
def test_presets_hold_the_papers_settings(name, peak_lr, warmup, steps):
    recipe = Recipe.preset(name)
    assert recipe.peak_lr == pytest.approx(peak_lr)
    assert (recipe.warmup_epochs, recipe.total_steps, recipe.epochs) == (warmup, steps, 350)
    assert recipe.warmup_steps == int(warmup * 1_281_167 / recipe.global_batch_size)
    assert recipe.decay == ("polynomial" if "lars" in name else "exponential")


def test_below_16_384_the_peak_of_lars_falls_with_the_root_of_the_batch():
    peaks = [Recipe.preset(f"b0-{batch}-lars").peak_lr for batch in (64, 1024, 4096, 16384, 32768)]
    assert peaks == pytest.approx([15.104 / 16, 15.104 / 4, 15.104 / 2, 15.104, 15.104])
    assert Recipe.preset("b0-1024-lars").lr_per_256 == pytest.approx(0.944)  # and not 3.776


def test_momentum_has_lars_schedule_and_groups_and_the_linear_rule():
    lars, momentum = Recipe.preset("b2-32768-lars"), Recipe.preset("b2-32768-momentum")
    assert (momentum.optimizer, momentum.peak_lr) == ("momentum", 12.8)
    same = ("warmup_epochs", "decay", "decay_power", "batch_norm_batch_size", "epochs", "loss_weight_decay")
    assert [getattr(momentum, name) for name in same] == [getattr(lars, name) for name in same]
    assert momentum.end_lr / momentum.peak_lr == pytest.approx(lars.end_lr / lars.peak_lr)
    assert Recipe.preset("cifar10-4096-momentum").peak_lr == 3.2


def test_batch_norm_groups_follow_the_released_code():
    assert Recipe.preset("b2-32768-lars").num_groups == 256
    assert [Recipe.preset(f"b2-{b}-rmsprop").num_groups for b in (32, 256, 512, 4096, 32768)] == [1, 8, 2, 8, 8]


def test_the_presets_of_a_session_are_b0_by_the_papers_rules_and_short():
    colab, kaggle = Recipe.preset("colab"), Recipe.preset("kaggle")
    for recipe in (colab, kaggle):
        assert (recipe.variant, recipe.optimizer, recipe.precision) == ("b0", "rmsprop", "bfloat16")
        paper = Recipe.preset(f"b0-{recipe.global_batch_size}-rmsprop")
        assert recipe.epochs / recipe.decay_epochs == pytest.approx(paper.epochs / paper.decay_epochs)
    colab.validate(1)
    kaggle.validate(8)
    assert set(SESSION_MINUTES) == {"kaggle"} and 0 < SESSION_MINUTES["kaggle"] < 9 * 60


def test_imagenette_is_trained_at_128_pixels_by_nano_or_b0():
    nano, b0 = Recipe.preset("imagenette-256-lars"), Recipe.preset("imagenette-b0-256-lars")
    assert (nano.dataset, nano.variant, nano.resolution, nano.augmentation) == ("imagenette", "nano", 128, "inception")
    assert b0 == nano.replace(variant="b0")


def test_any_other_name_of_that_form_is_a_preset():
    assert Recipe.preset("b7-2048-lars").variant == "b7"
    assert Recipe.preset("b0-1024-rmsprop").resolution == 224
    assert Recipe() == Recipe.preset("b2-32768-lars")


def test_json_and_hash_survive_another_process():
    recipe = DIGITS.replace(seed=7, epochs=3)
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    code = "import json, sys, effnetlib; print(effnetlib.Recipe(**json.load(sys.stdin)).hash)"
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dataclasses.asdict(recipe)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == recipe.hash != DIGITS.hash
    assert recipe.replace(epochs=3.0).hash == recipe.hash


def test_adding_a_setting_changes_no_hash():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(Recipe):
        another: float = setting(0.5, "made up", above=0)

    fields = dataclasses.asdict(DIGITS)
    later = object.__new__(Later)
    vars(later).update(fields | {"another": 0.5})
    assert later.hash == DIGITS.hash
    vars(later).clear()
    vars(later).update(fields | {"another": 0.25})
    assert later.hash != DIGITS.hash


def test_help_explains_every_setting():
    table = settings_table().data
    assert list(table.index) == [field.name for field in dataclasses.fields(Recipe)]
    assert table.loc["label_smoothing", "accepted"] == "at least 0 and below 1"
    assert table.loc["decay", "accepted"] == "polynomial, exponential" and all(table["meaning"].str.len() > 4)


def test_evaluation_steps_end_with_the_last():
    recipe = DIGITS.replace(epochs=2, eval_every_epochs=0.75, warmup_epochs=0)
    assert recipe.total_steps == 44
    assert recipe.eval_steps == (16, 33, 44)


def test_an_evaluation_takes_a_step_or_more():
    assert DIGITS.replace(eval_every_epochs=0.0445372, epochs=0.5, warmup_epochs=0).eval_steps == tuple(range(1, 12))
    assert Recipe.preset("digits-2048-lars").eval_steps[-1] == 7  # a batch that is larger than the set
    folder = DIGITS.replace(dataset="/nowhere", eval_every_epochs=1e-9)  # not listed yet
    with pytest.raises(EffnetlibError, match="there is no data set '/nowhere'"):
        folder.validate(8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"global_batch_size": -64}, "global_batch_size must be above 0 and below 2,147,483,648, and is -64"),
        ({"global_batch_size": 64.0}, r"global_batch_size must be int, and is 64.0 \(float\)"),
        ({"seed": "3"}, r"seed must be int, and is '3' \(str\)"),
        ({"seed": True}, r"seed must be int, and is True \(bool\)"),
        ({"dropout": "x"}, "dropout must be float or None"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"epochs": float("nan")}, "epochs must be a finite number"),
        ({"seed": 2**32}, "seed must be at least 0 and below 4,294,967,296, and is 4294967296"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0, and is -1"),
        ({"decay_rate": 1.5}, "decay_rate must be above 0 and at most 1, and is 1.5"),
        ({"optimizer": "larz"}, "optimizer 'larz' is unknown: did you mean lars?"),
        ({"variant": "b8"}, "variant 'b8' is unknown"),
        ({"batch_norm_batch_size": 24}, "does not divide into batch-norm groups of 24: .* is (16|32)"),
        ({"batch_norm_batch_size": 128}, "does not divide into batch-norm groups of 128"),
        ({"warmup_epochs": 10}, "warmup_epochs 10 must be shorter than the run of 10 epochs"),
        ({"end_lr": 50.0}, "end_lr 50 is above the peak learning rate"),
        ({"eval_every_epochs": 1e-9}, "eval_every_epochs 1e-09 is less than a step: the least is 0.0445372"),
        ({"sed": 3}, "a recipe has no field 'sed': did you mean seed?"),
    ],
)
def test_mistakes_are_one_sentence(changes, sentence):
    with pytest.raises(EffnetlibError, match=sentence) as caught:
        DIGITS.replace(**changes)
    assert "\n" not in str(caught.value)


def test_a_group_that_does_not_fit_the_devices():
    recipe = DIGITS.replace(global_batch_size=96, batch_norm_batch_size=32)  # 3 groups
    recipe.validate(num_devices=3)
    with pytest.raises(EffnetlibError, match="3 batch-norm groups do not fit 8 devices .* try batch_norm_batch_size"):
        recipe.validate(num_devices=8)
    with pytest.raises(EffnetlibError, match="does not divide over 7 devices"):
        recipe.validate(num_devices=7)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(EffnetlibError, match="did you mean b2-4096-rmsprop?"):
        Recipe.preset("b2-4096-rmsprob")


def test_parameters_of_the_training_notebook():
    given = {"preset": "digits-64-lars", "seed": 3, "epochs": None, "directory": "x"}
    assert train_recipe(given) == DIGITS.replace(seed=3)
    more = {"settings": {"momentum": 0.5, "epochs": 12.0}, "warmup_epochs": 1.0}
    assert train_recipe({"preset": "digits-64-lars"} | more) == DIGITS.replace(
        momentum=0.5, epochs=12.0, warmup_epochs=1.0
    )
    with pytest.raises(EffnetlibError, match="no field 'momentun': did you mean momentum?"):
        train_recipe({"preset": "digits-64-lars", "settings": {"momentun": 0.5}})
    with pytest.raises(EffnetlibError, match="did you mean global_batch_size?"):
        train_recipe({"preset": "digits-64-lars", "global_batchsize": 128})


def test_an_unknown_field():
    with pytest.raises(EffnetlibError, match="no field 'lr'"):
        Recipe().replace(lr=1.0)
