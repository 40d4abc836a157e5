"""What the notebooks call, in the order in which an image travels: data → augment → model →
evaluation → probing → runs → training → bench → figures → explorer → report → handin → study.
Imports run one way, along that order.

Evaluation and runs stand before training: the loop measures after each epoch, and writes the
record of its run as it goes.
"""
