"""What runs on a GPU: Triton code alone. Modules here are imported at the first launch, since triton may be missing."""
