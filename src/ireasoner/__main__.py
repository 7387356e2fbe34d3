"""`python -m ireasoner` is the `ireasoner` command; launchers that start several processes need a module to run."""

import sys

from ireasoner.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
