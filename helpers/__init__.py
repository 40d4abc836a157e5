"""What the notebooks call, in import order:

project → data → mixing → model → settings → augment → evaluation → runs → training → study →
figures. What executes and prints the notebooks is in `helpers/report/`.
"""

import signal
import sys

if sys.argv[0] == "-m":  # a command is being imported: until it runs, Ctrl-C ends it silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)
