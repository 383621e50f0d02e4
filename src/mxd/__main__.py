"""``python -m mxd`` is ``mxd``."""

from .cli import entry

if __name__ == "__main__":
    entry()
