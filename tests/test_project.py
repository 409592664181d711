"""The project's own files agree with one another."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from publish import claims_json, readme_tables, with_tables

from effnetlib import Record, load_records
from effnetlib.planning.plan import load_plans
from effnetlib.reports.published import verdicts

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


READMES = ("README.md", "effnetlib/README.md", "notebooks/README.md", "notebooks/launch/README.md", "outputs/README.md")


def test_the_readmes_are_short_and_every_link_leads_somewhere():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "[![", "![")))
    for name in READMES:
        text, folder = (ROOT / name).read_text(), (ROOT / name).parent
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        for link in links:
            path, _, place = link.partition("#")
            target = folder / path if path else ROOT / name
            assert target.exists(), (name, link)
            if place:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                assert place in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                    name,
                    link,
                )


def test_what_is_published_is_complete_small_and_good_enough():
    records = load_records(PUBLISHED / "runs")
    assert len(records) == 12 and {record.status for record in records} == {"completed"}
    assert all(record.result["eval_examples"] == 360 for record in records)
    assert not any((record.environment["git_commit"] or "").endswith("+changes") for record in records)
    plain = {record.name: record.result["peak_top1"] for record in records}
    assert plain["rmsprop-64"] >= 0.97 and plain["lars-64"] >= 0.97
    assert sum(path.stat().st_size for path in PUBLISHED.rglob("*") if path.is_file()) < 5_000_000
    assert not list(PUBLISHED.rglob("checkpoints"))
    photos = Record.load(ROOT / "outputs/published/photos/runs/photos")
    assert photos.status == "completed" and not photos.environment["git_commit"].endswith("+changes")


def test_the_readmes_and_the_claims_are_what_make_publish_writes():
    published = ROOT / "outputs/published"
    for name, tables in readme_tables(published).items():
        text = (ROOT / name).read_text()
        assert with_tables(text, tables) == text, "make publish"
    found = verdicts(published)
    assert claims_json(found) == (published / "claims.json").read_text(), "make publish"
    assert all((path.parents[1] / f"{path.stem}.html").exists() for path, _ in found)
    assert sum(path.stat().st_size for path in published.rglob("*") if path.is_file()) < 12_000_000


def test_the_published_chaos_lost_nothing():
    chaos = json.loads((ROOT / "outputs/published/chaos.json").read_text())
    assert chaos["faults"] >= 50 and chaos["lost"] == [] and not chaos["environment"]["git_commit"].endswith("+changes")


def test_a_recipe_has_one_published_plan_a_slice():
    plans = load_plans(ROOT / "outputs/published/plans")
    assert len(plans) == len({(plan.recipe_hash, plan.topology) for plan in plans})
    assert all("flags" not in plan.versions for plan in plans)
