"""PyTorch's attention behind a pipe, so that two pools of threads never compete: it sleeps unless
it is asked.

It reads a JSON object per line and answers with one. It runs under any Python that has torch, which
need not be the one that has jax, so it imports nothing else that has to be installed.
"""

import ctypes
import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any

from experiments.benchmarks import resident

NAMES = ("q", "k", "v", "do")


class Worker:
  """Holds the inputs of one length, in torch's layout [B, N, T, H]."""

  def __init__(self, torch: Any) -> None:
    self.torch = torch
    self.inputs: list[Any] = []

  def load(self, folder: str, shape: list[int]) -> dict[str, Any]:
    """Reads q, k, v and the output's cotangent, written as float32 [B, T, N, H]."""
    tensors = []
    for name in NAMES:
      data = bytearray(pathlib.Path(folder, name).read_bytes())
      flat = self.torch.frombuffer(data, dtype=self.torch.float32)
      tensors.append(flat.reshape(shape).transpose(1, 2).contiguous())
    *qkv, self.cotangent = tensors
    self.inputs = [x.requires_grad_() for x in qkv]
    return {}

  def once(self, kind: str) -> Any:
    """One call, forward or forward and backward."""
    attend = self.torch.nn.functional.scaled_dot_product_attention
    if kind == "forward":
      with self.torch.no_grad():
        return attend(*self.inputs, is_causal=True)
    out = attend(*self.inputs, is_causal=True)
    return self.torch.autograd.grad(out, self.inputs, self.cotangent)

  def time(self, kind: str, repeats: int) -> dict[str, Any]:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
      self.once(kind)
    return {"seconds": (time.perf_counter() - start) / repeats}

  def memory(self, kind: str) -> dict[str, Any]:
    """Bytes by which one call raises the peak of this process."""
    tiny = [x[:, :, :16].detach().clone().requires_grad_() for x in self.inputs]
    attend = self.torch.nn.functional.scaled_dot_product_attention
    self.torch.autograd.grad(attend(*tiny, is_causal=True).sum(), tiny)  # loads what loads once
    zero = resident.start()
    kept = self.once(kind)
    del kept
    return {"growth": resident.growth(zero)}

  def answer(self, folder: str) -> dict[str, Any]:
    """Writes the output, float32 [B, T, N, H]."""
    out = self.once("forward").transpose(1, 2).contiguous()
    content = ctypes.string_at(out.data_ptr(), out.numel() * out.element_size())
    pathlib.Path(folder, "out").write_bytes(content)
    return {}


def main() -> None:
  """Serves requests {"do": method, ...} until the input ends."""
  replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what torch prints is no reply
  torch = importlib.import_module("torch")
  torch.set_num_threads(resident.cores())
  worker = Worker(torch)
  print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), file=replies)
  for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=replies)


if __name__ == "__main__":
  main()
