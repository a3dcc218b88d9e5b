"""The only room that imports comfy.*: memory manager, patches, paths."""
