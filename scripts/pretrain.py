#!/usr/bin/env python
"""Pre-train an encoder on speech without transcripts: `python scripts/pretrain.py --help`."""

from hf_speechcl.training.pretrain import main

if __name__ == "__main__":
    main()
