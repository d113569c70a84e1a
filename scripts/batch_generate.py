"""Answer the prompts of a file: the same as `minisrv batch`; see --help."""

import sys

from minisrv.commands.batch import main

if __name__ == "__main__":
    sys.exit(main())
