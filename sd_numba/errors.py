"""The errors that sd-numba raises for its users: one clear line each, with what was found and what was expected."""


class SdNumbaError(Exception):
    """Base of every error meant for a user; ``str(error)`` is one complete line."""


class ModelError(SdNumbaError):
    """A model's files, weights or configuration cannot be used."""


class InputError(SdNumbaError, ValueError):
    """An argument cannot be used: a size, a number of steps, a sampler's name, an output path."""


class DownloadError(SdNumbaError):
    """A model cannot be fetched: no network, no such model, no access, a wrong checksum, no room on the disk."""
