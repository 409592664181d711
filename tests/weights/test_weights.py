"""Ours against Keras' EfficientNet, an independent implementation, and weights through the files of others."""

import json
import os
import re
import sys

os.environ["KERAS_BACKEND"] = "jax"

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from effnetlib import EfficientNet, EffnetlibError
from effnetlib.model import VARIANTS, block_specs, head_filters
from effnetlib.weights import files, names
from effnetlib.weights.names import KERAS, TIMM, to_ours
from effnetlib.weights.pretrained import Pretrained

PAPER_VARIANTS = [name for name in VARIANTS if name != "nano"]
CLASSES = 10


@pytest.fixture
def efficientnet(monkeypatch):
    """Keras' module, whose initial weights are drawn by numpy: Keras compiles a program for each shape, which takes 30 s."""
    from keras import initializers
    from keras.src.applications import efficientnet  # takes the rates of dropout, which the public functions fix

    class FanOut(initializers.Initializer):
        rng = np.random.default_rng(0)

        def __call__(self, shape, dtype=None):
            scale = np.sqrt(2 / np.prod([*shape[:-2], shape[-1]]))
            return self.rng.normal(0, scale, shape).astype(np.float32)

    for name in ("CONV_KERNEL_INITIALIZER", "DENSE_KERNEL_INITIALIZER"):
        monkeypatch.setattr(efficientnet, name, FanOut())
    return efficientnet


def keras_model(efficientnet, variant, size, **options):
    rng, scale = np.random.default_rng(0), VARIANTS[variant]
    model = efficientnet.EfficientNet(
        scale.width, scale.depth, size, input_shape=(size, size, 3), classes=CLASSES, weights=None,
        classifier_activation=None, name=f"efficientnet{variant}", weights_name="", **options,
    )  # fmt: skip
    # Away from the initial ones and zeros, where a slip between gamma, beta, mean and variance would not show.
    for variable in model.variables:
        name, value = variable.path.split("/")[-1], np.asarray(variable)
        if variable.path.startswith("normalization"):
            continue
        if name == "gamma":
            variable.assign(rng.uniform(0.5, 1.0, value.shape).astype(np.float32))
        elif name == "moving_variance":  # above one, for what grows from block to block would make rounding grow too
            variable.assign(rng.uniform(1.0, 2.0, value.shape).astype(np.float32))
        elif name in ("beta", "moving_mean", "bias"):
            variable.assign(rng.normal(0, 0.1, value.shape).astype(np.float32))
    return model


def named(model):
    return {variable.path: np.asarray(variable) for variable in model.variables}


def images(batch, size):
    return np.random.default_rng(1).normal(size=(batch, size, size, 3)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", PAPER_VARIANTS)
def test_logits_equal_keras(variant, efficientnet, tmp_path):
    size = 33  # odd, so that an error in padding at stride 2 shows
    model = keras_model(efficientnet, variant, size)
    x = images(2, size)
    trainable, fixed = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
    # Keras divides by 255 inside.
    keras_logits = jax.jit(lambda *args: model.stateless_call(*args, training=False)[0])
    wanted = np.asarray(keras_logits(trainable, fixed, 255 * x))
    found = to_ours(named(model), KERAS, variant, CLASSES)
    got = jax.jit(lambda m, x: m(x))(Pretrained(found, variant, CLASSES, size, (), {}).model(), x)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    if variant == "b0":  # and the files that Keras itself writes
        for save, name in ((model.save_weights, "b0.weights.h5"), (model.save, "b0.h5"), (model.save, "b0.keras")):
            save(tmp_path / name)
            jax.tree.map(np.testing.assert_array_equal, files.read(tmp_path / name)["weights"], found)


@pytest.mark.slow
def test_training_gradients_and_statistics_equal_keras(efficientnet):
    model = keras_model(efficientnet, "b0", 32, dropout_rate=0.0, drop_connect_rate=0.0)
    x, weight = images(8, 32), np.random.default_rng(2).normal(size=(8, CLASSES)).astype(np.float32)
    trainable = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]

    def keras_loss(trainable):
        logits, moved = model.stateless_call(trainable, fixed, 255 * x, training=True)
        return jnp.sum(logits * weight), moved

    grads, moved = jax.jit(jax.grad(keras_loss, has_aux=True))(trainable)
    paths = [variable.path for variable in model.trainable_variables + model.non_trainable_variables]
    by_name = {path: np.asarray(value) for path, value in zip(paths, [*grads, *moved], strict=True)}
    wanted = to_ours(by_name, KERAS, "b0", CLASSES)

    without = nnx.eval_shape(lambda: EfficientNet("b0", CLASSES, dtype=jnp.float32, dropout=0.0, drop_path=0.0))
    params, stats = jax.tree.map(jnp.asarray, to_ours(named(model), KERAS, "b0", CLASSES))
    graphdef, _ = nnx.split(without)

    def loss(params):
        merged = nnx.merge(graphdef, params, stats)
        logits = merged(x, train=True, key=jax.random.key(0))
        return jnp.sum(logits * weight), nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    got_grads, got_stats = jax.jit(jax.grad(loss, has_aux=True))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_stats, wanted[1])
    # Gradients that are zero but for rounding (a shift right before a batch norm) are as noisy as the largest are exact.
    noise = 1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + noise),
                 got_grads, wanted[0])  # fmt: skip


@pytest.fixture(scope="module")
def b0():
    rng, (_, state) = np.random.default_rng(3), names.skeleton("b0", CLASSES, "float32")
    kinds = (nnx.to_pure_dict(state.filter(kind)) for kind in (nnx.Param, nnx.BatchStat))
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tuple(kinds))


def test_safetensors_and_back(b0, tmp_path):
    files.write(tmp_path / "b0.safetensors", b0, "b0", CLASSES)
    jax.tree.map(np.testing.assert_array_equal, files.read(tmp_path / "b0.safetensors")["weights"], b0)


def test_names_and_layouts_are_timms(b0):
    tensors = names.to_timm(b0, "b0", CLASSES)
    shapes = {
        "conv_stem.weight": (32, 3, 3, 3), "bn1.running_var": (32,), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1), "blocks.0.0.bn2.weight": (16,),
        "blocks.1.0.conv_pw.weight": (96, 16, 1, 1), "blocks.1.0.conv_pwl.weight": (24, 96, 1, 1),
        "blocks.1.0.bn3.bias": (24,), "blocks.6.0.se.conv_reduce.weight": (48, 1152, 1, 1),
        "conv_head.weight": (1280, 320, 1, 1), "classifier.weight": (CLASSES, 1280),
    }  # fmt: skip
    assert {name: tensors[name].shape for name in shapes} == shapes
    # timm's own count of tensors for tf_efficientnet_b0, less its 49 counters.
    assert len(tensors) == 360 - 49 and "blocks.0.0.bn3.weight" not in tensors


def test_keras_files_of_both_kinds(tmp_path, b0):
    found, flat = {}, flatten_dict(b0[0]) | flatten_dict(b0[1])
    order = ["kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]
    for path, _, (_, name), (_, shape) in names.tensors("b0", CLASSES):
        layer, variable = name.split("/")
        found.setdefault(layer, []).append((variable, np.asarray(flat[path]).reshape(shape)))
    for values in found.values():
        values.sort(key=lambda pair: order.index(pair[0]))
    with h5py.File(tmp_path / "new.weights.h5", "w") as file:
        for i, (layer, values) in enumerate(found.items()):
            group = file.create_group(f"layers/layer_{i}/vars")
            group.attrs["name"] = layer
            for k, (_, value) in enumerate(values):
                group[str(k)] = value
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in found]
        for layer, values in found.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name, _ in values]
            for name, value in values:
                group[f"{layer}/{name}:0"] = value
    for name in ("new.weights.h5", "old.h5"):
        read = files.read(tmp_path / name)
        assert (read["variant"], read["num_classes"], read["image_size"], read["class_names"]) == (
            "b0",
            CLASSES,
            224,
            (),
        )
        assert read["origin"].keys() == {"file", "sha256"}
        jax.tree.map(np.testing.assert_array_equal, read["weights"], b0)


def test_without_h5py_a_sentence_says_how_to_have_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(EffnetlibError, match=r"x\.keras needs h5py: pip install 'effnetlib\[keras\]'$"):
        files.read(tmp_path / "x.keras")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_recognised_by_its_blocks_and_width(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "to_ours", lambda *_, **__: None)
    shapes = {"conv_stem": 1, "conv_head": head_filters(variant), "classifier": CLASSES}
    shapes |= {f"{i}.conv_dw": 1 for i in range(len(block_specs(variant)))}
    tensors = {f"{name}.weight": np.zeros((outputs, 1), np.float32) for name, outputs in shapes.items()}
    assert files.read(save_timm(tmp_path / "x.safetensors", tensors))["variant"] == variant


def test_wrong_files_are_refused_by_name(b0, tmp_path):
    tensors = names.to_timm(b0, "b0", CLASSES)
    tensors["extra.weight"] = tensors.pop("bn1.bias")
    tensors["conv_head.weight"] = np.zeros((1280, 320), np.float32)
    with pytest.raises(EffnetlibError) as caught:
        to_ours(tensors, TIMM, "b0", CLASSES, source="x")
    for sentence in ("bn1.bias is missing", "extra.weight is not b0's", "conv_head.weight has shape [1280, 320]"):
        assert sentence in str(caught.value)
    with pytest.raises(EffnetlibError, match="classifier.bias is missing; classifier.weight is missing"):
        bare = {name: value for name, value in names.to_timm(b0, "b0", CLASSES).items() if "classifier" not in name}
        to_ours(bare, TIMM, "b0")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for name, sentence in (
        ("x.safetensors", "cannot be read"),
        ("x.pth", "neither a .safetensors"),
        ("x.h5", "cannot be read"),
    ):
        with pytest.raises(EffnetlibError, match=sentence):
            files.read(tmp_path / name)


def nested(efficientnet, kind, **options):
    """A user's model with Keras' EfficientNet inside."""
    import keras

    base = efficientnet.EfficientNetB0(weights=None, classes=CLASSES, input_shape=(32, 32, 3), **options)
    inside = keras.Input((32, 32, 3))
    if kind == "sequential":
        return base, keras.Sequential([inside, base])
    if kind == "twice":
        return base, keras.Sequential([keras.Sequential([inside, base]), keras.layers.Dense(3, name="mine")])
    if kind == "with a head inside":
        head = keras.layers.Dense(3, name="mine")
        return base, keras.Sequential([keras.Sequential([inside, base, head]), keras.layers.Dense(3)])
    if kind == "functional":
        return base, keras.Model(inside, keras.layers.Dense(3, name="mine")(base(inside)))
    if kind == "flat":
        return base, keras.Model(base.input, keras.layers.Dense(3, name="mine")(base.output))
    pooled = keras.layers.GlobalAveragePooling2D()(base(inside) if kind == "headed" else base.output)
    return base, keras.Model(inside if kind == "headed" else base.input, keras.layers.Dense(3, name="mine")(pooled))


FORMS = ("x.h5", "x.weights.h5", "x.keras")


@pytest.mark.parametrize("kind", ["sequential", "twice", "functional", "with a head inside"])
def test_a_network_inside_a_model_of_keras(kind, efficientnet, tmp_path):
    base, model = nested(efficientnet, kind)
    wanted = to_ours(named(base), KERAS, "b0", CLASSES)
    for form in FORMS:
        save = model.save_weights if form == "x.weights.h5" else model.save
        save(tmp_path / form)
        read = files.read(tmp_path / form)
        assert (read["variant"], read["num_classes"]) == ("b0", CLASSES)
        jax.tree.map(np.testing.assert_array_equal, read["weights"], wanted)
        note = read["origin"]["note"]
        assert bool(re.search("mine.* is left out", note)) == (kind != "sequential"), note
        assert "with the mean [0.0, 0.0, 0.0], and here it is ImageNet's" in note


@pytest.mark.parametrize("kind", ["headed", "flat headed", "flat"])
def test_another_head_is_said(kind, efficientnet, tmp_path):
    _, model = nested(efficientnet, kind, include_top=kind == "flat")
    missing = (
        "" if kind == "flat" else "predictions/bias is missing; predictions/kernel is missing; mine/bias is not b0's; "
    )
    for form in FORMS:
        save = model.save_weights if form == "x.weights.h5" else model.save
        save(tmp_path / form)
        with pytest.raises(EffnetlibError, match=f"{missing}.*mine/kernel is not b0's$"):
            files.read(tmp_path / form)


def save_timm(path, tensors, config=None, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or None)
    if config is not None:
        (path.parent / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def config(architecture="tf_efficientnet_b0", tag="aa_in1k", top=None, **changes):
    """As timm writes it."""
    cfg = {
        "tag": tag,
        "input_size": [3, 240, 240],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    } | changes
    return {"architecture": architecture, "num_classes": CLASSES, "pretrained_cfg": cfg} | (top or {})


@pytest.fixture(scope="module")
def timm(b0):
    return names.to_timm(b0, "b0", CLASSES)


def test_what_a_config_says_is_known(timm, b0, tmp_path):
    path = save_timm(tmp_path / "model.safetensors", timm, config(label_names=list("abcdefghij")))
    read = files.read(path)
    jax.tree.map(np.testing.assert_array_equal, read["weights"], b0)
    assert (read["image_size"], read["class_names"]) == (240, tuple("abcdefghij"))
    assert read["origin"].keys() == {"file", "sha256", "tag"} and read["origin"]["tag"] == "aa_in1k"
    for labels in ({str(9 - i): name for i, name in enumerate("jihgfedcba"[::-1])}, list("jihgfedcba")):
        save_timm(path, timm, config(top={"label_names": labels}))
        assert files.read(path)["class_names"] == tuple("jihgfedcba")
    old = config()
    save_timm(path, timm, {"architecture": "tf_efficientnet_b0_ns", **old["pretrained_cfg"], "tag": None})
    read = files.read(path)
    assert (read["image_size"], read["class_names"], read["origin"]["tag"]) == (240, (), "ns")


@pytest.mark.parametrize(("config", "sentence"), [
    (config("efficientnet_b0", "ra_in1k"), "is efficientnet_b0, with other layers, padding or batch-norm epsilon"),
    (config("tf_efficientnet_lite0"), "is tf_efficientnet_lite0"), (config("tf_efficientnetv2_b0"), "is tf_efficientnetv2_b0"),
    (config("tf_efficientnet_es"), "is tf_efficientnet_es"), (config("tf_efficientnet_cc_b0_4e"), "is tf_efficientnet_cc_b0_4e"),
    (config("tf_efficientnet_b8"), "is tf_efficientnet_b8"), (config("efficientnet_b0_gn"), "is efficientnet_b0_gn"),
    (config(tag="ap_in1k", mean=[0.5] * 3, std=[0.5] * 3), r"mean \[0.5, 0.5, 0.5\], not \[0.485, 0.456, 0.406\] and .* std"),
    (config(mean=[0, 0, 0], std=[1, 1, 1]), r"mean \[0, 0, 0\]"), ({"architecture": "tf_efficientnet_b0_ap"}, "mean 0.5"),
    (config(top={"model_args": {"bn_eps": 1e-5}}), "built with another bn_eps"),
    (config("tf_efficientnet_b1"), "does not hold b1 with 10 classes: blocks.0.1.conv_dw.weight is missing"),
    (config(label_names=["a"]), "has 10 logits, but its config states 1 class names"),
    (config(top={"num_classes": 7}), "has 10 logits, but its config states 7 classes"),
    (config(top={"global_pool": "max"}), "built with another global_pool"),
    ({"architecture": "hf-hub:timm/tf_efficientnet_b0.ap_in1k"}, "mean 0.5"),
    ("{", "config.json is damaged, or is not timm's config"), ("[]", "config.json is damaged"), ('{"architecture": 3}', "is damaged"),
    ({"architecture": "tf_efficientnet_b0", "input_size": "big"}, "is damaged"),
])  # fmt: skip
def test_what_has_our_names_and_shapes_and_is_another_network_is_refused(timm, config, sentence, tmp_path):
    path = save_timm(tmp_path / "model.safetensors", timm, config)
    with pytest.raises(EffnetlibError, match=sentence) as caught:
        files.read(path)
    assert "\n" not in str(caught.value)
    if " is not ours" in str(caught.value):
        assert re.search(r"take timm's tf_efficientnet_b[0*]\.aa_in1k, for example", str(caught.value))


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b0.aa_in1k", "hf-hub:timm/tf_efficientnet_b0.aa_in1k", "TF_EfficientNet_B0.aa_in1k"]
)
def test_a_tag_a_prefix_and_upper_case_are_no_other_network(timm, name, tmp_path):
    path = save_timm(
        tmp_path / "model.SAFETENSORS", timm, config(name, None, top={"global_pool": "avg"}, num_classes=1000)
    )
    read = files.read(path)
    assert read["variant"] == "b0" and read["origin"]["tag"] == "aa_in1k"


@pytest.mark.parametrize(("name", "change", "sentence"), [
    ("bn1.weight", lambda value: value * np.nan, "bn1.weight holds values that are not finite"),
    ("bn1.running_var", lambda value: value - 9, "bn1.running_var holds values that are not finite, or variances below 0"),
    ("conv_stem.weight", lambda value: value.astype(np.int8), "conv_stem.weight is int8, not floating-point"),
])  # fmt: skip
def test_what_are_no_weights_is_refused(timm, name, change, sentence, tmp_path):
    with pytest.raises(EffnetlibError, match=sentence):
        files.read(save_timm(tmp_path / "model.safetensors", timm | {name: change(timm[name])}, config()))


def test_where_nothing_says_which_network_it_is_that_is_said(timm, tmp_path):
    path = save_timm(tmp_path / "x.safetensors", timm, format="pt")
    origin = files.read(path)["origin"]
    assert origin.keys() == {"file", "sha256", "note"}
    assert origin["note"].startswith("no config states which of timm's networks x.safetensors holds: efficientnet_b*")
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert files.read(path)["origin"] == origin


def test_a_network_inside_a_model_of_pytorch_and_files_of_others(timm, b0, tmp_path):
    inside = {f"backbone.{name}": value for name, value in timm.items()} | {"neck.weight": np.zeros(3, np.float32)}
    read = files.read(save_timm(tmp_path / "x.safetensors", inside, config()))
    assert read["variant"] == "b0"
    assert read["origin"]["note"] == "x.safetensors holds more than b0, and neck is left out"
    jax.tree.map(np.testing.assert_array_equal, read["weights"], b0)
    bare = {name: value for name, value in timm.items() if "classifier" not in name}
    with pytest.raises(
        EffnetlibError, match="b0 with 1000 classes: classifier.bias is missing; classifier.weight is missing$"
    ):
        files.read(save_timm(tmp_path / "x.safetensors", bare))
    with pytest.raises(EffnetlibError, match="classifier.weight is missing; fc.weight is not b0's$"):
        files.read(save_timm(tmp_path / "x.safetensors", bare | {"fc.weight": np.zeros((3, 1280), np.float32)}))
    others = {f"layer{i}.0.conv.weight": np.zeros(1, np.float32) for i in range(9)}
    with pytest.raises(EffnetlibError, match=r"its layers are layer0.0.conv, .* and 4 more"):
        files.read(save_timm(tmp_path / "x.safetensors", others))


def test_ours_say_what_they_are_and_where_they_come_from(b0, tmp_path):
    known = {"image_size": 64, "class_names": tuple("abcdefghij"), "origin": {"run": "mine", "tag": "x", "note": "y"}}
    files.write(tmp_path / "b0.safetensors", b0, "b0", CLASSES, **known)
    (tmp_path / "config.json").write_text(json.dumps(config("efficientnet_b0")))  # of another file
    read = files.read(tmp_path / "b0.safetensors")
    assert {name: read[name] for name in known} == known
