"""`python -m cutlm`, the same as `cutlm`; what torchrun and accelerate launch."""

import sys

from cutlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
