"""Properties that hold for any input, searched for counterexamples."""

import dataclasses
import json

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effnetlib import EffnetlibError, Recipe, make_mesh
from effnetlib.data import Split, eval_batches
from effnetlib.data.loader import positions
from effnetlib.mesh import SLICES, batch_sharding, groups_fit, replica_groups

# A search must be the same on every machine; an example that compiles something may be slow.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("suite")

PRESETS = st.builds(
    "{}-{}-{}".format,
    st.sampled_from(["b0", "b2", "b5", "b7", "digits", "cifar10"]),
    st.integers(1, 100_000),
    st.sampled_from(["rmsprop", "lars"]),
)
ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))


@given(PRESETS, st.integers(0, 2**32 - 1))
def test_recipes_survive_json_with_their_hash(name, seed):
    recipe = Recipe.preset(name).replace(seed=seed)
    again = Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe))))
    assert again == recipe and again.hash == recipe.hash and again is not recipe
    assert recipe.replace(seed=(seed + 1) % 2**32).hash != recipe.hash
    assert recipe.num_groups * recipe.batch_norm_batch_size == recipe.global_batch_size
    assert recipe.eval_steps[-1] == recipe.total_steps and recipe.eval_steps[0] >= 1


@given(st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), ANYTHING)
def test_any_value_of_any_field_is_taken_or_refused_in_a_sentence(name, value):
    try:
        recipe = Recipe.preset("digits-64-lars").replace(**{name: value})
    except EffnetlibError as error:
        assert name.split("_")[0] in str(error) and "\n" not in str(error).replace(repr(value), "")
    else:
        assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
        assert getattr(recipe, name) == value and type(recipe.epochs) is float


@given(st.sampled_from(sorted(SLICES)), st.integers(0, 9))
def test_replica_groups_are_a_partition(replicas, power):
    size = min(2**power, replicas)
    groups = replica_groups(replicas, size)
    assert groups.shape == (replicas // size, size)
    np.testing.assert_array_equal(np.sort(groups, axis=None), np.arange(replicas))


@given(st.integers(1, 64), st.integers(1, 8))
def test_a_mesh_holds_each_device_once_or_is_refused(groups, count):
    devices = jax.devices()[:count]
    if not groups_fit(groups, count):
        with np.testing.assert_raises(EffnetlibError):
            make_mesh(groups, devices)
        return
    mesh = make_mesh(groups, devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    assert mesh.shape["bn_group"] * mesh.shape["bn_member"] == count
    assert mesh.shape["bn_member"] == max(1, count // groups)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))
def test_evaluation_pads_to_exact_counts(examples, share, devices):
    labels = np.arange(examples, dtype=np.int32)
    split = Split(len(labels), (), "", lambda i: (np.full((2, 2, 3), i, np.uint8), int(labels[i])))
    sharding = batch_sharding(make_mesh(devices, jax.devices()[:devices]))
    seen = []
    for batch in eval_batches(split, batch=share * devices, size=2, augmentation="none", sharding=sharding):
        mask = np.asarray(batch["mask"])
        assert mask.shape == (share * devices,)
        seen += np.asarray(batch["labels"])[mask].tolist()
        np.testing.assert_array_equal(np.asarray(batch["images"])[mask, 0, 0, 0], np.asarray(batch["labels"])[mask])
    assert seen == labels.tolist()


@given(st.integers(1, 50), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_the_stream_visits_every_example_once_an_epoch(examples, batch, seed):
    steps = -(-2 * examples // batch)
    pairs = [positions(examples, seed, step, batch) for step in range(steps)]
    epochs, indices = (np.concatenate(part) for part in zip(*pairs, strict=True))
    for epoch in (0, 1):
        assert sorted(indices[epochs == epoch]) == list(range(examples))
