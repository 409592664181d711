"""The command line: run a suite, render its reports, plan for a slice, fetch data, bring weights in and out."""

import contextlib
import locale
import os
import sys
from pathlib import Path

import click

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.runs.paths import user_path
from effnetlib.runs.progress import say
from effnetlib.suites.parameters import assignments


class _Commands(click.Group):
    """Bad input ends in one sentence and exit code 2. What failed ends in one sentence and 1. There is never a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except EffnetlibError as error:
            say(f"effnetlib: {error}", err=True)
            context.exit(1 if isinstance(error, FailedError) else 2)
        except KeyboardInterrupt:
            say("effnetlib: interrupted; what was finished is kept", err=True)
            context.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """EfficientNet at supercomputer scale (arXiv 2011.00071): suites of notebooks, their reports, and data."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # if a standard stream is closed, the next file that is opened would take its number
    os.close(number)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # all our text files are UTF-8, whatever the shell says
    os.environ["MPLBACKEND"] = "agg"  # no windows; an IDE's own name would end the import of matplotlib


_set = click.option(
    "--set", "changes", metavar="KEY=VALUE", multiple=True, help="Another value of a setting; repeatable."
)
_price = click.option("--price", type=click.FloatRange(0), help="Dollars per chip and hour.")


@main.command()
@click.argument("suite")
@click.option("--only", metavar="NAME", help="Execute this run or report alone, or those that match, as in 'lars-*'.")
@_set
@click.option("--start-timeout", metavar="SECONDS", type=click.IntRange(1), help="What a kernel may take to start: 60.")
def run(suite, only, changes, start_timeout):
    """Execute the notebooks of SUITE (a YAML file) and render their reports. What is finished is skipped.

    --set gives every run another parameter."""
    from effnetlib.runs.stopping import TRY_AGAIN
    from effnetlib.suites import execute
    from effnetlib.suites.suite import load_suite

    loaded = load_suite(suite, assignments(changes))
    outcomes = execute.execute(loaded, only, start_timeout or execute.START_SECONDS)
    say(execute.summary(outcomes))
    say(loaded.directory / "index.html")
    statuses = {outcome.status for outcome in outcomes}
    if "preempted" in statuses:
        say("effnetlib: stopped as asked; the same command goes on where this one stopped", err=True)
        sys.exit(TRY_AGAIN)
    sys.exit("failed" in statuses)


@main.command()
@click.argument("directories", nargs=-1, metavar="[DIR]...")
@_price
def report(directories, price):
    """Render reports of what is there already. Nothing is trained.

    One DIR, a suite's outputs (outputs/laptop if none is given): its executed reports again as HTML, and the index. A folder
    with records and no reports, as one from a pod, gets the paper's tables beside its own results.

    Two or more DIR, runs' folders (or without the seed, as in lars-64: all its seeds): one page that compares them."""
    from effnetlib.reports.pages import compare, report_suite
    from effnetlib.runs.paths import outputs_folder

    if len(directories) < 2:
        say(report_suite(directories[0] if directories else outputs_folder() / "laptop", price))
    elif price is None:
        say(compare(directories))
    else:
        raise EffnetlibError("--price is for the paper against ours, and not for a comparison of runs")


@main.command()
@click.argument("preset")
@click.option("--topology", required=True, help="Generation, and chips in each direction: v3:32x16x1, v5e:2x4.")
@_set
@_price
@click.option("--images-per-core", type=click.FloatRange(0, min_open=True), help="Images/s that a host's core makes.")
@click.option("--json", "as_json", is_flag=True, help="All figures, as JSON.")
def plan(preset, topology, changes, price, images_per_core, as_json):
    """Predict what PRESET (such as b0-1024-lars) needs on a TPU slice that need not be there: memory, time, collectives, and
    the images per second that its hosts must make.

    It compiles the real train and evaluation steps, which takes minutes the first time. --set changes a setting of the
    recipe. Needs pip install 'effnetlib[plan]'."""
    import jax

    from effnetlib.planning.plan import plan
    from effnetlib.recipe import Recipe

    jax.config.update("jax_platforms", "cpu")  # the compiler's own package would look for a TPU
    recipe = Recipe.preset(preset).replace(**assignments(changes))
    found = plan(recipe, topology, chip_hour=price, images_per_core=images_per_core)
    if not say(found.to_json() if as_json else found.table()):
        raise FailedError("the plan could not be written: is the device full?")
    if not found.fits:
        smaller = f"a batch of {found.largest_batch} would" if found.largest_batch else "nor does any part of its batch"
        raise FailedError(f"{preset} does not fit {topology}; {smaller}")


@main.group()
def data():
    """Get data sets."""


@data.command()
@click.argument("name")
@click.option("--archive", metavar="FILE", help="An archive that you have already.")
def fetch(name, archive):
    """Fetch NAME into the cache folder ($EFFNETLIB_DATA, else ~/.cache/effnetlib), checked by md5: cifar10, imagenette (160
    pixels), imagenette-320."""
    from effnetlib.data import fetch

    say(fetch(name, archive and user_path(archive, "--archive")))


@data.command()
@click.argument("source")
@click.argument("dest")
@click.option("--convert", is_flag=True, help="Make RGB JPEGs of CMYK photographs, other formats, and misnamed files.")
@click.option("--partial", is_flag=True, help="Take an ImageNet that is not whole.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out what cannot be read; the manifest names it.")
def prepare(source, dest, convert, partial, skip_unreadable):
    """Write the photographs of SOURCE into ArrayRecord shards in DEST: ImageNet's official archives, Kaggle's folders, or any
    folder with train/CLASS/*.jpg. The same command goes on where it was stopped."""
    from effnetlib.data.photographs import in_words
    from effnetlib.data.prepare import prepare

    source, dest = user_path(source, "SOURCE", folder=True), user_path(dest, "DEST", folder=True)
    manifest = prepare(source, dest, convert=convert, partial=partial, skip_unreadable=skip_unreadable)
    for name, split in manifest["splits"].items():
        shards = f"{len(split['shards'])} shards, {split['fingerprint']}"
        say(f"{name}: {split['examples']:,} photographs of {split['origin']} in {shards}")
        for _, photograph, reason in (skipped for shard in split["shards"] for skipped in shard.get("skipped", ())):
            say(f"left out: {photograph}: {reason}")
    say(f"not used: {in_words(manifest['unused'])}")
    say(dest)


@data.command()
@click.argument("dest")
def check(dest):
    """Read everything in DEST, which `data prepare` wrote, and compare it with its manifest."""
    from effnetlib.data.prepare import check

    problems = check(user_path(dest, "DEST", folder=True))
    say("\n".join([*problems, f"{len(problems)} problems"]) if problems else "all is as the manifest says")
    sys.exit(bool(problems))


@main.group()
def weights():
    """Import published weights, export ours."""


@weights.command("import")
@click.argument("file")
@click.option("--to", metavar="FOLDER", help="The folder to write; outputs/weights/NAME if not given.")
def import_(file, to):
    """Check FILE and write it into a folder, as a model.safetensors of ours.

    FILE is timm's tf_efficientnet_b*.safetensors with its config.json beside it, or Keras' .weights.h5, .h5 or .keras
    (needs pip install 'effnetlib[keras]')."""
    from effnetlib.runs.paths import outputs_folder
    from effnetlib.weights.pretrained import import_weights

    to = to or outputs_folder() / "weights" / Path(file).stem.removesuffix(".weights")
    to = user_path(to, "--to", folder=True)
    pretrained = import_weights(file, to)
    say(f"{pretrained.variant}, {pretrained.num_classes:,} classes")
    if "note" in pretrained.origin:
        say(pretrained.origin["note"])
    say(to)


@weights.command("export")
@click.argument("source")
@click.argument("file")
@click.option("--best", is_flag=True, help="Of a run, the checkpoint with the highest top-1 and not the latest.")
def export_(source, file, best):
    """Write the weights of SOURCE (a run's folder, an import's, or a file) to FILE, .safetensors under timm's names."""
    from effnetlib.weights.pretrained import Pretrained

    file = user_path(file, "FILE")
    if not file.parent.is_dir():
        raise EffnetlibError(f"there is no folder {file.parent}")
    pretrained = Pretrained.load(source, best=best)
    pretrained.export(file)
    say(f"{pretrained.variant}, {pretrained.num_classes:,} classes")
    say(file)
