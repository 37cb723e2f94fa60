"""STAGE 2: the same views + the store -> student. Begin with `training.py`.

In: a recipe, a dataset, one or several stores. Out: a run directory, and the report over many.
"""
