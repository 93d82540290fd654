"""Linear attention of PyTorch behind a pipe, as `torch_worker.py` serves softmax attention:
flash-linear-attention's Triton kernels on a GPU, and the recurrence itself anywhere.

Arrays lie as fla reads them, `B T N H`, so that no call copies them first.
"""

import importlib
from typing import Any

from experiments.benchmarks import torch_worker

NAMES = ("q", "k", "v", "g", "do")


class Worker(torch_worker.Held):
  """Linear attention, in fla's layout [B, T, N, H]."""

  decay = "token"

  def use(self, device: str, dtype: str, decay: str) -> dict[str, Any]:
    """Where, in what, and whose decays: "token" or "channel"."""
    self.device, self.dtype, self.decay = device, getattr(self.torch, dtype), decay
    self.forget()
    return {}

  def _decays(self, shape: list[int]) -> list[int]:
    return shape if self.decay == "channel" else shape[:-1]

  def make(self, shape: list[int]) -> dict[str, Any]:
    """Inputs of its own, as ours are drawn; the shape is [B, T, N, H]."""
    self.torch.manual_seed(0)
    normal = lambda *size: self.torch.randn(*size, device=self.device)
    g = self.torch.nn.functional.logsigmoid(normal(*self._decays(shape)))
    self._keep([normal(*shape), normal(*shape), normal(*shape), g, normal(*shape)])
    return {}

  def _keep(self, tensors: list[Any]) -> None:
    q, k, v, g, self.cotangent = (x.to(self.device) for x in tensors)
    q, k, v, self.cotangent = (x.to(self.dtype) for x in (q, k, v, self.cotangent))
    self.inputs, self.kept = [x.requires_grad_() for x in (q, k, v, g)], {}

  def load(self, folder: str, shape: list[int]) -> dict[str, Any]:
    """Reads what was written as float32."""
    sizes = [shape, shape, shape, self._decays(shape), shape]
    pairs = zip(NAMES, sizes, strict=True)
    self._keep([torch_worker.read(self.torch, folder, name, size) for name, size in pairs])
    return {}

  def attend(self, backend: str) -> Any:
    """The output, by "fla" or by the "recurrence"."""
    q, k, v, g = self.inputs
    scale = q.shape[-1] ** -0.5
    if backend == "recurrence":
      return self._recurrence(q, k, v, g, scale)
    name = "gla" if self.decay == "channel" else "simple_gla"
    library = importlib.import_module(f"fla.ops.{name}")
    return getattr(library, f"chunk_{name}")(q, k, v, g, scale=scale)[0]

  def _recurrence(self, q: Any, k: Any, v: Any, g: Any, scale: float) -> Any:
    """Token by token."""
    outs, state = [], self.torch.zeros((), device=self.device)
    fade = g.exp() if g.ndim == 4 else g.exp()[..., None]
    for t in range(q.shape[1]):
      state = fade[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
      outs.append(scale * (q[:, t, ..., None] * state).sum(-2))
    return self.torch.stack(outs, 1)

  def answer(self, folder: str, backend: str) -> dict[str, Any]:
    """Writes the output, float32 [B, T, N, H]."""
    torch_worker.write(folder, self.once("forward", backend))
    return {}


def main() -> None:
  """Serves linear attention."""
  torch_worker.serve(Worker)


if __name__ == "__main__":
  main()
