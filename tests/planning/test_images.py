"""What the compilers of Colab's and Kaggle's images made of our programs, as `make images` published it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from effnetlib.planning.topology import CHIPS
from effnetlib.runs.paths import published_folder

RECORD = json.loads((published_folder() / "images.json").read_text())
IMAGES = Path(__file__).parents[1] / "images"


def programs(image):
    return {(each["case"], each["program"]): each for each in RECORD[image]["programs"]}


@pytest.mark.parametrize("image", ["colab", "kaggle"])
def test_the_published_programs_are_by_the_images_versions_and_fit(image):
    pinned = dict(line.split("==") for line in (IMAGES / f"{image}.txt").read_text().splitlines() if "==" in line)
    versions = RECORD[image]["versions"]
    assert all(versions[name] == pinned[name] for name in ("jax", "jaxlib", "libtpu", "numpy"))
    cases = {
        (f"digits-64-lars@{place}", name) for place in ("v5e:1x1", "v5e:2x4") for name in ("init", "train", "eval")
    }
    assert cases <= programs(image).keys()
    assert all(each["hbm_bytes"] < CHIPS["v5e"].hbm_bytes for each in programs(image).values())


@pytest.mark.parametrize("image", ["colab", "kaggle"])
def test_an_images_compiler_exchanges_what_the_locked_one_does(image):
    """In the same groups of devices, where jax can read them from the compiled program."""
    for key, ours in programs(image).items():
        if theirs := programs("lock").get(key):
            unread = any(each["groups"] is None for each in ours["exchanges"])
            found, wanted = (
                Counter({(e["kind"], "" if unread else str(e["groups"])): e["count"] for e in [*each]})
                if not unread
                else sum((Counter({e["kind"]: e["count"]}) for e in each), Counter())
                for each in (ours["exchanges"], theirs["exchanges"])
            )
            assert found == wanted, key
