"""A model's files become named weights: names, kinds, shapes, opening, LoRAs, embeddings, downloading."""
