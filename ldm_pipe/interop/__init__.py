"""Files of others: folders of diffusers, single files, pickles and LoRAs, in and out.

It may import the parts of a model. It does not know pipelines, training or the command line.
"""
