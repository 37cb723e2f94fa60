"""A teacher store on disk or in a bucket. Begin with `schema.py`: what it looks like; then `reader.py` and `writer.py`.

In: encoded rows of committed blocks. Out: rows joined with images by key, every byte and every sample checked.
"""
