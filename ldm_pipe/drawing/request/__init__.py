"""What a caller asks for, checked once and before any work: arguments in, a `Request` or one clear error out.

It may import what drawing may. It does not run a network.
"""
