"""Types are checked at run time, under test only: every call into distill goes through beartype."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from beartype.claw import beartype_packages

beartype_packages(("distill", "recipes"))

import torch  # noqa: E402

torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
