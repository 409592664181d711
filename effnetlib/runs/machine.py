"""What the machine and the shell decide: settings of jax, which a run pins, and the number of usable cores."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from effnetlib.errors import EffnetlibError
from effnetlib.runs.files import make_writable
from effnetlib.runs.paths import outputs_folder
from effnetlib.runs.progress import say

COMPILED = ".compiled"
# The values in a run of all settings that can change numbers or raise errors. Names unknown to the installed version
# are skipped.
PINNED = {
    "jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False, "jax_legacy_prng_key": "allow", "jax_safer_randint": True,
    "jax_enable_x64": False, "jax_default_dtype_bits": "64", "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow", "jax_default_matmul_precision": None, "jax_allow_f16_reductions": True,
    "jax_softmax_custom_jvp": False, "jax_default_device": None, "jax_disable_jit": False, "jax_no_execution": False,
    "jax_disable_most_optimizations": False, "jax_debug_nans": False, "jax_debug_infs": False, "jax_debug_key_reuse": False,
    "jax_enable_checks": False, "jax_check_tracer_leaks": False, "jax_no_tracing": False, "flax_hijax_variable": False,
    "jax_transfer_guard": "allow", "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow", "jax_transfer_guard_device_to_host": "allow",
}  # fmt: skip
# Variables with settings. Those that choose where programs run or are cached change no numbers.
VARIABLES = re.compile(r"(JAX|FLAX|NNX)_(?!PLATFORM|COMPILATION_CACHE|PERSISTENT_CACHE)|NVIDIA_TF32_OVERRIDE$")


@contextlib.contextmanager
def pinned() -> Iterator[dict[str, str]]:
    """Applies `PINNED` while the block runs, whatever the shell or the notebook has set.
    Yields for the record: the replaced values, and all other settings in the environment."""
    import flax

    found = {name.lower(): value for name, value in os.environ.items() if VARIABLES.match(name)}
    with contextlib.ExitStack() as block:
        for name, value in PINNED.items():
            found.pop(name, None)
            config = flax.config if name.startswith("flax_") else jax.config
            before = getattr(flax.config, name, value) if config is flax.config else jax.config.values.get(name, value)
            if before == value:
                continue
            if before is not None:
                found[name] = str(getattr(before, "value", before))
            if hasattr(jax, name.removeprefix("jax_")):  # overrides the user's own `with jax...`
                block.enter_context(getattr(jax, name.removeprefix("jax_"))(value))
            else:
                block.callback(config.update, name, before)
                config.update(name, value)
        yield found


def keep_compiled() -> None:
    """Keeps compiled programs in the outputs folder, unless the user has set another. A run that starts again then reads its
    programs. Of several processes only process 0 writes."""
    folder = outputs_folder() / COMPILED
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        make_writable(folder)
    except EffnetlibError as error:
        say(f"{error}: a run that starts again compiles its programs again")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # jax has looked for the setting at its first program


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may use: min(CPU affinity, quotas rounded up). Its control group and each group
    above may have a quota, for example in a container or a SLURM job."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # macOS has none
    cores = os.process_cpu_count() or 1 if hasattr(os, "process_cpu_count") else len(affinity(0))  # since Python 3.13
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)  # version 2: no controllers, quota and period in one file
        group = cgroups / controllers / path.strip("/")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                cores = min(cores, max(1, math.ceil(quota / period))) if quota > 0 else cores
    return cores
