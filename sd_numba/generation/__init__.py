"""The run: a model's networks made ready, the request, the loop over the steps, its state."""
