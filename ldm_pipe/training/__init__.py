"""Training: what a batch is and what is asked of the network (tasks, objectives), and the loop that runs it (run).

It may import everything below; it samples pictures only through a pipeline. It does not know the command line.
"""
