"""`effnetlib selftest` on eight simulated devices: all is right there, and each check sees the fault that it is for."""

import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from effnetlib import GroupedBatchNorm, Record, training
from effnetlib.__main__ import main
from effnetlib.errors import FailedError
from effnetlib.planning import selftest
from effnetlib.runs.stopping import PreemptedError


def lower_once(recipe, mesh):
    """As `train` compiles it in the tests: equal programs once."""
    init, lowered, *_ = training.lower_train_step(recipe, mesh)
    return lambda key: init.lower(key).compile({"xla_backend_optimization_level": 0})(key), lowered, None, None


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(selftest, "SECONDS", 0.0)
    monkeypatch.setattr(selftest, "lower_train_step", lower_once)


def test_on_this_machine_every_check_is_right(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["selftest"])
    header, *table = capsys.readouterr().out.splitlines()
    assert header.split() == ["check", "expected", "found"]
    names = "versions devices products groups steps resume memory transfer digits photographs"
    assert [line.split()[:2] for line in table] == [["ok", name] for name in names.split()], table
    assert ended.value.code == 0
    found = dict(zip(names.split(), table, strict=True))
    assert f"jax {jax.__version__}, " in found["versions"] and "8 x cpu (cpu), " in found["devices"]
    assert "groups of 1, 2, 4, 8" in found["groups"] and found["memory"].endswith("not known")
    assert "154 MB in " in found["transfer"] and re.search(r"[1-9][\d,]* images/s$", found["photographs"])


def test_a_product_in_bfloat16_is_named(monkeypatch):
    def in_bfloat16(x, kernel):
        return jnp.matmul(*(a.astype(jnp.bfloat16) for a in (x, kernel)), preferred_element_type=jnp.float32)

    monkeypatch.setattr(selftest, "pointwise_conv", in_bfloat16)
    _, found, ok = selftest.products()
    assert found.endswith(": it is bfloat16") and not ok


def test_a_wrong_gradient_of_a_product_is_seen(monkeypatch):
    right = selftest.depthwise_conv
    wrong = jax.custom_vjp(lambda x, kernel: right(x, kernel, 1))
    wrong.defvjp(lambda x, kernel: (right(x, kernel, 1), (x, kernel)), lambda saved, dy: (saved[0], 1.1 * saved[1]))
    monkeypatch.setattr(selftest, "depthwise_conv", lambda x, kernel, stride: wrong(x, kernel))
    assert not selftest.products()[2]


def test_statistics_of_other_groups_are_seen(monkeypatch):
    def of_all(features, num_groups, rngs):
        return GroupedBatchNorm(features, num_groups=1, rngs=rngs)

    monkeypatch.setattr(selftest, "GroupedBatchNorm", of_all)
    _, found, ok = selftest.groups()
    assert not ok and "in groups of " in found and "in groups of 8" not in found


@pytest.mark.parametrize(("donates", "spread"), [(True, 0.0), (False, 0.0), (True, 1e-3)])
def test_a_state_that_is_kept_is_seen_and_a_loss_that_depends_on_the_devices(donates, spread, monkeypatch):
    def made_up(recipe, mesh):
        def step(state, batch, key, lr):
            new = jax.tree.map(jnp.copy, state)
            if donates:
                state["w"].delete()
            return new, {"loss": 2.0 + spread * mesh.size}

        return lambda key: {"w": jnp.ones(3)}, SimpleNamespace(compile=lambda: step), None, None

    monkeypatch.setattr(selftest, "lower_train_step", made_up)
    _, found, ok = selftest.steps()
    assert ok == (donates and not spread)
    assert found == f"losses {7 * spread / 2.001 if spread else 0:.1e} apart, {0 if donates else 4} arrays left"


def test_a_resume_that_does_not_go_on_is_seen(whole, monkeypatch):
    def stands_still(recipe, directory, max_minutes=None):
        assert recipe == whole.recipe
        if max_minutes is not None:
            raise PreemptedError("stopped")
        if not directory.exists():
            shutil.copytree(whole.directory, directory)
        return Record.load(directory)

    monkeypatch.setattr(selftest, "train", stands_still)
    _, found, ok = selftest.resume()
    assert not ok and re.fullmatch(r"[1-9]\d* arrays differ; the stop was running", found)


def test_a_check_that_raises_is_a_row_and_the_exit_code_is_1(monkeypatch, capsys):
    def busy():
        raise FailedError("another process holds the chips")

    for name in ("products", "groups", "steps", "resume", "transfer", "digits", "photographs"):
        monkeypatch.setattr(selftest, name, lambda: ("", "", True))
    monkeypatch.setattr(selftest, "wait_for_devices", busy)
    with pytest.raises(SystemExit) as ended:
        main(["selftest"])
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert ended.value.code == 1 and failed == [
        f"{'FAILED':8}{'devices':14}{'no error':36}FailedError: another process holds the chips"
    ]


def test_what_the_chips_want_is_the_published_plans(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [type("Chip", (), {"device_kind": "TPU v5 lite"})] * 8)
    assert selftest._plan("kaggle").images_per_second > 30_000
    assert selftest._plan("colab") is None
