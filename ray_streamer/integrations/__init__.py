"""How do other people's engines load through this package? One package for each of them; none is imported but by its engine."""
