"""Pictures of the images that a network is trained and evaluated on."""
