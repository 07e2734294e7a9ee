"""Loss functions that several methods call; a method's file says which."""
