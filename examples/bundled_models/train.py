"""Train a bundled model, or its judge, by its recipe; the same command resumes.

python examples/bundled_models/train.py fit --config examples/bundled_models/fashion_dit.yaml
"""

import sys

from foreseer.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])  # the recipe's classes are found beside this file
