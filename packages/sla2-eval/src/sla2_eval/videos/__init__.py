"""Video files: manifests, decoding and encoding, captioned folders, latents."""
