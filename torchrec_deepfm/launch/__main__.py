"""``python -m torchrec_deepfm.launch``: torchrun's command line."""

import os
import sys

from torchrec_deepfm.launch.launcher import main

if __name__ == "__main__":
    exit_code = 0
    try:
        main()
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # torchelastic's threads that copy the ranks' output may outlive a signal, and the interpreter would wait for them.
    os._exit(exit_code)
