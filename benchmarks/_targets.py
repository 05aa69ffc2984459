"""Devices that are not there: what XLA needs to know of a TPU or GPU to compile for it.

The compilers are packages without drivers: `libtpu` for TPUs; `jax-cuda12-pjrt`, `jax-cuda12-plugin` and
`nvidia-cuda-nvcc-cu12`, without their dependencies, for NVIDIA's GPUs. `bin/test` puts libtpu into
.venv/compilers; the others go there by hand (docs/accelerators.md).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ROOT

from jaxgrad.errors import UserError

COMPILERS = ROOT / ".venv" / "compilers"
# The names of topologies of `MOST_DEVICES` chips.
TPU_KINDS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
GPU_KINDS = {"h100": "h100_sxm.txtpb"}
TARGETS = [*(f"tpu:{kind}" for kind in TPU_KINDS), *(f"cuda:{kind}" for kind in GPU_KINDS)]
MOST_DEVICES = 4


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as --target gives it.
        backend: as `MeasureSettings.backend` has it.
        devices: JAX's descriptions of four of them.
    """

    name: str
    backend: Any
    devices: list[Any]


def prepare_environment() -> None:
    """What must be set before JAX is imported: no driver is looked for."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if COMPILERS.is_dir():
        sys.path.append(str(COMPILERS))


def find_target(name: str) -> Target:
    """The devices of --target.

    Raises:
        UserError: its compiler is not installed, or a GPU's description is not there.
    """
    from jax.experimental import topologies

    platform, kind = name.split(":")
    if platform == "tpu":
        _need("libtpu", name)
        given: dict[str, Any] = {
            "topology_name": TPU_KINDS[kind],
            "chips_per_host_bounds": [2, 2, 1],
        }
        backend = "tpu"
    else:
        _need("jax_plugins.xla_cuda12", name)
        shared = Path(os.environ.get("JAXGRAD_SHARED", ROOT.parent / "shared"))
        described = shared / "accelerators" / GPU_KINDS[kind]
        if not described.is_file():
            raise UserError(
                f"--target={name}: {described} is absent; set JAXGRAD_SHARED to the shared data's folder"
            )
        given = {
            "topology_name": "",
            "target_config": described.read_text(),
            "topology": f"1x1x{MOST_DEVICES}",
        }
        backend = "gpu"
    devices = topologies.get_topology_desc(platform=platform, **given).devices
    return Target(name, backend, devices)


def _need(module: str, target: str) -> None:
    import importlib.util

    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            f"--target={target}: {module} is not installed; docs/accelerators.md says how to put it into "
            ".venv/compilers"
        )
