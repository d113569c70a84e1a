import sys

from minisrv.commands.cli import main

sys.exit(main())
