"""`python -m trio_deploy`, the same as `trio`."""

import sys

from trio_deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
