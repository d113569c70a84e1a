"""Answer the prompts of a file, as `minisrv batch` does; see --help."""

import sys

from minisrv.commands.batch import main

if __name__ == "__main__":
    sys.exit(main())
