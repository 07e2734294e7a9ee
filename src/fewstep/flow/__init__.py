"""The mathematics: paths, couplings, velocity fields and flow maps, time grids and laws, closed forms."""
