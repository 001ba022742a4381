"""``python -m torchrec_deepfm <command>``."""

from torchrec_deepfm.cli import main

if __name__ == "__main__":
    main()
