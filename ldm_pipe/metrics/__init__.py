"""Numbers that say how good pictures are; pure functions of tensors. Only evaluation imports this package."""
