"""Files of others: diffusers folders in and out. Pure key and config maps, and the check of an export."""
