"""What `load.capacity` and `load.autoscaling` reckon with: a measured service curve, manifests, and how these act."""
