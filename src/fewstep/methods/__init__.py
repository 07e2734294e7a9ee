"""Methods: one file per paper, saying what is trained, the loss, and how the result is sampled.

A new method is a new file and one line in :data:`fewstep.methods.registry.METHODS`.
"""
