import sys

from minisrv.cli import main

sys.exit(main())
