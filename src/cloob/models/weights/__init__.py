"""Other people's checkpoints: read as data, never run, and turned into encoders; one file a family.

``formats/`` reads the containers (torch's zip and legacy files, TorchScript archives, pickles of numpy arrays,
safetensors, JSON). No number in a file sizes an allocation before it is held against the file's own size.
"""
