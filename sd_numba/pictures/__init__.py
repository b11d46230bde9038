"""Pixels in and out: files, arrays, contact sheets, previews."""
