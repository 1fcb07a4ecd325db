"""A study on one GPU in 25 minutes: pictograms on the device, two towers, CLIP and CLOOB, 300 epochs."""
