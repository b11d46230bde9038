"""The names that scripts written for diffusers use."""
