"""Run the command line as `python -m foreseer`."""

from foreseer.cli import main

if __name__ == "__main__":
    main()
