"""One file for each command on files: convert, info, check; and the profile of a run."""
