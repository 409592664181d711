"""The project's own files agree with one another."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from effnetlib import Recipe, Record, load_records
from effnetlib.model import count_params
from effnetlib.planning import find_plan, load_plans
from effnetlib.publish import companion, readme_tables, verdicts, with_tables

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "outputs/published/laptop"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_conda_environment_is_the_projects():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python"))
    assert python == f"python{PROJECT['requires-python']}"
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert pip == [*wanted, "--editable ."]


def test_the_lock_holds_every_dependency_by_version_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    locked = {canonical(line) for line in lock.splitlines() if "==" in line}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert {canonical(requirement) for requirement in wanted} <= locked
    assert "://" not in lock and "index" not in lock.replace("importlib", "")


def test_the_oldest_versions_are_those_that_the_project_allows():
    lock = (ROOT / "requirements-oldest.lock").read_text().splitlines()
    oldest = dict(line.partition(" ;")[0].split("==") for line in lock)
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in PROJECT["dependencies"])
    for name, floor in floors.items():
        assert f"{oldest[name]}.".startswith(f"{floor}."), name
    assert [oldest[name] for name in ("jax", "jaxlib", "flax", "optax")] == ["0.7.2", "0.7.2", "0.11.2", "0.2.8"]


def test_citation_and_changelog_state_the_projects_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    stated = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert citation["version"] == stated == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "2011.00071" in citation["references"][0]["url"]


def test_make_help_lists_every_target():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(targets)


def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    done = subprocess.run(["make", "env", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "effnetlib needs Python 3.11 or newer" in done.stderr


def test_the_readme_states_the_published_records():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", readme.partition("| run |")[2].partition("\n\n")[0], re.M)
    assert len(rows) == 7
    for name, cells in rows:
        record = Record.load(PUBLISHED / "runs" / name)
        recipe, result = record.recipe, record.result
        wanted = [f"{recipe.epochs:g}", str(recipe.total_steps), str(record.environment["devices"])]
        wanted += [f"{100 * result[key]:.1f} %" for key in ("peak_top1", "final_top1")] + [
            f"{result['images_per_second']:.0f}"
        ]
        assert [cell.strip() for cell in cells.split("|")] == wanted, name
    assert f"{count_params('nano', 10):,} parameters" in readme
    links = re.findall(r"\]\((outputs/[^)]*)\)", readme)
    assert len(links) >= 8 and all((ROOT / link).exists() for link in links)
    photos = Record.load(ROOT / "outputs/published/photos/runs/photos")
    assert photos.status == "completed" and not photos.environment["git_commit"].endswith("+changes")
    report = (ROOT / "outputs/published/photos/11_photographs.html").read_text()
    assert f"{100 * photos.result['final_top1']:.1f} % of\n{photos.result['eval_examples']} evaluation" in readme
    assert "211 of 372 right, top-1 56.7%" in report and "51.6% to 61.7%" in report
    assert "211 of the 372 test photographs (56.7 %; 95 % interval 51.6 to 61.7;" in readme


def test_what_is_published_is_complete_small_and_good_enough():
    records = load_records(PUBLISHED / "runs")
    assert len(records) == 12 and {record.status for record in records} == {"completed"}
    assert all(record.result["eval_examples"] == 360 for record in records)
    assert not any((record.environment["git_commit"] or "").endswith("+changes") for record in records)
    plain = {record.name: record.result["peak_top1"] for record in records}
    assert plain["rmsprop-64"] >= 0.97 and plain["lars-64"] >= 0.97
    assert sum(path.stat().st_size for path in PUBLISHED.rglob("*") if path.is_file()) < 5_000_000
    assert not list(PUBLISHED.rglob("checkpoints"))


def test_the_readme_and_the_companion_page_are_what_make_publish_writes():
    published, readme = ROOT / "outputs/published", (ROOT / "README.md").read_text()
    assert with_tables(readme, readme_tables(published)) == readme, "make publish"
    assert companion(published) == (published / "index.html").read_text(), "make publish"
    names = [
        name for each in verdicts(published) for name in (f"{each['report']}.html", f"executed/{each['report']}.ipynb")
    ]
    places = [published / each["suite"] for each in verdicts(published) for _ in range(2)]
    assert all((place / name).exists() for place, name in zip(places, names, strict=True))


def test_the_readme_states_the_published_bench():
    bench = json.loads((ROOT / "outputs/published/input.json").read_text())
    rates = {(rate["step"], rate["threads"]): f"{rate['median']:,.0f}" for rate in bench["rates"]}
    sentence = (ROOT / "README.md").read_text().partition("On one of two\n")[2].partition("([figures]")[0]
    wanted = ["decode, crop, resize, flip", "the same, AutoAugment", "tf.data: decode, crop, resize, flip",
              "plain Pillow: decode, crop, same resize", "plain Pillow: decode, crop, its own resize"]  # fmt: skip
    assert all(f"{rates[step, 1]}" in sentence for step in wanted)
    assert f"make {bench['ratios']['2 threads over one, with AutoAugment']:.2f} times" in sentence


def test_the_readme_states_the_published_chaos():
    chaos = json.loads((ROOT / "outputs/published/chaos.json").read_text())
    assert chaos["faults"] >= 50 and chaos["lost"] == [] and not chaos["environment"]["git_commit"].endswith("+changes")
    sentence = (
        f"at random: {chaos['faults']} kills, signals and damaged files over {chaos['runs_completed']} runs, "
        f"{chaos['recoveries']} times started again, nothing lost to the bit"
    )
    assert sentence in (ROOT / "README.md").read_text()


def test_a_recipe_has_one_published_plan_a_slice():
    plans = load_plans(ROOT / "outputs/published/plans")
    assert len(plans) == len({(plan.recipe_hash, plan.topology) for plan in plans})
    assert all("flags" not in plan.versions for plan in plans)


def test_the_readme_states_the_published_plans():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (v\w+:\w+) \|(.*)\|$", readme, re.M)
    assert len(rows) == 6
    for preset, topology, cells in rows:
        plan = find_plan(load_plans(ROOT / "outputs/published/plans"), Recipe.preset(preset), topology)
        wanted = [f"{plan.hbm_bytes / 2**30:.2f}", f"{1e3 * plan.step_seconds:.1f}", f"{plan.all_reduce_share:.1%}",
                  f"{plan.images_per_second:,.0f}", f"{plan.minutes:.0f}"]  # fmt: skip
        assert [cell.strip() for cell in cells.split("|")] == wanted, preset
        assert f"libtpu {plan.versions['libtpu']} under jax {plan.versions['jax']}" in readme
