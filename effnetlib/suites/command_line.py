"""The command line: run a suite, render its reports, plan for a slice, get data, import and export weights."""

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
    """Bad input ends in one sentence and exit code 2, a failure in one sentence and 1. There is never a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except EffnetlibError as error:
            say(f"effnetlib: {error}", err=True)
            context.exit(1 if isinstance(error, FailedError) else 2)
        except KeyboardInterrupt:
            say("effnetlib: interrupted; finished work is kept", err=True)
            context.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """EfficientNet at supercomputer scale (arXiv 2011.00071): suites of notebooks, their reports, and data."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # if a standard stream is closed, the next file opened would take its number
    os.close(number)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # all our text files are UTF-8, whatever the shell says
    os.environ["MPLBACKEND"] = "agg"  # no windows; a backend that only an IDE has would break the import of matplotlib


_set = click.option("--set", "changes", metavar="KEY=VALUE", multiple=True, help="Change a setting; repeatable.")
_price = click.option("--price", type=click.FloatRange(0), help="Dollars per chip and hour.")


@main.command()
@click.argument("suite")
@click.option("--only", metavar="NAME", help="Execute only this run or report, or all that match, as 'lars-*'.")
@_set
@click.option("--start-timeout", metavar="SECONDS", type=click.IntRange(1), help="Time limit of a kernel start: 60.")
def run(suite, only, changes, start_timeout):
    """Execute the notebooks of SUITE (a YAML file) and render their reports. Finished ones are skipped.

    --set changes a parameter of every run."""
    from effnetlib.runs.stopping import TRY_AGAIN
    from effnetlib.suites import execute
    from effnetlib.suites.suite import load_suite

    loaded = load_suite(suite, assignments(changes))
    outcomes = execute.execute(loaded, only, start_timeout or execute.START_SECONDS)
    say(execute.summary(outcomes))
    say(loaded.directory / "index.html")
    statuses = {outcome.status for outcome in outcomes}
    if "preempted" in statuses:
        say("effnetlib: stopped as asked; the same command goes on from here", err=True)
        sys.exit(TRY_AGAIN)
    sys.exit("failed" in statuses)


@main.command()
@click.argument("directories", nargs=-1, metavar="[DIR]...")
@_price
def report(directories, price):
    """Render reports of finished runs. Nothing is trained.

    One DIR, the outputs of a suite (default: outputs/laptop): renders its executed reports and the index again. If the folder
    has only records, for example from a pod, the report shows the paper's tables beside its results.

    Two or more DIR, the folders of runs: one page that compares them. lars-64, without a seed, means all seeds."""
    from effnetlib.reports.pages import compare, report_suite
    from effnetlib.runs.paths import outputs_folder

    if len(directories) < 2:
        say(report_suite(directories[0] if directories else outputs_folder() / "laptop", price))
    elif price is None:
        say(compare(directories))
    else:
        raise EffnetlibError("--price is for one suite, not for a comparison of runs")


@main.command()
@click.argument("preset")
@click.option("--topology", required=True, help="TPU generation, and chips per direction: v3:32x16x1, v5e:2x4.")
@_set
@_price
@click.option("--images-per-core", type=click.FloatRange(0, min_open=True), help="Input images/s per host core.")
@click.option("--json", "as_json", is_flag=True, help="All figures, as JSON.")
def plan(preset, topology, changes, price, images_per_core, as_json):
    """Predict the needs of PRESET (such as b0-1024-lars) on a TPU slice: memory, time, collectives, and the images per second
    that its hosts must prepare. No TPU is needed.

    The real train and evaluation steps are compiled. This takes minutes the first time. --set changes a setting of the
    recipe. Needs pip install 'effnetlib[plan]'."""
    import jax

    from effnetlib.planning.plan import plan
    from effnetlib.recipe import Recipe

    jax.config.update("jax_platforms", "cpu")  # libtpu, which compiles, would look for a TPU
    recipe = Recipe.preset(preset).replace(**assignments(changes))
    found = plan(recipe, topology, chip_hour=price, images_per_core=images_per_core)
    if not say(found.to_json() if as_json else found.table()):
        raise FailedError("the plan could not be written: is the device full?")
    if not found.fits:
        smaller = f"a batch of {found.largest_batch} would" if found.largest_batch else "no smaller batch fits either"
        raise FailedError(f"{preset} does not fit {topology}; {smaller}")


@main.command()
def selftest():
    """Check that this machine computes what it should, and how fast its parts are, in about a minute. The table can be pasted
    into a bug report. The exit code is 1 if a check failed. In a notebook, run it before the kernel uses the TPU."""
    from effnetlib.planning.selftest import selftest

    sys.exit(not selftest())


@main.group()
def data():
    """Get data sets."""


@data.command()
@click.argument("name")
@click.option("--archive", metavar="FILE", help="An archive that you already have.")
def fetch(name, archive):
    """Fetch NAME into the cache folder ($EFFNETLIB_DATA, else ~/.cache/effnetlib), and check its md5. NAME is cifar10,
    imagenette (160 pixels) or imagenette-320."""
    from effnetlib.data import fetch

    say(fetch(name, archive and user_path(archive, "--archive")))


@data.command()
@click.argument("source")
@click.argument("dest")
@click.option("--convert", is_flag=True, help="Convert CMYK photographs, other formats and misnamed files to RGB.")
@click.option("--partial", is_flag=True, help="Accept an incomplete ImageNet.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out unreadable photographs; the manifest names them.")
def prepare(source, dest, convert, partial, skip_unreadable):
    """Write the photographs of SOURCE into ArrayRecord shards in DEST. SOURCE holds ImageNet's official archives, Kaggle's
    folders, or train/CLASS/*.jpg. If it was stopped, the same command goes on from there."""
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
    """Read all of DEST, which `data prepare` wrote, and compare it with its manifest."""
    from effnetlib.data.prepare import check

    problems = check(user_path(dest, "DEST", folder=True))
    say("\n".join([*problems, f"{len(problems)} problems"]) if problems else "all is as the manifest says")
    sys.exit(bool(problems))


@main.group()
def weights():
    """Import published weights, and export ours."""


@weights.command("import")
@click.argument("file")
@click.option("--to", metavar="FOLDER", help="The folder to write (default: outputs/weights/NAME).")
def import_(file, to):
    """Check FILE, and write it into a folder as our model.safetensors.

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
@click.option("--best", is_flag=True, help="Take a run's checkpoint with the highest top-1, not the latest.")
def export_(source, file, best):
    """Write the weights of SOURCE (the folder of a run or an import, or a file) to FILE, a .safetensors with timm's names."""
    from effnetlib.weights.pretrained import Pretrained

    file = user_path(file, "FILE")
    if not file.parent.is_dir():
        raise EffnetlibError(f"there is no folder {file.parent}")
    pretrained = Pretrained.load(source, best=best)
    pretrained.export(file)
    say(f"{pretrained.variant}, {pretrained.num_classes:,} classes")
    say(file)
