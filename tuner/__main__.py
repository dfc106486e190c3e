"""`python -m tuner` is the `megatune` command."""

from tuner.cli import main

if __name__ == "__main__":
    main()
