"""``python -m sd_numba`` is the command line, wherever the installed script is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
