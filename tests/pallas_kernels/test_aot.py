"""What the compilers for absent chips say: the readers of their dumps, and one real kernel each."""

import os
import pathlib
import subprocess
import sys

import pytest

import kit
from pallas_kernels import aot, bundles

ROOT = pathlib.Path(__file__).resolve().parents[2]
H200, V5E = aot.CHIPS["h200"], aot.CHIPS["v5e"]

# jax's attention_mgpu, forward, as jax 0.12.0.1 and ptxas 13.5 say it.
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'entry_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for entry_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 746.256 ms
"""
RESOURCES = (
  "Resources(smem_scratch_bytes=165888, tmem_scratch_cols=0, tmem_collective_scratch_cols=0, "
  "barrier_counts=Counter({Barrier(arrival_count=1, num_barriers=2, orders_tensor_core=False): 3, "
  "Barrier(arrival_count=2, num_barriers=2, orders_tensor_core=False): 2, "
  "Barrier(arrival_count=2, num_barriers=1, orders_tensor_core=False): 1}), "
  "scoped_gmem_semaphores={})"
)
SASS = """
   -:-:1:Y:02        /*07a0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
   -:-:-:Y:00        /*1230*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT
   -:-:-:Y:00        /*1240*/                   HGMMA.64x128x16.F32 R24, gdesc[UR12], R24
   -:-:1:-:00        /*7200*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28
"""


def test_a_hopper_kernel_that_is_as_it_should_be():
  kernel = aot.parse_hopper("entry_0", PTXAS, RESOURCES, SASS)
  assert kernel == aot.HopperKernel(
    name="entry_0",
    registers=168,
    spill_stores=0,
    spill_loads=0,
    shared_memory=165888 + 8 * 11,
    barriers=16,
    setmaxnreg=True,
    matrix_instructions=2,
    warnings=(),
  )


IGNORED = (
  "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum "
  "requirements."
)
SERIAL = (
  "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized "
  "due to insufficient register resources for the wgmma pipeline in the function"
)
SPILLED = (
  "ptxas warning : Registers are spilled to local memory in function 'k', 48 bytes spill stores, "
  "52 bytes spill loads"
)


def test_a_hopper_kernel_that_is_not():
  """Spills add up, losses that ptxas calls "info" are warnings, an ignored setmaxnreg is none."""
  ptxas = PTXAS.replace(
    "0 bytes spill stores, 0 bytes spill", "48 bytes spill stores, 52 bytes spill"
  )
  ptxas += f"{IGNORED}\n{SERIAL}\n{SPILLED}\n"
  kernel = aot.parse_hopper("k", ptxas, RESOURCES, SASS)
  assert (kernel.spill_stores, kernel.spill_loads) == (48, 52)
  assert kernel.warnings == (IGNORED, SERIAL, SPILLED)
  assert not kernel.setmaxnreg
  assert not aot.parse_hopper("k", PTXAS, RESOURCES, "").setmaxnreg


@pytest.mark.parametrize(("ptxas", "resources"), [("", RESOURCES), (PTXAS, "")])
def test_incomplete_dumps_of_hopper_are_refused(ptxas, resources):
  with pytest.raises(ValueError, match="k do not tell registers and shared memory"):
    aot.parse_hopper("k", ptxas, resources, SASS)


def test_a_folder_of_hopper_dumps(tmp_path):
  for name in ("entry_0", "entry_1"):
    (tmp_path / f"{name}.ptxas").write_text(PTXAS)
    (tmp_path / f"{name}.resources.txt").write_text(RESOURCES)
    (tmp_path / f"{name}.sass_ctrl").write_text(SASS)
    (tmp_path / f"{name}.ptx").write_text("// not read")
  assert [kernel.name for kernel in aot.read_hopper(tmp_path)] == ["entry_0", "entry_1"]


def test_dumps_whose_numbers_differ_belong_together_by_name(tmp_path):
  """What was traced second may be compiled first."""
  small = RESOURCES.replace("smem_scratch_bytes=", "smem_scratch_bytes=1")
  for traced, compiled, resources in (("query_1", "query_2", RESOURCES), ("key_2", "key_1", small)):
    (tmp_path / f"{traced}.resources.txt").write_text(resources)
    (tmp_path / f"{compiled}.ptxas").write_text(PTXAS)
    (tmp_path / f"{compiled}.sass_ctrl").write_text(SASS)
  key, query = aot.read_hopper(tmp_path)
  assert (key.name, query.name) == ("key_1", "query_2")
  assert key.shared_memory > query.shared_memory


BUNDLES = """
    0      : { %s7 = sld [smem:[#allocation0]] }
  0x1      : { %v1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v0 } /* exit bundle: %EXIT */
"""
USED = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
1 0 0 0 0 0 0 0 0 0
"""
REPORT = """<script>
        const DATA ={
  "global_info": {
    "module_name": "jit_f",
    "vmem_capacity": 134217728
  },
  "hlo_breakdowns": {
    "flash.1": {
      "blocks": [
        {
          "allocations": [
            {"padding": 0, "shape": "f32[512,128]", "size": 262144, "tag": "scratch operand"},
            {"padding": 0, "size": 4096, "tag": "SPILL"}
          ],
          "block_size": 266240,
          "block_type": "SCOPED"
        }
      ],
      "metadata": "op_name",
      "total_size": 266240
    }
  }
};
</script>"""


def test_a_folder_of_tpu_dumps(tmp_path):
  """Only custom calls are kernels, and not an index map or what XLA fused itself."""
  ends = {"flash.1": "flash.1 = custom-call(%a, %b)", "fusion.2": "fusion.2 = fusion(%a)"}
  for name, end in ends.items():
    (tmp_path / f"17-{name}-72-final_bundles.txt").write_text(BUNDLES.replace("EXIT", end))
    used = tmp_path / f"17-{name}-70-final_hlo-static-per-bundle-utilization.txt"
    used.write_text(USED)
    (tmp_path / f"17-{name}-69-pre-delay_hlo-static-per-bundle-utilization.txt").write_text("-")
    (tmp_path / f"17-{name}-71-schedule-analysis_final_bundles.txt").write_text("not bundles")
  (tmp_path / "17-TLP-85-vmem_report.html").write_text(REPORT)
  (kernel,) = aot.read_tpu(tmp_path, V5E)
  assert (kernel.name, kernel.vmem, kernel.spilled) == ("flash.1", 266240, 4096)
  assert kernel.schedule.instructions(kernel.schedule.root, "MXU") == 1


@pytest.mark.parametrize("name", aot.CHIPS)
def test_a_chip_is_consistent(name):
  """peak / clock is what the matrix units of a TPU do in a cycle, within what is rounded."""
  chip = aot.CHIPS[name]
  if chip.platform == "cuda":
    assert chip.fast_memory == 227 << 10
    return
  units = {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2, "tpu7x": 4 * 256**2}[name]
  assert chip.peak / chip.clock == pytest.approx(2 * units, rel=5e-3)


def test_the_environment_of_a_compiler(tmp_path, monkeypatch):
  """It names the dump, keeps this process's PATH, and leaves this process as it is."""
  tool = tmp_path / "ptxas"
  tool.write_text("#!/bin/sh\n")
  tool.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  before = dict(os.environ)
  for chip in (H200, V5E):
    added = aot.environment(chip, "/dump")
    assert any("/dump" in value for value in added.values())
    assert added["JAX_PLATFORMS"] == "cpu"
  path = aot.environment(H200, "/dump")["PATH"]
  assert path.endswith(str(tmp_path)) and dict(os.environ) == before


def test_what_is_missing_is_named(monkeypatch):
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(aot.shutil, "which", lambda name: None)
  assert aot.missing(V5E) == "libtpu is not installed (pip install 'frugal-attention[aot]')"
  assert aot.missing(H200) is not None and "CUDA plugin" in str(aot.missing(H200))
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None if name == "nvidia" else 1)
  assert aot.missing(H200) == "ptxas is not installed (pip install 'frugal-attention[aot]')"


HOPPER_TILE = """
def body(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, arrived):
  plgpu.copy_gmem_to_smem(a_gmem, a_smem, arrived)
  plgpu.copy_gmem_to_smem(b_gmem, b_smem, arrived)
  plgpu.barrier_wait(arrived)
  def accumulate(acc):
    plgpu.wgmma(acc, a_smem, b_smem)
    return acc[...]
  acc = pl.run_scoped(accumulate, plgpu.ACC((64, 128), jnp.float32))
  out_smem[...] = acc.astype(out_smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_gmem)
  plgpu.wait_smem_to_gmem(0)
swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
tile = lambda rows: plgpu.SMEM((rows, 128), jnp.float16, transforms=swizzled)
shape = lambda rows: jax.ShapeDtypeStruct((rows, 128), jnp.float16)
product = plgpu.kernel(body, out_type=shape(64),
                       scratch_types=[tile(64), tile(128), tile(64), plgpu.Barrier(num_arrivals=2)])
compiled = aot.compile_for(aot.CHIPS[chip], product, shape(64), shape(128))
"""
TPU_TILE = """
def body(a_ref, b_ref, out_ref):
  out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)
shape = lambda rows, dtype: jax.ShapeDtypeStruct((rows, 256), dtype)
product = pl.pallas_call(body, out_shape=shape(512, jnp.float32), grid=(2,), name="product",
                         in_specs=[pl.BlockSpec((256, 256), lambda i: (i, 0)),
                                   pl.BlockSpec((256, 256), lambda i: (0, 0))],
                         out_specs=pl.BlockSpec((256, 256), lambda i: (i, 0)))
compiled = aot.compile_for(aot.CHIPS[chip], product, *(shape(n, jnp.bfloat16) for n in (512, 256)))
"""


def compile_in_a_child(name, code, dump):
  """Runs code that compiles for a chip, or skips, saying what is not installed."""
  kit.needs_compiler(name)
  imports = (
    "import sys, jax, jax.numpy as jnp\n"
    "from jax.experimental import pallas as pl\n"
    "from jax.experimental.pallas import mosaic_gpu as plgpu\n"
    "from pallas_kernels import aot\n"
    f"chip = {name!r}\n"
  )
  command = [sys.executable, "-c", imports + code + "print(compiled.memory_analysis())"]
  environment = os.environ | aot.environment(aot.CHIPS[name], dump)
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "output_size_in_bytes" in done.stdout


def test_a_real_hopper_kernel(tmp_path):
  """64 x 128 x 128 is eight warpgroup products of depth 16; a, b and out lie in shared memory."""
  compile_in_a_child("h200", HOPPER_TILE, tmp_path)
  (kernel,) = aot.read_hopper(tmp_path)
  assert kernel.matrix_instructions == 128 // 16
  assert kernel.spill_stores == kernel.spill_loads == 0 and 0 < kernel.registers <= 255
  tiles = (64 + 128 + 64) * 128 * 2
  assert tiles <= kernel.shared_memory < tiles + 4096
  assert not kernel.setmaxnreg and kernel.warnings == ()


@pytest.mark.parametrize("name", [name for name in aot.CHIPS if name != "h200"])
def test_a_real_tpu_kernel(tmp_path, name):
  """The grid is a loop that holds the product; its two windows of each operand are in VMEM."""
  compile_in_a_child(name, TPU_TILE, tmp_path)
  (kernel,) = aot.read_tpu(tmp_path, aot.CHIPS[name])
  schedule = kernel.schedule
  assert kernel.name.startswith("product")
  assert bundles.hot_loop(schedule).kind == "loop" and bundles.hot(schedule)[0].bundles > 64
  assert 2 * (256 * 256 * 4) <= kernel.vmem < aot.CHIPS[name].fast_memory // 16
  cycles = bundles.cycles(schedule, bundles.Trips(full=2, mixed=0, rows=2, steps=2))
  once = bundles.cycles(schedule, bundles.Trips(full=1, mixed=0, rows=1, steps=1))
  floor = 2 * 256**3 / (aot.CHIPS[name].peak / aot.CHIPS[name].cores / aot.CHIPS[name].clock)
  assert cycles is not None and once is not None and cycles - once > floor
