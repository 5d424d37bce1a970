"""What a batch is made of, by kind of training, and how a run of it is put together."""
