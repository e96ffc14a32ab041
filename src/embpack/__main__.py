"""python -m embpack does what embpack does."""

from embpack.cli import main

if __name__ == "__main__":
    main()
