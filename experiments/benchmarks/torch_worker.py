"""PyTorch's attention behind a pipe, so that two pools of threads never compete: it sleeps unless
it is asked. On the CPU in float32 and causal, unless it is told otherwise by `use`.

It reads a JSON object per line and answers with one. It runs under any Python that has torch, which
need not be the one that has jax, so it imports nothing else that has to be installed.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any

from experiments.benchmarks import resident

NAMES = ("q", "k", "v", "do")


class Held:
  """Inputs of one case, and timed calls with them; who derives from it knows how to `attend`."""

  def __init__(self, torch: Any) -> None:
    self.torch = torch
    self.device, self.dtype = "cpu", torch.float32
    self.forget()

  def forget(self) -> None:
    """Drops what is held, for it is large."""
    self.inputs: list[Any] = []
    self.cotangent: Any = None
    self.kept: dict[str, Any] = {}

  def attend(self, backend: str) -> Any:
    """The output, by a backend of this name."""
    raise NotImplementedError(backend)

  def once(self, kind: str, backend: str = "") -> Any:
    """One call: forward, forward and backward, or backward alone, of an output that is kept."""
    if kind == "forward":
      with self.torch.no_grad():
        return self.attend(backend)
    gradients = self.torch.autograd.grad
    if kind == "forward+backward":
      return gradients(self.attend(backend), self.inputs, self.cotangent)
    if backend not in self.kept:
      self.kept[backend] = self.attend(backend)
    return gradients(self.kept[backend], self.inputs, self.cotangent, retain_graph=True)

  def time(self, kind: str, repeats: int, backend: str = "") -> dict[str, Any]:
    """Seconds per call; on a chip the calls queue up and are waited for once."""
    wait = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
      self.once(kind, backend)
    wait()
    return {"seconds": (time.perf_counter() - start) / repeats}


class Worker(Held):
  """Softmax attention, in torch's layout [B, N, T, H]."""

  allowed: dict[str, Any] = {"is_causal": True}

  def use(self, device: str, dtype: str, mask: str, documents: list[int]) -> dict[str, Any]:
    """Where, in what, and under which mask: "full", "causal", "window W" or "documents M", of which
    `documents` has every token's number. The last two are arrays here.
    """
    self.device, self.dtype = device, getattr(self.torch, dtype)
    self.forget()
    if mask in ("full", "causal"):
      self.allowed = {"is_causal": mask == "causal"}
      return {}
    ids = self.torch.tensor(documents, device=device)
    place = self.torch.arange(len(documents), device=device)
    behind = place[:, None] - place[None]
    window = int(mask.split()[1]) if mask.startswith("window") else len(documents)
    dense = (behind >= 0) & (behind < window) & (ids[:, None] == ids[None])
    self.allowed = {"attn_mask": dense}
    return {}

  def make(self, shape: list[int]) -> dict[str, Any]:
    """Inputs of its own, standard normal; the shape is [B, T, N, H]."""
    self.torch.manual_seed(0)
    B, T, N, H = shape
    self._keep([self.torch.randn(B, N, T, H, device=self.device) for _ in NAMES])
    return {}

  def _keep(self, tensors: list[Any]) -> None:
    *qkv, self.cotangent = (x.to(self.device, self.dtype) for x in tensors)
    self.inputs, self.kept = [x.requires_grad_() for x in qkv], {}

  def load(self, folder: str, shape: list[int]) -> dict[str, Any]:
    """Reads q, k, v and the output's cotangent, written as float32 [B, T, N, H]."""
    tensors = (read(self.torch, folder, name, shape) for name in NAMES)
    self._keep([x.transpose(1, 2).contiguous() for x in tensors])
    return {}

  def attend(self, backend: str) -> Any:
    """The output, by one of torch's backends, by its own choice, or by "fla": linear attention."""
    if backend == "fla":
      return fla(*(x.transpose(1, 2) for x in self.inputs), scale=1.0).transpose(1, 2)
    attend = self.torch.nn.functional.scaled_dot_product_attention
    if not backend:
      return attend(*self.inputs, **self.allowed)
    attention = importlib.import_module("torch.nn.attention")
    with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
      return attend(*self.inputs, **self.allowed)

  def memory(self, kind: str) -> dict[str, Any]:
    """Bytes by which one call raises the peak of this process, and bytes of its outputs."""
    tiny = [x[:, :, :16].detach().clone().requires_grad_() for x in self.inputs]
    attend = self.torch.nn.functional.scaled_dot_product_attention
    self.torch.autograd.grad(attend(*tiny, **self.allowed).sum(), tiny)  # loads what loads once
    zero = resident.start()
    kept = self.once(kind)
    growth = resident.growth(zero)
    outputs = kept if isinstance(kept, tuple) else (kept,)
    return {"growth": growth, "outputs": sum(x.numel() * x.element_size() for x in outputs)}

  def answer(self, folder: str, backend: str = "") -> dict[str, Any]:
    """Writes the output, float32 [B, T, N, H]."""
    write(folder, self.once("forward", backend).transpose(1, 2))
    return {}


def write(folder: str, out: Any) -> None:
  """An output as float32, to be read by whoever asked."""
  out = out.detach().float().cpu().contiguous()
  content = ctypes.string_at(out.data_ptr(), out.numel() * out.element_size())
  pathlib.Path(folder, "out").write_bytes(content)


def read(torch: Any, folder: str, name: str, shape: list[int]) -> Any:
  """An array that was written as float32."""
  data = bytearray(pathlib.Path(folder, name).read_bytes())
  return torch.frombuffer(data, dtype=torch.float32).reshape(shape)


def fla(*qkv: Any, **options: Any) -> Any:
  """Flash-linear-attention's reference in chunks, [B, T, N, H]. Its file needs torch alone, and the
  package around it the kernels' compiler.
  """
  return _fla().naive_chunk_linear_attn(*qkv, **options)


@functools.cache
def _fla() -> Any:
  package: Any = importlib.util.find_spec("fla")
  file = pathlib.Path(package.submodule_search_locations[0], "ops", "linear_attn", "naive.py")
  spec: Any = importlib.util.spec_from_file_location("fla_naive", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def main() -> None:
  """Serves softmax attention."""
  serve(Worker)


def serve(make: Any) -> None:
  """Serves requests {"do": method, ...} until the input ends."""
  replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what torch prints is no reply
  torch = importlib.import_module("torch")
  torch.set_num_threads(resident.cores())
  worker = make(torch)
  print(json.dumps(versions(torch)), file=replies)
  for line in sys.stdin:
    request = json.loads(line)
    try:
      reply = getattr(worker, request.pop("do"))(**request)
    except RuntimeError as refusal:  # a backend that cannot, or memory that does not suffice
      reply = {"refused": " ".join(str(refusal).split())}
    except Exception as refusal:  # a library that has changed
      reply = {"refused": " ".join(f"{type(refusal).__name__}: {refusal}".split())}
    print(json.dumps(reply), file=replies)


def versions(torch: Any) -> dict[str, Any]:
  """What it is and what it uses."""
  return {
    "torch": torch.__version__,
    "fla": _version("flash-linear-attention"),
    "threads": torch.get_num_threads(),
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    "devices": torch.cuda.device_count(),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


if __name__ == "__main__":
  main()
