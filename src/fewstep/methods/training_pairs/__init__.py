"""Where training pairs come from: a teacher that makes them, or rows of data in a coupling."""
