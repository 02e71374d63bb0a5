"""One torch thread for the tests: on a busy machine two threads can be many times slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
