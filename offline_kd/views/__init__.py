"""The contract of both stages: which augmentation a sample gets, as explicit numbers, and the pixels that follow.

In: a view spec of a recipe, key hashes, image sizes. Out: view parameters (stored), and their uint8 pixels.
"""
