"""How a picture says how it was made, and how that is read again, whichever program wrote it."""
