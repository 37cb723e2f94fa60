"""Teacher stores: read `schema.py` first. `codec.py` packs logits, `writer.py` and `reader.py` do the rest."""
