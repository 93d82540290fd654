"""What this process holds: cores, and on Linux its memory, now and at its peak.

It imports the standard library only, because the interpreter that has torch may have nothing else.
"""

import ctypes
import os
import pathlib

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")


def cores() -> int:
  """Processor cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unsupported() -> str | None:
  """Why the peak cannot be measured here, or None."""
  if not os.access(CLEAR, os.W_OK):
    return f"peak memory is read from {STATUS} after a reset by {CLEAR}, which is not possible here"
  return None


def now(field: str = "VmRSS") -> int:
  """Bytes of physical memory that this process holds; "VmHWM" is its peak."""
  for line in STATUS.read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1]) * 1024
  raise OSError(f"{STATUS} has no {field}")


def start() -> int:
  """Gives free memory back, forgets the peak; returns what is held then, the zero of `growth`."""
  ctypes.CDLL(None).malloc_trim(0)
  CLEAR.write_text("5")
  return now()


def growth(zero: int) -> int:
  """Bytes by which the peak since `start` exceeds what the process held there."""
  return now("VmHWM") - zero
