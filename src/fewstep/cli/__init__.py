"""The command line ``fewstep VERB``."""
