"""The version of the installed package; its one home is the file VERSION in the source tree."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("marlin-qqq")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+uninstalled"
