"""The networks: arithmetic over a `WeightSource`. Nothing here opens a file."""
