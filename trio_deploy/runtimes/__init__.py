"""One file per runtime: engines that run a bundle's stages."""
