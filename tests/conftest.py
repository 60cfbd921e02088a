"""One thread per process: tiny tensors gain nothing from more, and results do not depend on the machine's load."""

import gc

import torch
import transformers  # noqa: F401 - so that what it makes is frozen too

torch.set_num_threads(1)

# The engine collects garbage after every block. Going through the libraries' own objects each time is most of a tiny
# run's time; frozen, they are left alone.
gc.collect()
gc.freeze()
