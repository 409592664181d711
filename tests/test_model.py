import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effnetlib import EfficientNet, EffnetlibError, Recipe, make_mesh
from effnetlib.mesh import batch_sharding, replicated
from effnetlib.model import VARIANTS, _drop, block_specs, round_filters, stage_repeats
from effnetlib.ops import depthwise, pointwise
from effnetlib.ops.depthwise import TPU_NARROW_CHANNELS, depthwise_conv, plain_depthwise_conv
from effnetlib.ops.norm_swish import norm_swish, plain_norm_swish
from effnetlib.ops.norm_swish_gate import norm_swish_gate, plain_norm_swish_gate
from effnetlib.ops.pointwise import full_conv, plain_pointwise_conv, pointwise_conv
from effnetlib.planning.flops import count_params
from effnetlib.reports import paper
from effnetlib.step import make_train_step


@pytest.mark.parametrize(("name", "count"), paper.trainable_parameters().items())
def test_trainable_parameters(name, count):
    assert count_params(name) == count


@pytest.mark.parametrize(
    ("name", "stem", "head", "blocks"),
    [("b0", 32, 1280, 16), ("b1", 32, 1280, 23), ("b2", 32, 1408, 23), ("b3", 40, 1536, 26), ("b4", 48, 1792, 32),
     ("b5", 48, 2048, 39), ("b6", 56, 2304, 45), ("b7", 64, 2560, 55)],
)  # fmt: skip
def test_scaling_rules(name, stem, head, blocks):
    width = VARIANTS[name].width
    assert (round_filters(32, width), round_filters(1280, width), len(block_specs(name))) == (stem, head, blocks)


def test_rounding_never_loses_more_than_a_tenth():
    assert round_filters(4, 1.0) == 8
    assert round_filters(40, 0.25) == 16  # 10 rounds to 8, which is below 9
    assert stage_repeats("b1") == [2, 3, 3, 4, 4, 5, 2]  # a tenth more, rounded up


def test_nano_is_below_b0():
    nano, b0 = VARIANTS["nano"], VARIANTS["b0"]
    assert nano.width < b0.width and nano.depth < b0.depth and nano.resolution == 32


def test_drop_path_grows_linearly_from_zero():
    rates = [spec.drop_path for spec in block_specs("b0")]
    np.testing.assert_allclose(rates, 0.2 * np.arange(16) / 16)


def test_stochastic_depth_keeps_whole_examples_at_its_survival_and_divides_by_it():
    rate = 0.2 * 15 / 16  # of B0's last block: it survives at 1 - 0.2 i / N
    out = np.asarray(_drop(jnp.ones((20_000, 2, 2, 3)), rate, jax.random.key(0), (20_000, 1, 1, 1)))
    kept = out[:, 0, 0, 0] > 0
    np.testing.assert_array_equal(out, np.broadcast_to(kept[:, None, None, None], out.shape) / np.float32(1 - rate))
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * np.sqrt(rate * (1 - rate) / 20_000))
    np.testing.assert_array_equal(_drop(jnp.ones((4, 1)), 0.0, None, None), 1)


def test_squeeze_is_measured_from_the_block_input():
    model = nnx.eval_shape(lambda: EfficientNet("b0"))
    assert model.blocks[1].se.reduce.kernel.shape == (96, 4)  # a quarter of 16, not of 96


def test_initialisers():
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: EfficientNet("b0")))
    model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(EfficientNet("b0", rngs=nnx.Rngs(0))))())
    block = model.blocks[3]
    cases = [(model.stem.kernel, 2 / (9 * 32)), (block.depthwise, 2 / 25), (block.project.kernel, 2 / 40)]
    for value, variance in cases:
        assert float(jnp.std(value[...])) == pytest.approx(np.sqrt(variance), rel=0.1)
    classifier = model.classifier.kernel[...]
    assert float(jnp.abs(classifier).max()) == pytest.approx(1 / np.sqrt(1000), rel=1e-3)
    assert float(jnp.abs(block.depthwise[...]).max()) > 2.5 * np.sqrt(2 / 25)  # not truncated at two deviations
    assert not model.classifier.bias[...].any() and not block.se.reduce.bias[...].any()


def test_logits_and_precision():
    images = jnp.ones((2, 32, 32, 3))
    for dtype in (jnp.bfloat16, jnp.float32):
        model = nnx.eval_shape(lambda dtype=dtype: EfficientNet("nano", 10, dtype=dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        logits, convolved = jax.eval_shape(lambda m: (m(images), m.stem(images)), model)
        assert (logits.shape, logits.dtype, convolved.dtype) == ((2, 10), jnp.float32, dtype)


def products(program):
    """(dtypes of the operands, precisions) -> how many products of a lowered program have them."""
    found = Counter()
    for line in program.splitlines():
        if re.search(r"stablehlo\.(dot_general|dot|convolution)\b", line):
            operands = line.rpartition(" : (")[2].partition(") ->")[0]
            found[(*re.findall(r"x([a-z]+\d+)>", operands), *re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line))] += 1
    return found


HIGHEST, DEFAULT = (("f32", "f32", "HIGHEST", "HIGHEST"), ("bf16", "bf16", "DEFAULT", "DEFAULT"))


@pytest.mark.parametrize("setting", ["bfloat16", "tensorfloat32", "highest"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_product_of_float32_asks_for_the_highest_precision_whatever_jax_is_set_to(precision, setting):
    recipe = Recipe.preset("digits-64-lars").replace(precision=precision)
    init, step, graphdef = make_train_step(recipe)
    state = jax.eval_shape(init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((64, recipe.resolution, recipe.resolution, 3), jnp.uint8)
    batch = {"images": images, "labels": jax.ShapeDtypeStruct((64,), jnp.int32)}
    model = nnx.merge(graphdef, state.params, state.batch_stats)
    with jax.default_matmul_precision(setting):
        training = jax.jit(step).trace(state, batch, jax.random.key(0), jnp.float32(0))
        calling = jax.jit(lambda model, images: model(images)).trace(model, images)
    gates, blocks = 2, 8
    for platform in ("tpu", "cuda", "cpu"):
        forward, both = (products(each.lower(lowering_platforms=(platform,)).as_text()) for each in (calling, training))
        # Of each in the forward pass, two in the backward pass.
        gates_and_classifier = gates * blocks + 1
        if precision == "float32":
            assert forward.keys() == both.keys() == {HIGHEST} and both[HIGHEST] > 3 * gates_and_classifier
        elif platform == "cpu":
            assert (
                forward.keys() == both.keys() == {HIGHEST, DEFAULT}
            )  # where kernels' gradients are products in float32
        else:
            assert forward.keys() == both.keys() == {HIGHEST, DEFAULT}
            assert (forward[HIGHEST], both[HIGHEST]) == (gates_and_classifier, 3 * gates_and_classifier)


def test_training_needs_no_key_order_but_the_key():
    images = jnp.array(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)

    def logits(*keys):
        model = EfficientNet("nano", 10, dtype=jnp.float32)
        return [model(images, train=True, key=key) for key in keys]

    first, again, other = jax.jit(logits)(jax.random.key(0), jax.random.key(0), jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_unknown_variant():
    with pytest.raises(EffnetlibError, match=r"no EfficientNet variant 'b9'"):
        EfficientNet("b9")


def test_both_forms_of_the_pointwise_gradient_are_float32_and_agree():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.array(rng.normal(size=(2, 5, 7, channels)), jnp.bfloat16) for channels in (4, 6))
    wanted = np.einsum("nhwc,nhwf->cf", np.float64(x), np.float64(cotangent))
    for form in (pointwise._product_dkernel, pointwise._convolution_dkernel):
        got = form(x, cotangent)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_gradients_of_bfloat16_convolutions_are_float32():
    # 1 + 2**-9 is no bfloat16: what one device found and another's 1 would be added up to 2.
    x = jnp.array([1.0, 2.0**-9], jnp.bfloat16).reshape(2, 1, 1, 1)
    for convolve, shape in ((pointwise_conv, (1, 1)), (lambda x, k: depthwise_conv(x, k, 1), (3, 3, 1, 1))):
        of_kernel = jax.vjp(lambda k, f=convolve: f(x, k), jnp.ones(shape))[1](jnp.ones_like(x))[0]
        assert float(of_kernel.sum()) == 1.0 + 2.0**-9


@pytest.mark.parametrize("channels", [4, TPU_NARROW_CHANNELS])
def test_the_form_follows_the_platform_that_is_compiled_for(channels):
    def convolve(x, depthwise, pointwise):
        return pointwise_conv(depthwise_conv(x, depthwise, 1), pointwise)

    shapes = (1, 8, 8, channels), (3, 3, 1, channels), (channels, channels)
    traced = jax.jit(convolve).trace(*map(jnp.ones, shapes))
    assert " convolution(" not in traced.lower(lowering_platforms=("cpu",)).compile().as_text()
    convolutions = traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.convolution")
    assert convolutions == (2 if channels == TPU_NARROW_CHANNELS else 0)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "convolutions"), [(14, 3, 1, 0), (15, 3, 1, 1), (14, 5, 1, 1), (15, 5, 2, 0)]
)
def test_a_gpu_convolves_where_its_library_is_fast(size, kernel, stride, convolutions):
    def convolve(x, depthwise, pointwise):
        return pointwise_conv(depthwise_conv(x, depthwise, stride), pointwise)

    traced = jax.jit(convolve).trace(
        jnp.ones((1, size, size, 64)), jnp.ones((kernel, kernel, 1, 64)), jnp.ones((64, 64))
    )
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(("batch", "convolutions"), [(256, 2), (1024, 4)])
def test_a_gpu_finds_the_gradients_of_large_kernels_in_parts(batch, convolutions):
    def gradients(x, cotangent, kernel):
        return jax.vjp(lambda *arguments: depthwise_conv(*arguments, 2), x, kernel)[1](cotangent)

    images = (jax.ShapeDtypeStruct((batch, size, size, 96), jnp.bfloat16) for size in (112, 56))
    traced = jax.jit(gradients).trace(*images, jax.ShapeDtypeStruct((3, 3, 1, 96), jnp.float32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize("size", [7, 8])
def test_the_stem_as_patches_is_the_convolution(size):
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, size, size + 1, 3)), rng.normal(size=(3, 3, 3, 4))
    wanted = jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(full_conv(jnp.float32(x), jnp.float32(k), 2), wanted, atol=1e-5)


@pytest.fixture(params=["cpu", "cuda", "default"])
def form(request, monkeypatch):
    """Runs here what is lowered for CPU, for an NVIDIA GPU, or for everything else."""

    def choose(*arguments, **forms):
        return forms.get(request.param, forms["default"])(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


@pytest.mark.parametrize(
    ("form", "channels"), [("cpu", 4), ("cuda", 4), ("default", 4), ("default", TPU_NARROW_CHANNELS)], indirect=["form"]
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 16])
def test_every_form_of_the_depthwise_convolution_is_the_convolution(kernel, stride, size, channels, form, monkeypatch):
    two_rows = 2 * 2 * (size + 1) * channels * 4  # of the batch
    monkeypatch.setattr(depthwise, "CPU_CACHE_BYTES", two_rows)
    monkeypatch.setattr(depthwise, "CUDNN_SLOW_BYTES", 4 * two_rows)
    monkeypatch.setattr(depthwise, "CUDNN_CHANNELS", 3)
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(2, size, size + 1, channels)), jnp.float32)
    k = jnp.array(rng.normal(size=(kernel, kernel, 1, channels)), jnp.float32)
    wanted, wanted_vjp = jax.vjp(lambda x, k: plain_depthwise_conv(x, k, stride), x, k)
    got, got_vjp = jax.vjp(lambda x, k: depthwise_conv(x, k, stride), x, k)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    for ours, theirs in zip(got_vjp(wanted), wanted_vjp(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_devices_that_share_a_batch_meet_once_for_the_gradient_of_a_depthwise_kernel(monkeypatch):
    monkeypatch.setattr(depthwise, "CPU_CACHE_BYTES", 0)
    mesh = make_mesh(8)
    sharded, everywhere = batch_sharding(mesh), replicated(mesh)

    def of_kernel(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(depthwise_conv(x, kernel, 1) ** 2))(kernel)

    shapes = (
        jax.ShapeDtypeStruct((16, 4, 4, 8), "float32", sharding=sharded),
        jax.ShapeDtypeStruct((3, 3, 1, 8), "float32", sharding=everywhere),
    )
    program = jax.jit(of_kernel, out_shardings=everywhere).lower(*shapes).compile().as_text()
    loops, entry = program.split("\nENTRY")
    collective = re.compile(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(")
    assert " while(" in entry and not collective.search(loops)
    assert collective.findall(entry) == ["all-reduce"]


def swish_arguments(seed=0):
    rng = np.random.default_rng(seed)
    channel = (4, 1, 1, 6)
    x, mean, scale, shift = (jnp.float32(rng.normal(size=shape)) for shape in ((4, 5, 7, 6), channel, channel, channel))
    weights = [tuple(jnp.float32(rng.normal(size=shape)) for shape in shapes) for shapes in (((6, 2), 2), ((2, 6), 6))]
    return (x, mean, scale, shift), weights, jnp.float32(rng.normal(size=x.shape))


def assert_same_values_and_gradients(ours, plain, arguments, cotangent):
    (wanted, wanted_vjp), (got, got_vjp) = jax.vjp(plain, *arguments), jax.vjp(ours, *arguments)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4),
        got_vjp(cotangent),
        wanted_vjp(cotangent),
    )


def test_the_plain_norm_and_swish_and_gate_are_the_formula():
    inputs, weights, _ = swish_arguments()
    x, mean, scale, shift = (np.float64(value) for value in inputs)
    z = (x - mean) * scale + shift
    wanted = z / (1 + np.exp(-z))
    np.testing.assert_allclose(plain_norm_swish(*inputs), wanted, atol=1e-5)
    (reduce, reduce_bias), (expand, expand_bias) = jax.tree.map(np.float64, weights)
    hidden = wanted.mean((1, 2), keepdims=True) @ reduce + reduce_bias
    factor = 1 / (1 + np.exp(-(hidden / (1 + np.exp(-hidden)) @ expand + expand_bias)))
    np.testing.assert_allclose(plain_norm_swish_gate(*inputs, weights), wanted * factor, atol=1e-5)


def test_every_form_of_norm_and_swish_is_the_formula(form):
    inputs, _, cotangent = swish_arguments()
    assert_same_values_and_gradients(norm_swish, plain_norm_swish, inputs, cotangent)


def test_every_form_of_norm_swish_and_gate_is_the_formula(form):
    inputs, weights, cotangent = swish_arguments()
    assert_same_values_and_gradients(norm_swish_gate, plain_norm_swish_gate, (*inputs, weights), cotangent)


@pytest.mark.parametrize(("channels", "filters"), [(6, 24), (24, 6), (64, 8)])
def test_every_form_of_the_pointwise_convolution_is_the_product_of_pixels(form, channels, filters):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 3, channels)), rng.normal(size=(channels, filters))
    dy = rng.normal(size=(2, 3, 3, filters))
    y, vjp = jax.vjp(pointwise_conv, jnp.float32(x), jnp.float32(kernel))
    dx, dkernel = vjp(jnp.float32(dy))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-4)
    np.testing.assert_allclose(plain_pointwise_conv(jnp.float32(x), jnp.float32(kernel)), x @ kernel, atol=1e-4)
    np.testing.assert_allclose(dkernel, x.reshape(-1, channels).T @ dy.reshape(-1, filters), atol=1e-4)
    np.testing.assert_allclose(dx, dy @ kernel.T, atol=1e-4)
