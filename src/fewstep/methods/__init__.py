"""Methods: one file per paper. It says which networks are trained, by which loss, and how the result is sampled.

``contract`` has the types that every method uses, ``families`` the losses that several papers share,
``training_pairs`` the pairs (x0, x1) that networks learn from, and ``guards`` the checks during training. A new method
is a new file, and its name in :data:`fewstep.methods.registry.NAMES`.
"""
