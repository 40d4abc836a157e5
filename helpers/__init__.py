"""What the notebooks call, in import order:

project → data → mixing → model → settings → augment → evaluation → runs → training → study →
figures. What executes and prints the notebooks is in `helpers/report/`.
"""
