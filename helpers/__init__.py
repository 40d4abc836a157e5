"""What the notebooks call, in the order in which an image travels: data → augment → mixing →
model → evaluation → probing → runs → training → bench → figures → explorer → report → handin →
study. Imports run one way, along that order.

Evaluation and runs stand before training: the loop measures after each epoch, and writes the
record of its run as it goes.
"""

import torch

# Tiny numbers are slow on a CPU and change nothing. A thread inherits this from the one that starts
# it, so that it has to be said before anything is calculated by several.
torch.set_flush_denormal(True)
