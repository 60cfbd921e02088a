"""One thread per process: tiny tensors gain nothing from more, and results do not depend on the machine's load."""

import torch

torch.set_num_threads(1)
