"""offline-kd: run a teacher over an image dataset once, store its targets, train any number of students from the store.

    images ─┬─► cache.py    STAGE 1: views -> teacher -> codec -> committed blocks ─► teacher store
            └─► distill.py  STAGE 2: the same views + the store -> student ─► report

Shape letters, package-wide: N samples, B batch, V views, C classes, D channels, H W height and width.
`store/schema.py` says what a store looks like; `views.py` is what both stages must agree on.
"""
