"""Pictures of images as the network sees them."""
