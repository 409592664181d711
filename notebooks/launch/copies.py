"""What host.sh copies: the data set to this host, and what runs write to and from the place that all hosts reach.

    copies.py data                       DATA to this host; prints the folder for EFFNETLIB_DATA
    copies.py back                       COPY_TO to EFFNETLIB_OUTPUTS
    copies.py out                        EFFNETLIB_OUTPUTS to COPY_TO
    copies.py folder FROM TO [--delete]  one folder to another

Three tools copy. For a store that gcloud does not know, set all three:

    COPY         copies a folder: COPY FROM TO. What is there already is not copied again, and a file that is there is
                 whole. "gcloud storage rsync --recursive", or `copies.py folder` where both are folders, such as a
                 mounted bucket.
    COPY_DELETE  the flag of COPY that also deletes what FROM does not have. With a COPY of your own and no COPY_DELETE,
                 nothing is deleted.
    COPY_FILE    copies a file: COPY_FILE FROM TO. "gcloud storage cp", or "cp".

It exits with 74 when a copy failed that the run needs, and with 1 when the next copy can make up for it. It needs nothing but
Python.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MEMORY = Path("/dev/shm")
MANIFEST, CHECKPOINTS = "manifest.json", "checkpoints"
BEGUN, SNAPSHOT, COMPILED = ".begun", ".snapshot", ".compiled"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
THREADS = 16  # a mounted bucket answers slowly, but to many at once
PROGRESS_SECONDS = 30
NEEDED, LATER = 74, 1


class Failed(Exception):
    """A copy failed. Holds a sentence and the exit code."""

    def __init__(self, sentence: str, code: int = NEEDED):
        super().__init__(sentence)
        self.code = code


def say(text: str) -> None:
    print(f"host {os.environ['EFFNETLIB_PROCESS']}: {text}", file=sys.stderr, flush=True)


# The tools


def command(tool: str, source: str, dest: str, *flags: str) -> list[str]:
    """The command by which COPY or COPY_FILE copies."""
    is_address = "://" in source or "://" in dest
    ours = shlex.join([sys.executable, __file__, "folder"])
    defaults = {
        "COPY": "gcloud storage rsync --recursive" if is_address else ours,
        "COPY_FILE": "gcloud storage cp" if is_address else "cp",
    }
    return [*shlex.split(os.environ.get(tool) or defaults[tool]), *flags, source, dest]


def is_copied(tool: str, source: str, dest: str, *flags: str) -> bool:
    return subprocess.run(command(tool, source, dest, *flags), stdout=sys.stderr).returncode == 0


def delete_flags(dest: str) -> list[str]:
    default = "--delete-unmatched-destination-objects" if "://" in dest else "--delete"
    return shlex.split(os.environ.get("COPY_DELETE") or ("" if os.environ.get("COPY") else default))


def folder(source: Path, dest: Path, delete: bool) -> None:
    """Copies the files that `dest` does not have with the same size and time. Each arrives under another name first.

    The parent of `dest` must be there: where it is not, a bucket is not mounted.
    """

    def fail(error):
        raise error

    found = [Path(place, name) for place, _, names in os.walk(source, onerror=fail) for name in names]
    wanted = {path.relative_to(source) for path in found if not path.name.endswith(".part")}
    dest.mkdir(exist_ok=True)

    def copy(name):
        about, path = (source / name).stat(), dest / name
        with contextlib.suppress(FileNotFoundError):
            old = path.stat()
            if (old.st_size, old.st_mtime_ns) == (about.st_size, about.st_mtime_ns):
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(source / name, part)
        with contextlib.suppress(OSError):  # a mount that has no times: the next copy copies it again
            os.utime(part, ns=(about.st_atime_ns, about.st_mtime_ns))
        os.replace(part, path)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, wanted))
    if delete:
        for place, _, names in os.walk(dest, topdown=False):
            for path in (Path(place, name) for name in names):
                if path.relative_to(dest) not in wanted:
                    path.unlink()
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(place)


# The data set


def data() -> None:
    """Copies the shards that `effnetlib data prepare` wrote, all of them: the order of the examples is drawn over all shards,
    so every host reads every shard.

    They go into memory if they fit, else to the disk. What is there already is not copied again. Then the sizes are compared
    with those in the manifest; `effnetlib data check` compares the bytes.
    """
    source = os.environ["DATA"].rstrip("/")
    if "://" not in source:
        source = os.path.abspath(os.path.expanduser(source))
    name = os.path.basename(source)
    text, wanted = read_manifest(source)
    given, disk = os.environ.get("EFFNETLIB_DATA"), Path("~/.cache/effnetlib").expanduser()
    places = [Path(given).expanduser().absolute()] if given else [MEMORY / "effnetlib", disk]
    place = choose(places, name, wanted)
    place.mkdir(parents=True, exist_ok=True)
    dest, mark = place / name, place / f".{name}.copy"
    if dest.exists() and not mark.exists():
        raise Failed(f"{dest} was not copied by this: name another folder as EFFNETLIB_DATA, where it can be copied to")
    with open(mark, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this machine may be copying
        absent = missing(dest, wanted)
        for file in absent:
            (dest / file).unlink(missing_ok=True)
        dest.mkdir(exist_ok=True)
        (dest / f".{MANIFEST}.part").write_text(text)
        (dest / f".{MANIFEST}.part").replace(dest / MANIFEST)  # from here on it is true of all shards that are there
        if absent:
            copy_with_progress(source, dest, sum(about["bytes"] for about in wanted.values()))
        for file in missing(dest, wanted):
            size = f"has {(dest / file).stat().st_size:,} bytes" if (dest / file).exists() else "is missing"
            expected = f"and {MANIFEST} says {wanted[file]['bytes']:,}"
            raise Failed(f"{source}/{file} {size}, {expected}: bring it there again, or prepare the folder again")
    say(f"{name} is in {place}: {len(wanted):,} shards of the right size")
    print(place)


def read_manifest(source: str) -> tuple[str, dict[str, dict]]:
    """The text of the manifest, and what it says of each shard, by file name."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, MANIFEST)
        try:
            if not is_copied("COPY_FILE", f"{source}/{MANIFEST}", str(path)):
                raise ValueError("it could not be copied")
            text = path.read_text()
            splits = json.loads(text)["splits"].values()
            if not all(split.get("whole", True) for split in splits):
                raise ValueError("the preparation did not end")
            shards = [shard | {"bytes": int(shard["bytes"])} for split in splits for shard in split["shards"]]
            return text, {shard["file"]: shard for shard in shards}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "wanted is a folder that `effnetlib data prepare` wrote"
            raise Failed(f"DATA {source} has no {MANIFEST} that can be used ({error}): {hint}") from None


def missing(dest: Path, wanted: dict[str, dict]) -> list[str]:
    """The shards that `dest` lacks, or has in another size, or from another preparation."""
    before = {}
    with contextlib.suppress(OSError, ValueError):
        splits = json.loads((dest / MANIFEST).read_text())["splits"].values()
        before = {shard["file"]: shard for split in splits for shard in split["shards"]}

    def is_there(file, about):
        path = dest / file
        return before.get(file) == about and path.is_file() and path.stat().st_size == about["bytes"]

    return [file for file, about in wanted.items() if not is_there(file, about)]


def choose(places: list[Path], name: str, wanted: dict[str, dict]) -> Path:
    """The place with room for what is missing there. Of several, the one that lacks least, and then the first."""
    needed = {place: sum(wanted[file]["bytes"] for file in missing(place / name, wanted)) for place in places}
    for place in sorted(places, key=needed.get):
        if needed[place] <= room(place):
            return place
    rooms = " and ".join(f"{gib(room(place))} in {place}" for place in places)
    hint = "make room, or name a folder on a larger disk as EFFNETLIB_DATA"
    raise Failed(f"{name} needs {gib(max(needed.values()))}, and there is room for {rooms}: {hint}")


def room(place: Path) -> int:
    """The bytes that a data set may take below `place`. A quarter of the free memory or a tenth of the free disk is spared."""
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.is_dir())).free * 9 // 10
    if MEMORY not in (place, *place.parents):
        return free
    memory = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return min(free, memory * 3 // 4)


def gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def copy_with_progress(source: str, dest: Path, total: int) -> None:
    tool, code = subprocess.Popen(command("COPY", source, str(dest)), stdout=sys.stderr), None
    while code is None:
        there = 0
        for entry in os.scandir(dest):
            with contextlib.suppress(FileNotFoundError):  # it had its temporary name
                there += entry.stat().st_size
        say(f"{gib(there)} of {gib(total)} of {dest.name} are in {dest.parent}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = tool.wait(PROGRESS_SECONDS)
    if code:
        raise Failed(f"{source} could not be copied to {dest}: run it again, what has arrived is not copied again")


# What runs write


def back() -> None:
    """Copies COPY_TO to EFFNETLIB_OUTPUTS, which is empty: records, and the checkpoints that `out` left there."""
    outputs, to = Path(os.environ["EFFNETLIB_OUTPUTS"]), os.environ["COPY_TO"]
    if "://" not in to:
        # Not its parents, which are there if the bucket is mounted. And hosts/ before hosts copy into it side by side.
        with contextlib.suppress(OSError):
            Path(to).mkdir(exist_ok=True)
            Path(to, "hosts").mkdir(exist_ok=True)
    if not is_copied("COPY", to, str(outputs)):
        raise Failed(f"could not copy from {to}")
    shutil.rmtree(outputs / "hosts", ignore_errors=True)  # those of an earlier time
    (outputs / BEGUN).touch()


def out() -> None:
    """Copies EFFNETLIB_OUTPUTS to COPY_TO.

    With COPY_BACK every host copies its notebook and log. The one that writes runs copies those runs too, and then deletes over
    there the checkpoints that are no longer here. They are deleted last, so a crash leaves too many, and the next copy
    deletes them. Without COPY_BACK the first host copies all, and nothing is deleted.
    """
    outputs, to = Path(os.environ["EFFNETLIB_OUTPUTS"]), os.environ["COPY_TO"]
    is_back = bool(os.environ.get("COPY_BACK"))
    if not is_back and os.environ["EFFNETLIB_PROCESS"] != "0":
        return
    # JAX's process 0 writes. On a TPU the slice numbers the processes, so it need not be our first host.
    runs = written(outputs) if is_back else []
    names = ["hosts", *runs, *[COMPILED] * bool(runs)] if is_back else ["."]
    try:
        snapshot = take_snapshot(outputs, names)
        if not snapshot or not is_copied("COPY", str(snapshot), to):
            raise Failed(f"could not copy to {to}", NEEDED if runs else LATER)
        for run in runs:
            kept, there, flags = snapshot / run / CHECKPOINTS, f"{to}/{run}/{CHECKPOINTS}", delete_flags(to)
            has_one = kept.is_dir() and any(path.name.isdigit() for path in kept.iterdir())
            if has_one and flags and not is_copied("COPY", str(kept), there, *flags):
                say(f"could not delete old checkpoints in {there}: the next copy tries again")
    finally:
        shutil.rmtree(outputs / SNAPSHOT, ignore_errors=True)


def written(outputs: Path) -> list[str]:
    """The folders of runs that this host has written to since it began."""
    begun, runs = (outputs / BEGUN).stat().st_mtime_ns, []
    for place, folders, names in os.walk(outputs):
        folders[:] = set(folders) - {CHECKPOINTS, SNAPSHOT}
        if "run.json" in names and Path(place, "run.json").stat().st_mtime_ns > begun:
            runs.append(os.path.relpath(place, outputs))
    return runs


def take_snapshot(outputs: Path, names: list[str]) -> Path | None:
    """Links to the files of one moment: a copy takes long, and the run deletes checkpoints meanwhile. Unfinished ones are left
    out. Returns None, and says why, if the links cannot be made."""
    snapshot = outputs / SNAPSHOT

    def ignored(_, names):
        return [name for name in names if name in (SNAPSHOT, BEGUN) or UNFINISHED in name]

    for _ in range(5):  # a file may be deleted just now
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            for name in names:
                if (outputs / name).exists():
                    shutil.copytree(outputs / name, snapshot / name, copy_function=os.link, ignore=ignored)
            return snapshot
        except OSError as error:
            wrong = error
    say(f"{outputs} cannot be copied: {wrong}")
    return None


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    try:
        if what == "folder":
            flags = [place for place in places if place == "--delete"]
            source, dest = (Path(place) for place in places if place not in flags)
            folder(source, dest, bool(flags))
        else:
            {"data": data, "back": back, "out": out}[what]()
    except Failed as failed:
        say(str(failed))
        sys.exit(failed.code)
    except OSError as error:
        print(f"copies.py: {error}", file=sys.stderr)
        sys.exit(NEEDED)
