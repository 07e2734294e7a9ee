"""What fewstep keeps on disk: atomic files, manifests, and the pairs a teacher generated."""
