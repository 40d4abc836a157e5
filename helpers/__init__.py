"""What the notebooks call, in the order in which an image travels:

project → data → augment → mixing → model → settings → evaluation → runs → optimizers → training →
study → figures. What executes and prints the notebooks is in `helpers/report/`.
"""
