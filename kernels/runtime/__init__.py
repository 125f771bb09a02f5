"""What every op builds on: choice of form, tiles, cached tensors, copies to the device, spans."""
