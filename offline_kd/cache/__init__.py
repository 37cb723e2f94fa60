"""STAGE 1: images -> views -> teacher -> codec -> committed blocks. Begin with `pipeline.py`.

In: a recipe, a dataset, a teacher. Out: a finished store.
"""
