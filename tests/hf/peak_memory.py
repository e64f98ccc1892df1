"""How much memory a call takes at its peak, for tests that run in a process of their own."""

import os
import threading
from collections.abc import Callable
from typing import Any

# Blocks of 1 MB and more go back to the system when freed, as the large ones of real models do.
# glibc would keep those of up to 32 MB, as many as chance has it. And much is computed: optimized.
ENVIRONMENT = os.environ | {
  "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
  "XLA_FLAGS": "",  # tests/conftest.py sets it for what compiles much
}


def anonymous() -> int:
  """The anonymous memory that this process holds, in bytes."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
  """What `call` returns, and the most that was held meanwhile beyond what was held before."""
  before = peak = anonymous()
  done = threading.Event()

  def watch():
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, anonymous())

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    result = call()
  finally:
    done.set()
    thread.join()
  return result, peak - before
