"""What the notebooks call, in the order in which an image travels: data → augment → model →
evaluation → training → runs → figures → report. Imports run one way, along that order."""
