"""`python -m rayalign.cli` is the `rayalign` command."""

from rayalign.cli import main

if __name__ == "__main__":
    main()
