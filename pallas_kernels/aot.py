"""Compiles a function for a chip that is not here, and reads what its compiler says.

    chip = CHIPS["h200"]
    os.environ |= environment(chip, dump)      # first of all: libtpu and Mosaic read it at start-up
    compile_for(chip, function, *shapes)
    for kernel in read(chip, dump): ...

Needs the `[aot]` extra and no accelerator: the CUDA plugin with NVIDIA's assembler and disassembler
for Hopper, libtpu for TPUs. `missing(chip)` says what is not installed. Since the compilers read
their settings once, whoever compiles for several chips does it in a process each.
"""

import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import bundles


class Chip(NamedTuple):
  """What is known of a chip without having one."""

  platform: str
  """"cuda" or "tpu"."""
  topology: str
  """What `jax.experimental.topologies` calls a small system of them."""
  kind: str
  """Its `device_kind`."""
  peak: float
  """bfloat16 operations per second of what JAX calls one device."""
  clock: float
  """Cycles per second."""
  fast_memory: int
  """Bytes of shared memory of a block, or of VMEM of a core."""
  bandwidth: float
  """Bytes per second between what JAX calls one device and its memory."""
  cores: int = 1
  """TensorCores that share a device and split a parallel grid axis among them."""
  delay_slots: int = 0
  """Bundles that still run after a branch."""


# Peaks are NVIDIA's H200 data sheet (dense) and, for TPUs, https://cloud.google.com/tpu/docs/v5e,
# v5p, v6e and tpu7x, and so are bandwidths; a TPU7x chip is two devices. TPU clocks are peak /
# operations per cycle: four (v5p: twice four) units of 128 x 128, or two of 256 x 256 that do two
# rows a cycle (the estimated cycles in the HLO of a large product rule out one), a multiply-add
# being two. VMEM is that of `pltpu.get_tpu_info_for_chip`.
CHIPS: Final[Mapping[str, Chip]] = {
  "h200": Chip("cuda", "1x1x1", "NVIDIA H200", 989e12, 1.98e9, 232448, 4.8e12),
  "v5e": Chip("tpu", "v5e:2x2", "TPU v5 lite", 197e12, 1.5e9, 128 << 20, 819e9, delay_slots=4),
  "v5p": Chip("tpu", "v5p:2x2x1", "TPU v5", 459e12, 1.75e9, 64 << 20, 2765e9, 2, delay_slots=4),
  "v6e": Chip("tpu", "v6e:2x2", "TPU v6 lite", 918e12, 1.75e9, 128 << 20, 1640e9, delay_slots=4),
  "tpu7x": Chip("tpu", "tpu7x:2x2x1", "TPU7x", 1153.5e12, 2.2e9, 64 << 20, 3690e9, delay_slots=6),
}

# A text proto of XLA's GpuTargetConfigProto: facts of the chip, compute capability 9.0.
_H200: Final = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
_EXTRA: Final = "pip install 'frugal-attention[aot]'"
_TOOLS: Final = ("ptxas", "cuobjdump", "nvdisasm")


def missing(chip: Chip) -> str | None:
  """What has to be installed before anything can be compiled for a chip, or None."""
  if chip.platform == "tpu":
    here = importlib.util.find_spec("libtpu") is not None
    return None if here else f"libtpu is not installed ({_EXTRA})"
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    return f"jax's CUDA plugin is not installed ({_EXTRA})"
  absent = [tool for tool in _TOOLS if find_tool(tool) is None]
  return f"{absent[0]} is not installed ({_EXTRA})" if absent else None


def find_tool(name: str) -> str | None:
  """NVIDIA's program of this name: that of a wheel beside this jax, else the one on PATH."""
  spec = importlib.util.find_spec("nvidia")
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*/bin/{name}")):
      return path
  return shutil.which(name)


def environment(chip: Chip, dump: str | os.PathLike[str]) -> dict[str, str]:
  """The variables that make `compile_for` possible, and its compiler talk, in a fresh process.

  Args:
    chip: what is compiled for.
    dump: an empty folder that the compiler fills.
  """
  common = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache leaves no dump
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the CUDA plugin would complain: there is no driver
  }
  if chip.platform == "tpu":
    return common | {
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process fails on a lock file
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
      # Only what is read below: to write all 75 stages takes ten times as long as to compile.
      "--xla_jf_dump_llo_pass_label_regex=final_(bundles|hlo)",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # asked for at start-up; the topology overrules it
      "TPU_SKIP_MDS_QUERY": "1",  # or it waits for the metadata server of a machine with TPUs
      "TPU_WORKER_HOSTNAMES": "localhost",
    }
  folders = dict.fromkeys(os.path.dirname(path) for tool in _TOOLS if (path := find_tool(tool)))
  return common | {
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_SASS": "1",
    "MOSAIC_GPU_DUMP_TO": str(dump),
    "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")]),
  }


def compile_for(chip: Chip, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
  """Compiles `function` for one device; its memory can be analyzed, and running it fails. The
  arguments are those of `lower_for`.
  """
  return lower_for(chip, function, *arguments).compile()


def target(chip: Chip) -> contextlib.AbstractContextManager[Any]:
  """Where a program is made for the chip: Mosaic asks the mesh, not the sharding, how many
  multiprocessors there are; we and Pallas, which chip.
  """
  cores = 132 if chip.platform == "cuda" else chip.cores
  device = AbstractDevice(chip.kind, cores, chip.platform)
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lower_for(chip: Chip, function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
  """Lowers `function` for one device: all that Pallas refuses shows here, in a second.

  Args:
    chip: what for.
    function: of arrays.
    arguments: `ShapeDtypeStruct`s, or trees of them.
  """
  asked = {"platform": chip.platform}
  asked |= {"target_config": _H200} if chip.platform == "cuda" else {}
  name = {"topology" if chip.platform == "cuda" else "topology_name": chip.topology}
  device = topologies.get_topology_desc(**asked, **name).devices[0]
  here = SingleDeviceSharding(device)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
  placed = jax.tree.map(put, arguments)
  with target(chip):
    return jax.jit(function).trace(*placed).lower(lowering_platforms=(chip.platform,))


class HopperKernel(NamedTuple):
  """What ptxas, Mosaic and the machine code say of one kernel."""

  name: str
  registers: int
  """Per thread, as launched; `setmaxnreg` shares them out anew."""
  spill_stores: int
  spill_loads: int
  """Both in bytes of a thread's stack."""
  shared_memory: int
  """Bytes of a block, barriers included."""
  barriers: int
  """Named hardware barriers, of which there are 16."""
  setmaxnreg: bool
  """Whether the machine code moves registers between warpgroups and nothing was ignored."""
  matrix_instructions: int
  """Warpgroup matrix products (HGMMA) in the machine code, each counted once."""
  warnings: tuple[str, ...]


class TpuKernel(NamedTuple):
  """What libtpu says of one kernel."""

  name: str
  schedule: bundles.Schedule
  vmem: int
  """Bytes: scratch, windows of the pipeline, and spills."""
  spilled: int
  """Bytes of them that hold spilled registers."""


def read_hopper(dump: str | os.PathLike[str]) -> list[HopperKernel]:
  """Every Mosaic kernel with dumps in a folder: `NAME_2.ptxas`, `NAME_2.sass_ctrl`, and the
  `NAME_1.resources.txt` that tracing left: it counts kernels in the order in which they are traced,
  and the compiler in another.
  """
  folder, found = pathlib.Path(dump), []
  traced = {}
  for path in sorted(folder.glob("*.resources.txt")):
    traced.setdefault(_name(path), []).append(path)
  for path in sorted(folder.glob("*.ptxas")):
    waiting = traced.get(_name(path))
    resources = _text(waiting.pop(0)) if waiting else ""
    code = _text(path.with_suffix(".sass_ctrl"))
    found.append(parse_hopper(path.stem, path.read_text(), resources, code))
  return found


def _name(path: pathlib.Path) -> str:
  """The kernel's name in a dump's: all before its number."""
  return re.sub(r"(_\d+)?\..*", "", path.name)


def _text(path: pathlib.Path) -> str:
  return path.read_text() if path.exists() else ""


def parse_hopper(name: str, ptxas: str, resources: str, code: str) -> HopperKernel:
  """One kernel from its three dumps.

      ptxas info    : Function properties for NAME
          0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
      ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
      Resources(smem_scratch_bytes=165888, ..., barrier_counts=Counter({Barrier(...): 3, ...}), ...)
      -:-:1:Y:02   /*07a0*/   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8

  The barriers in shared memory take 8 bytes each.
  """
  warnings = [line.strip() for line in ptxas.splitlines() if _is_warning(line)]
  frame = r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
  spills = re.findall(frame, ptxas)  # a warning repeats them
  scratch = re.search(r"smem_scratch_bytes=(\d+)", resources)
  if scratch is None or not spills:
    raise ValueError(f"the dumps of {name} do not tell registers and shared memory")
  each = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
  barriers = sum(int(many) * int(times) for many, times in each)
  moved = re.search(r"\bU?SETMAXREG\b", code) is not None
  return HopperKernel(
    name=name,
    registers=max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
    spill_stores=sum(int(stores) for stores, _ in spills),
    spill_loads=sum(int(loads) for _, loads in spills),
    shared_memory=int(scratch[1]) + 8 * barriers,
    barriers=sum(map(int, re.findall(r"used (\d+) barriers", ptxas))),
    setmaxnreg=moved and not any("setmaxnreg" in line for line in warnings),
    matrix_instructions=len(re.findall(r"\bHGMMA\b", code)),
    warnings=tuple(warnings),
  )


def _is_warning(line: str) -> bool:
  """ptxas also calls some losses "info": `(C7510) Potential Performance Loss: wgmma...`."""
  return re.search(r"warning|Potential Performance Loss|ignored", line, re.IGNORECASE) is not None


def read_tpu(dump: str | os.PathLike[str], chip: Chip) -> list[TpuKernel]:
  """Every Pallas kernel whose dumps lie in a folder, in the order of their names.

  Files are called STAMP-NAME-NN-STAGE.txt. `TLP` is the program around the kernels.
  """
  folder, found = pathlib.Path(dump), {}
  memory = [_memory(path.read_text()) for path in sorted(folder.glob("*vmem_report.html"))]
  for path in sorted(folder.glob("*-final_bundles.txt")):
    match = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
    if match is None or not _is_pallas(text := path.read_text()):
      continue
    name = match[1]
    (used,) = folder.glob(f"{glob.escape(path.name.split('-')[0])}-{glob.escape(name)}-*"
                          "-final_hlo-static-per-bundle-utilization.txt")  # fmt: skip
    schedule = bundles.parse(text, used.read_text(), chip.delay_slots)
    vmem, spilled = next((report[name] for report in memory if name in report), (0, 0))
    found[name] = TpuKernel(name, schedule, vmem, spilled)
  return [found[name] for name in sorted(found)]


def _is_pallas(text: str) -> bool:
  """Whether a program came from a kernel: its last bundle names the custom call."""
  return re.search(r"exit bundle: %\S+ = \S* ?custom-call\(", text) is not None


def _memory(report: str) -> dict[str, tuple[int, int]]:
  """Kernel -> bytes of VMEM, and those of spills; the report is a page around `const DATA ={...};`.

  A kernel has "blocks" of "allocations", each with a size and a tag such as "scratch operand",
  "input window allocation for operator input 2..." or "SPILL".
  """
  match = re.search(r"const DATA ?= ?(\{.*?\n\});", report, re.DOTALL)
  if match is None:
    raise ValueError("not a report of VMEM: it holds no DATA")
  found = {}
  for name, kernel in json.loads(match[1])["hlo_breakdowns"].items():
    pieces: Sequence[Mapping[str, Any]] = [p for b in kernel["blocks"] for p in b["allocations"]]
    spilled = sum(piece["size"] for piece in pieces if piece["tag"] == "SPILL")
    found[name] = (kernel["total_size"], spilled)
  return found
